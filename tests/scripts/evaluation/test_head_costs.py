"""What lesioning each head costs: the paired differences of `eval --lesion`, stored for one very model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from srwm_rl import UserError
from srwm_rl.agents.evaluation.head_costs import HeadCosts
from srwm_rl.scripts.evaluation import head_costs as module
from srwm_rl.scripts.evaluation.head_costs import FILE, head_costs
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file

HEADS = ("0.0", "0.1")


@pytest.fixture
def run(recall: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(recall, tmp_path / "run"))
    (copied / FILE).unlink(missing_ok=True)
    return copied


def costs_of(run: Path, play: bool = True, **options: Any) -> HeadCosts | None:
    return head_costs(EvalConfig(run=str(run), progress=False, **options), play)


def test_costs_are_the_paired_differences_of_lesions(call: Any, run: Path, tmp_path: Path) -> None:
    lesions = [word for head in HEADS for word in ("--lesion", head)]
    file = tmp_path / "eval.json"
    assert call("eval", run, "--train-levels", "none", *lesions, "--json", file).code == 0
    expected = {}
    for part in json.loads(file.read_text())["interventions"]:
        expected[part["name"].split()[-1]] = {**part["differences"][0]["return"]}
    result = costs_of(run)
    assert result is not None
    assert (result.num_timesteps, result.levels, result.actions) == (256, "100:108", "stochastic")
    assert {cost.name: {"mean": cost.mean, "low": cost.low, "high": cost.high} for cost in result.costs} == expected
    assert [cost.mean for cost in result.ranked("recall")] == sorted((c.mean for c in result.costs), reverse=True)
    assert result.ranked("maze") == []


def test_nothing_is_played_twice_for_one_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert costs_of(run, play=False) is None
    first = costs_of(run)
    assert first is not None
    other = costs_of(run, deterministic=True)
    assert other is not None
    assert (run / FILE).is_file()
    monkeypatch.setattr(module, "evaluate", lambda _: pytest.fail("played again"))
    assert costs_of(run) == first
    assert costs_of(run, play=False) == first
    assert costs_of(run, deterministic=True) == other
    assert costs_of(run, play=False, eval_levels=("200:204",)) is None


def test_another_model_is_played_anew(run: Path) -> None:
    first = costs_of(run)
    assert first is not None
    file = Run.open(run).files("model")[-1]
    arrays, meta = read_file(file)
    arrays["action_net.bias"] = arrays["action_net.bias"] + 1
    write_file(file, arrays, meta)
    assert costs_of(run, play=False) is None
    second = costs_of(run)
    assert second is not None
    assert second.model != first.model
    assert costs_of(run, play=False) == second


@pytest.mark.parametrize(
    "change",
    [
        lambda file: {**file, "format": 2},
        lambda file: {**file, "results": 3},
        lambda file: {**file, "results": [{**file["results"][0], "costs": file["results"][0]["costs"][1:]}]},
        lambda file: {**file, "results": [{**file["results"][0], "costs": [{"layer": -1}]}]},
        lambda file: [],
    ],
)
def test_a_damaged_file_is_replaced(run: Path, change: Any) -> None:
    first = costs_of(run)
    content = json.loads((run / FILE).read_text())
    for text in (json.dumps(change(content)), "{", "", '{"format": NaN}'):
        (run / FILE).write_text(text)
        assert costs_of(run, play=False) is None
    assert costs_of(run) == first
    assert costs_of(run, play=False) == first


def test_a_link_is_replaced_and_its_target_kept(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (run / FILE).symlink_to(target)
    assert costs_of(run) is not None
    assert target.read_text() == "kept"
    assert not (run / FILE).is_symlink()


def test_a_model_outside_of_a_run_is_played_and_nothing_stored(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    model = Path(shutil.copy(Run.open(run).files("model")[-1], folder))
    assert costs_of(model) == costs_of(run)
    assert [*folder.iterdir()] == [model]


def test_levels_that_were_trained_on_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="were trained on"):
        costs_of(run, eval_levels=("0:8",))


def test_a_core_without_heads_has_no_costs(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    for core in ("feedforward", "gru"):
        argv = [*recall_argv, "--core", core, "-n", 64, "-f", tmp_path, "--verbose", 0]
        assert call("train", *argv).code == 0
        assert costs_of(tmp_path / f"ppo_{core}" / "recall_1") is None
