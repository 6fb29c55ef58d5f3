"""Held-out levels that were trained on: detected by the record of levels played, and marked with every result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srwm_rl import load
from srwm_rl.envs.levels import LevelRange
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.protocol import count, explain, levels_trained_on, merged
from srwm_rl.scripts.main import main
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file
from srwm_rl.storage.seen_levels import SeenLevels

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def altered(run: Path, target: Path, change: Change) -> Path:
    """Copy a run and change its newest model."""
    copied = Path(shutil.copytree(run, target))
    file = Run.open(copied).files("model")[-1]
    arrays, meta = read_file(file)
    change(arrays, meta)
    write_file(file, arrays, meta)
    return copied


def settings(**changes: Any) -> Change:
    return lambda arrays, meta: meta["config"].update(changes)


def without_record(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    del meta["levels_played"]
    for name in [key for key in arrays if key.startswith("/levels_played")]:
        del arrays[name]


def evaluate(call: Any, run: Path, folder: Path, *argv: object) -> tuple[dict[str, Any], str]:
    file = folder / "eval.json"
    output = call("eval", run, *argv, "--json", file)
    assert output.code == 0, output
    return json.loads(file.read_text()), output.out


@pytest.fixture(scope="session")
def unlimited(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> Path:
    """Return a run trained on all levels."""
    logs = tmp_path_factory.mktemp("unlimited")
    argv = ["all" if word == "0:12" else word for word in recall_argv]
    assert main(["train", *argv, "-n", "128", "-f", str(logs), "--verbose", "0"]) == 0
    return logs / "ppo_srwm" / "recall_1"


def test_a_models_record_is_of_the_levels_that_were_played(recall: Path, unlimited: Path) -> None:
    played = load(recall).levels_played
    assert played is not None
    assert played.is_complete("recall")
    assert set(played.among("recall", range(500))) <= set(range(12))
    assert len(played.games["recall"]) > 6  # of 12, in some 30 episodes
    everything = load(unlimited).levels_played
    assert everything is not None
    assert everything.is_complete("recall")
    assert len(everything.games["recall"]) > 8
    assert everything.games["recall"].high > 10**6


def test_levels_really_played_are_refused_whatever_the_settings_say(call: Any, recall: Path, tmp_path: Path) -> None:
    run = altered(recall, tmp_path / "run", settings(levels="500:512"))
    played = load(recall).levels_played
    assert played is not None
    overlap = played.among("recall", range(4, 20))
    assert overlap
    argv = ("--eval-levels", "4:20", "--train-levels", "none")
    refusal = call("eval", run, *argv).error()
    assert (
        f"levels 4:20 were trained on (500:512): {len(overlap)} of 16 (recall, 4:20: {', '.join(map(str, overlap))});"
        in refusal
    )
    result, output = evaluate(call, run, tmp_path, *argv, "--allow-overlap")
    assert (result["valid"], result["overlap"]) == (False, len(overlap))
    assert result["trained_on"] == {"held-out": {"recall": overlap}}
    assert f"INVALID as a held-out score: {len(overlap)} of the levels were trained on" in output
    assert f"recall, held-out: {', '.join(map(str, overlap))}" in output


def test_an_evaluation_of_levels_never_played_is_valid(call: Any, recall: Path, tmp_path: Path) -> None:
    for argv in ((), ("--allow-overlap",)):
        result, output = evaluate(call, recall, tmp_path, *argv)
        assert (result["valid"], result["overlap"], result["trained_on"]) == (True, 0, {})
        assert "INVALID" not in output


def test_without_a_record_the_settings_decide(call: Any, recall: Path, tmp_path: Path) -> None:
    run = altered(recall, tmp_path / "run", without_record)
    assert load(run).levels_played is None
    argv = ("--eval-levels", "8:16", "--train-levels", "none")
    assert "levels 8:16 were trained on (0:12): 4 of 8" in call("eval", run, *argv).error()
    result, _ = evaluate(call, run, tmp_path, *argv, "--allow-overlap")
    assert result["trained_on"] == {"held-out": {"recall": [8, 9, 10, 11]}}
    assert evaluate(call, run, tmp_path)[0]["valid"] is True


def test_with_training_on_all_levels_the_record_decides(call: Any, unlimited: Path, tmp_path: Path) -> None:
    result, output = evaluate(call, unlimited, tmp_path, "--train-levels", "none")
    assert result["valid"] is True
    assert "INVALID" not in output
    played = load(unlimited).levels_played
    assert played is not None
    low = played.games["recall"].low
    argv = ("--eval-levels", f"{low}:{low + 2}", "--train-levels", "none")
    assert f"{low}:{low + 2} were trained on (all): 1 of 2" in call("eval", unlimited, *argv).error()
    assert evaluate(call, unlimited, tmp_path, *argv, "--allow-overlap")[0]["trained_on"] == {
        "held-out": {"recall": [low]}
    }
    blind = altered(unlimited, tmp_path / "blind", without_record)
    assert "levels 100:108 were trained on (all): 8 of 8" in call("eval", blind).error()


def test_reports_and_comparisons_are_marked_invalid_too(
    call: Any, recall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    monkeypatch.chdir(tmp_path)
    run = altered(recall, tmp_path / "run", settings(levels="500:512"))
    argv = ("--eval-levels", "4:20")
    result, _ = evaluate(call, run, tmp_path, *argv, "--train-levels", "none", "--allow-overlap")
    (overlap,) = result["trained_on"]["held-out"].values()
    line = f"Invalid as a held-out score: {len(overlap)} of the levels were trained on (recall, held-out: "

    assert "were trained on" in call("report", run, *argv, "--train-levels", "none").error()
    assert not (tmp_path / "report.html").exists()
    quick = ("--no-freeze", "--no-random")
    assert call("report", run, *argv, "--train-levels", "none", "--allow-overlap", *quick).code == 0
    assert line in (tmp_path / "report.html").read_text()
    assert call("report", run, "--eval", tmp_path / "eval.json").code == 0
    assert line in (tmp_path / "report.html").read_text()
    del result["trained_on"]  # as an older version wrote it: the run's settings decide, levels 0:12
    (tmp_path / "eval.json").write_text(json.dumps(result))
    assert call("report", run, "--eval", tmp_path / "eval.json").code == 0
    assert "Invalid as a held-out score: 8 of the levels were" in (tmp_path / "report.html").read_text()

    without = altered(recall, tmp_path / "other", without_record)
    compare = ("compare", without, run, "--eval-levels", "12:20")
    assert call(*compare).code == 0
    compare = ("compare", without, run, *argv)
    assert "were trained on" in call(*compare).error()
    output = call(*compare, "--allow-overlap", "--json", "pair.json", "-o", "pair.html")
    assert output.code == 0, output
    assert "INVALID as a held-out score of A: 8 of the levels were trained on" in output.out
    assert f"INVALID as a held-out score of B: {len(overlap)} of the levels were trained on" in output.out
    pair = json.loads((tmp_path / "pair.json").read_text())
    assert pair["valid"] is False
    assert pair["A"]["trained_on"] == {"held-out": {"recall": list(range(4, 12))}}
    assert pair["B"]["trained_on"] == {"held-out": {"recall": overlap}}
    assert "INVALID as a held-out score of B" in (tmp_path / "pair.html").read_text()


@pytest.mark.parametrize("name", ["trained_on", "same_first_frame", "chosen"])
def test_an_evaluation_file_with_malformed_fields_is_refused(
    name: str, call: Any, recall: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    result, _ = evaluate(call, recall, tmp_path)
    for wrong in (1, [], {"held-out": 1}, {"held-out": {"recall": 5}}, {"held-out": {"recall": ["<b>"]}}):
        (tmp_path / "eval.json").write_text(json.dumps({**result, name: wrong}))
        argv = ("report", recall, "--eval", tmp_path / "eval.json", "-o", tmp_path / "page.html")
        assert "was not written by srwm-rl eval --json" in call(*argv).error()


def record(*levels: int, start: int = 0, stop: int = 10, complete: bool = True) -> SeenLevels:
    seen = SeenLevels(start, stop, complete)
    for level in levels:
        seen.add("recall", level)
    return seen


@pytest.mark.parametrize(
    ("levels", "played", "overlap"),
    [
        ("0:10", None, [8, 9]),
        ("0:10", record(1), [8, 9]),  # the whole training range counts, reached or not
        ("0:10", record(1, 11, 13), [8, 9, 11]),
        ("all", None, [8, 9, 10, 11]),
        ("all", record(1, 9), [9]),
        ("all", record(1), []),
        ("all", record(1, complete=False), [8, 9, 10, 11]),
        ("all", SeenLevels(0, 5), [8, 9, 10, 11]),  # no level of this game
        ("20:30", record(20), []),
    ],
)
def test_what_counts_as_trained_on(levels: str, played: SeenLevels | None, overlap: list[int]) -> None:
    trained = TrainConfig(env="recall", levels=levels)
    trained_on = levels_trained_on(trained, played, {"held-out": list(LevelRange(8, 12))})
    assert trained_on == ({"held-out": {"recall": overlap}} if overlap else {})


def test_merged_counts_and_explanations() -> None:
    trained_on = merged([{"a": {"x": [3, 1]}}, {}, {"a": {"x": [1, 2], "y": [2]}, "b": {"x": list(range(20, 40))}}])
    assert trained_on == {"a": {"x": [1, 2, 3], "y": [2]}, "b": {"x": list(range(20, 40))}}
    assert count(trained_on) == 3 + 20
    assert explain(trained_on)[:2] == ["x, a: 1, 2, 3", "y, a: 2"]
    assert explain(trained_on)[2].endswith(", 29 and 10 more")


def test_environments_of_other_kinds_are_recorded_under_the_name_they_are_evaluated_by(
    call: Any, tmp_path: Path
) -> None:
    small = ["--n-envs", 2, "--n-steps", 64, "--batch-size", 128, "--n-epochs", 1, "--n-threads", 1, "--no-progress"]
    argv = ["train", "--env", "CartPole-v1", *small, "--levels", "0:4", "--eval-levels", "50:52", "--core", "gru"]
    assert call(*argv, "-n", 256, "-f", tmp_path).code == 0
    run = tmp_path / "ppo_gru" / "CartPole-v1_1"
    played = load(run).levels_played
    assert played is not None
    assert played.is_complete("CartPole-v1")
    moved = altered(run, tmp_path / "moved", settings(levels="9:12"))
    result, _ = evaluate(call, moved, tmp_path, "--eval-levels", "0:4", "--train-levels", "none", "--allow-overlap")
    assert result["trained_on"] == {"held-out": {"CartPole-v1": played.among("CartPole-v1", range(4))}}
