"""A run's best model: the weights that scored best, kept over stops and resumes, named RUN/best in every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import UserError, load
from srwm_rl.scripts.main import main
from srwm_rl.scripts.signals import StopSignal
from srwm_rl.scripts.training import checkpoints
from srwm_rl.scripts.training.checkpoints import Session
from srwm_rl.storage.run_folder import Run, steps_of
from srwm_rl.storage.safe_file import read_file, write_file

STEPS = 64  # per update
HELD_OUT = ("--eval-freq", "128", "--eval-episodes", "4")
LENGTH = {"training": 1536, "held-out": 640}
TAG = {"training": "rollout/ep_rew_mean", "held-out": "eval_test/mean_reward"}


def logged(run: Path, tag: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[tag] for line in lines if tag in line}


def weights_of(file: Path) -> dict[str, np.ndarray]:
    return {name: array for name, array in read_file(file)[0].items() if not name.startswith("/")}


def best_of(run: Path) -> dict[str, Any] | None:
    best: dict[str, Any] | None = read_file(Run.open(run).files("checkpoint")[-1])[1]["state"]["best"]
    return best


def words_of(kind: str, argv: list[str]) -> list[str]:
    return [*argv, "--save-freq", "1", *(HELD_OUT if kind == "held-out" else ())]


@pytest.fixture(scope="module", params=["training", "held-out"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["ppo", "impala"])
def kept(
    request: pytest.FixtureRequest, kind: str, recall_argv: list[str], impala_argv: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """Return a run of which every model was kept, a checkpoint after every update."""
    logs = tmp_path_factory.mktemp("best")
    tiny = recall_argv if request.param == "ppo" else [*impala_argv, "--synchronous"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "sweep", lambda self: None)
        argv = ["train", *words_of(kind, tiny), "-n", str(LENGTH[kind]), "-f", str(logs), "--verbose", "0"]
        assert main(argv) == 0
    return logs / f"{request.param}_srwm" / "recall_1"


def test_the_best_models_are_those_that_had_the_best_score_in_the_log(kind: str, kept: Path) -> None:
    scores, expected, best, best_error = logged(kept, TAG[kind]), [], -np.inf, 0.0
    assert len(scores) >= 5
    for step, score in sorted(scores.items()):
        is_full = kind == "held-out" or step >= _full_at(kept)
        error = _error(kind, kept, step, score)
        if is_full and score - best > np.hypot(error, best_error):
            best, best_error = score, error
            expected.append(step)
    files = Run.open(kept).files("best")
    assert [steps_of(file) for file in files] == expected
    assert expected
    for file in files:
        meta = read_file(file)[1]
        assert meta["chosen"]["score"] == scores[steps_of(file)]
        assert meta["num_timesteps"] == steps_of(file)
    assert best_of(kept) == {**meta["chosen"], "steps": expected[-1], "error": pytest.approx(best_error)}
    output = "4 held-out levels of 100:108" if kind == "held-out" else "last 100 training episodes"
    assert output in meta["chosen"]["of"]


def _error(kind: str, run: Path, step: int, score: float) -> float:
    """Return the standard error of a score: of 4 returns of 0 or 1, or of the checkpoint's last training episodes."""
    returns = np.arange(4) < round(4 * score)
    if kind == "training":
        returns = [of["r"] for of in read_file(Run.open(run).file("checkpoint", step))[1]["state"]["episodes"]]
    return float(np.std(returns, ddof=1) / np.sqrt(len(returns)))


def _full_at(run: Path) -> int:
    """Return the first step at which a hundred episodes had ended, from the checkpoints."""
    full = [file for file in Run.open(run).files("checkpoint") if len(read_file(file)[1]["state"]["episodes"]) == 100]
    return steps_of(full[0])


def test_the_weights_are_those_that_were_scored_and_not_those_after_the_next_update(kept: Path) -> None:
    run = Run.open(kept)
    for file in run.files("best"):
        played, later = (weights_of(run.file("model", steps_of(file) - back)) for back in (STEPS, 0))
        weights = weights_of(file)
        for name, array in weights.items():
            np.testing.assert_array_equal(array, played[name], err_msg=name)
        assert any((array != later[name]).any() for name, array in weights.items())


def test_a_run_stopped_and_resumed_has_the_same_best(
    kind: str, call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", *words_of(kind, recall_argv), "-n", LENGTH[kind], "--verbose", 0]
    assert call(*argv, "-f", tmp_path / "whole").code == 0
    whole, cut = (tmp_path / folder / "ppo_srwm" / "recall_1" for folder in ("whole", "cut"))
    best = best_of(whole)
    assert best is not None
    stops = iter([best["steps"] - STEPS, best["steps"], best["steps"] + STEPS])
    due, save = [next(stops)], Session.save

    def save_and_stop(self: Any, state: Any) -> None:
        save(self, state)
        if state["counters"]["num_timesteps"] >= due[0] and not hasattr(self, "stopping"):
            self.stopping = True  # it saves once more when it stops
            raise StopSignal("a test")

    monkeypatch.setattr(Session, "save", save_and_stop)
    assert call(*argv, "-f", tmp_path / "cut").code == 130
    for due[0] in stops:
        output = call("train", "--resume", cut)
        assert "best model" not in output.err, output
        if output.code == 0:
            break
    due[0] = 10**9
    assert call("train", "--resume", cut).code in (0, 2)  # 2: it had already finished
    assert best_of(cut) == best
    ours, theirs = (read_file(Run.open(folder).files("best")[-1]) for folder in (cut, whole))
    assert ours[1] == {**theirs[1], "config": ours[1]["config"]}
    for name, array in theirs[0].items():
        np.testing.assert_array_equal(ours[0][name], array, err_msg=name)
    assert [file.name for file in Run.open(cut).files("best")] == [file.name for file in Run.open(whole).files("best")]


@pytest.fixture(scope="module")
def run(recall_argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose best model is not its newest; copy it before changing it."""
    logs = tmp_path_factory.mktemp("with_best")
    for seed in range(5):
        assert main(["train", *words_of("held-out", recall_argv), "-n", "640", "-f", str(logs), "--seed", str(seed),
                     "--verbose", "0"]) == 0  # fmt: skip
        run = logs / "ppo_srwm" / f"recall_{seed + 1}"
        if (best := best_of(run)) is not None and best["steps"] < 640:
            return run
    raise AssertionError("the last evaluation was always the best")


def test_train_prints_the_best_models_path(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    output = call("train", *recall_argv, *HELD_OUT, "-n", 128, "-f", tmp_path)
    score = logged(tmp_path / "ppo_srwm" / "recall_1", TAG["held-out"])[128]
    folder = tmp_path / "ppo_srwm" / "recall_1"
    line = f"best model: mean return on 4 held-out levels of 100:108 {score:.4g}, at 128 steps: {folder}/best\n"
    assert line in output.out
    assert "best model" not in call("train", *recall_argv, "-n", 64, "-f", tmp_path).out


def test_every_command_takes_run_best(call: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = best_of(run)
    assert best is not None
    file = Run.open(run).file("best", best["steps"])
    agent, newest = load(run / "best"), load(run)
    assert (agent.path, agent.num_timesteps) == (file, best["steps"])
    assert (agent.chosen, newest.chosen) == ({"score": best["score"], "of": best["of"]}, None)
    assert newest.num_timesteps == 640

    name = f"{run}/best"
    result = tmp_path / "eval.json"
    output = call("eval", name, "--deterministic", "--json", result)
    assert output.code == 0, output
    assert f"{best['steps']:,} steps" in output.out
    assert "the model is its run's best by mean return on 4 held-out levels of 100:108" in output.out
    assert "looks better than it is; evaluate it on others" in output.out
    assert json.loads(result.read_text())["chosen"] == agent.chosen
    assert "its run's best" not in call("eval", run).out
    assert call("eval", file, "--deterministic").out == output.out
    assert json.loads(result.read_text())["run"] == name

    monkeypatch.chdir(tmp_path)
    output = call("watch", name, "--level", 100, "--gif")
    assert output.code == 0, output
    assert [file.name for file in tmp_path.glob("*.gif")] == [f"{run.name}-best-recall-100.gif"]
    assert call("export", name, "--format", "sb3").out.startswith(f"model.zip: srwm on recall, {best['steps']:,} steps")
    output = call("compare", run, name)
    assert output.code == 0, output
    assert f"A: srwm, 640 steps, {run}\n" in output.out
    assert f"B: srwm, {best['steps']:,} steps, {name}\n" in output.out
    pytest.importorskip("matplotlib")
    assert call("report", name, "--no-freeze").code == 0
    page = (tmp_path / "report.html").read_text()
    assert f"srwm-rl eval {name} " in page
    assert f"trained for</dt><dd>{best['steps']:,} steps" in page
    assert "looks better than it is" in page


@pytest.mark.parametrize("command", ["eval", "watch", "export", "report", "compare"])
def test_a_run_without_a_best_model_is_refused(command: str, call: Any, recall: Path, untouched: Path) -> None:
    argv = [f"{recall}/best", *([recall] if command == "compare" else [])]
    assert f"{recall} has no best model yet: " in (message := call(command, *argv).error())
    assert f"until then use {recall}, its newest model" in message
    with pytest.raises(UserError, match="has no best model yet"):
        load(recall / "best")


def test_best_cannot_be_resumed(call: Any, run: Path, snapshot: Any) -> None:
    before = snapshot(run)
    assert f"there is no run at {run}/best" in call("train", "--resume", f"{run}/best").error()
    assert snapshot(run) == before


def test_best_models_after_the_resumed_checkpoint_are_removed(call: Any, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    opened = Run.open(copied)
    bests = [file.name for file in opened.files("best")]
    shutil.copy(opened.files("best")[-1], opened.file("best", 10**6))  # as of a process killed before its checkpoint
    output = call("train", "--resume", copied, "-n", 704)
    assert (output.code, output.err) == (0, "")
    assert [file.name for file in opened.files("best")] == bests


def test_a_deleted_best_model_is_reported_and_replaced(call: Any, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    best = best_of(run)
    assert best is not None
    Run.open(copied).file("best", best["steps"]).unlink()
    output = call("train", "--resume", copied, "-n", 768)
    assert output.code == 0
    assert "the best model, mean return on 4 held-out levels" in output.err
    assert "the next score becomes the best" in output.err
    assert steps_of(Run.open(copied).files("best")[-1]) == 768


def test_an_older_checkpoint_is_resumed_without_a_known_past(call: Any, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    for file in Run.open(copied).files("best"):
        file.unlink()
    for file in Run.open(copied).files("checkpoint"):
        arrays, meta = read_file(file)
        meta["state"] = {name: value for name, value in meta["state"].items() if name not in ("best", "levels_played")}
        kept = {name: value for name, value in arrays.items() if not name.startswith("/levels_played")}
        write_file(file, kept, {**meta, "format": 1})
    assert call("train", "--resume", copied, "-n", 768).code == 0
    best = best_of(copied)
    assert best is not None
    assert {name: best[name] for name in ("score", "of", "steps")} == {
        **load(copied / "best").chosen,  # type: ignore[dict-item]
        "steps": 768,
    }
    played = load(copied).levels_played
    assert played is not None
    assert not played.is_complete("recall")
    assert call("train", "--resume", copied, "--verify").code == 0


def test_the_best_model_is_saved_once_a_full_disk_has_space(
    call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model, full = checkpoints.save_model, iter([True, True, False])

    def sometimes(path: Path, *args: Any) -> None:
        if path.name.startswith("best-") and next(full, False):
            raise OSError(28, "No space left on device")
        save_model(path, *args)

    monkeypatch.setattr(checkpoints, "save_model", sometimes)
    output = call("train", *words_of("held-out", recall_argv), "-n", 256, "-f", tmp_path)
    assert output.code == 0
    assert output.err.count(f"could not write {tmp_path}") == 1
    assert output.err.count("saved again, at ") == 1
    best = best_of(tmp_path / "ppo_srwm" / "recall_1")
    assert best is not None
    assert load(tmp_path / "ppo_srwm" / "recall_1" / "best").num_timesteps == best["steps"]
