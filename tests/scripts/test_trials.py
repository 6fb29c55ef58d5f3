"""`--attempts` and `--shuffle-actions`: runs whose episodes are trials, through every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from srwm_rl.agents.evaluation.play_levels import Trial
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.evaluation.results import attempt_returns, pool, read_evaluation
from srwm_rl.scripts.main import main
from srwm_rl.scripts.video.scene import Scene
from srwm_rl.storage.run_folder import Run

TRIALS = ("--attempts", "3", "--shuffle-actions")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> Path:
    """Return a finished run of four updates on trials of three attempts."""
    logs = tmp_path_factory.mktemp("trials")
    argv = ["train", *recall_argv, *TRIALS, "-n", "256", "--save-freq", "1", "-f", str(logs), "--verbose", "0"]
    assert main(argv) == 0
    return logs / "ppo_srwm" / "recall_1"


def test_a_run_keeps_its_settings_and_they_cannot_change(call: Any, trials: Path) -> None:
    config = Run.open(trials).config["train"]
    assert (config["attempts"], config["shuffle_actions"]) == (3, True)
    assert "leave out --attempts" in call("train", "--resume", trials, "--attempts", 2, "-n", 512).error()
    assert "leave out --shuffle-actions" in call("train", "--resume", trials, "--no-shuffle-actions").error()


def test_settings_of_an_older_run_have_single_attempts(trials: Path) -> None:
    stored = Run.open(trials).config["train"]
    old = {name: value for name, value in stored.items() if name not in ("attempts", "shuffle_actions")}
    settings = read_settings(old, "a file")
    assert (settings.attempts, settings.shuffle_actions) == (1, False)


def test_the_plan_names_trials(call: Any, recall_argv: list[str]) -> None:
    plan = call("train", *recall_argv, *TRIALS, "--dry-run").out
    assert "3 attempts per trial; actions shuffled by level" in plan
    assert "attempt_begins" in plan
    assert "attempt" not in call("train", *recall_argv, "--dry-run").out


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_resumed_run_of_trials_is_exact(
    algo: str, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    argv = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    normalised = [*argv, *TRIALS, "--normalize-reward", "--save-freq", 1, "-f", tmp_path]
    assert call("train", *normalised, "-n", 256).code == 0
    result = call("train", "--resume", tmp_path / f"{algo}_srwm" / "recall_1", "--verify")
    assert "exact: from 192 to 256 steps" in result.out, result


def test_a_resumed_procgen_run_of_trials_is_exact(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    argv = ["--env", "bigfish,dodgeball", *procgen_argv, *TRIALS, "--save-freq", 1, "-f", tmp_path, "-n", 256]
    assert call("train", *argv).code == 0
    result = call("train", "--resume", tmp_path / "ppo_srwm" / "bigfish+dodgeball_1", "--verify")
    assert "exact: from 192 to 256 steps" in result.out, result


def evaluated(call: Any, run: Path, file: Path, *argv: object) -> tuple[dict[str, Any], str]:
    result = call("eval", run, *argv, "--json", file)
    assert result.code == 0, result
    report: dict[str, Any] = json.loads(file.read_text())
    return report, result.out


def test_an_evaluation_reports_the_return_by_attempt(call: Any, trials: Path, tmp_path: Path) -> None:
    report, table = evaluated(call, trials, tmp_path / "eval.json", "-k", 2, "--random", "--freeze-edits")
    returns = {(level, r) for _, level, r, *_ in report["episodes"]["held-out"]}
    assert {(level, sum(parts)) for _, level, parts in report["trials"]["held-out"]} == returns
    frozen = report["interventions"][0]["return_by_attempt"]
    rows = {row["split"]: row for row in [*report["return_by_attempt"], *frozen]}
    assert rows.keys() == {"train", "held-out", "random, held-out", "edits frozen, train", "edits frozen, held-out"}
    assert (rows["held-out"]["game"], rows["held-out"]["levels"]) == ("recall", 8)
    parts = np.array([parts for *_, parts in report["trials"]["held-out"]])
    assert parts.shape == (16, 3)
    assert [interval["mean"] for interval in rows["held-out"]["return"]] == pytest.approx(parts.mean(0))
    assert all(part["low"] <= part["mean"] <= part["high"] for part in rows["held-out"]["return"])
    total = next(row for row in report["rows"] if row["split"] == "held-out")["return"]["mean"]
    assert sum(parts.mean(0)) == pytest.approx(total)
    assert "return by attempt" in table
    assert "attempt 3 of 3" in table


def test_scores_are_normalised_per_trial(call: Any, trials: Path, tmp_path: Path) -> None:
    report, _ = evaluated(call, trials, tmp_path / "eval.json", "--train-levels", "none")
    (row,) = report["rows"]
    assert row["normalized"] == pytest.approx((row["return"]["mean"] / 3 - 0.25) / 0.75)


def test_an_evaluation_without_attempts_has_no_such_entries(call: Any, recall: Path, tmp_path: Path) -> None:
    report, table = evaluated(call, recall, tmp_path / "eval.json")
    assert not {"trials", "return_by_attempt"} & report.keys()
    assert "attempt" not in table


def test_evaluations_are_read_and_pooled_with_their_trials(call: Any, trials: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    report, _ = evaluated(call, trials, file, "--freeze-edits")
    trained = read_settings(Run.open(trials).config["train"], "a file")
    evaluation = read_evaluation(str(file), trained)
    assert evaluation["trials"]["held-out"][0] == Trial("recall", 100, tuple(report["trials"]["held-out"][0][2]))
    pooled = pool([evaluation, evaluation], trained, 0)
    assert len(pooled["trials"]["held-out"]) == 2 * len(evaluation["trials"]["held-out"])
    for part, original in ((pooled, report), (pooled["interventions"][0], report["interventions"][0])):
        assert part["return_by_attempt"] == original["return_by_attempt"]


def test_more_attempts_than_in_training_can_be_evaluated(call: Any, trials: Path, recall: Path, tmp_path: Path) -> None:
    report, table = evaluated(call, trials, tmp_path / "eval.json", "--attempts", 9, "--train-levels", "none")
    assert {len(parts) for *_, parts in report["trials"]["held-out"]} == {9}
    assert [f"attempt {k} of 9" in table for k in range(1, 10)] == [True] * 5 + [False] * 3 + [True]
    assert "not: leave it out" in call("eval", recall, "--attempts", 2).error()


def test_returns_of_a_level_are_means_over_its_trials() -> None:
    trials = [Trial("a", 5, (1.0, 2.0)), Trial("a", 2, (4.0, 6.0, 8.0)), Trial("a", 5, (3.0,))]
    np.testing.assert_array_equal(attempt_returns(trials), [[4.0, 6.0, 8.0], [2.0, 2.0, np.nan]])


def test_a_trial_is_filmed_and_replayed(call: Any, trials: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trial.npz"
    result = call("watch", trials, "-o", tmp_path / "trial.gif", "--trace", trace, "--level", 101)
    assert result.code == 0, result
    assert "1 episode(s)" in result.out
    assert call("replay", trace).code == 0


def test_a_run_of_trials_is_compared_with_its_like_alone(call: Any, trials: Path, recall: Path, tmp_path: Path) -> None:
    assert "differ in attempts" in call("compare", trials, recall).error()
    other = shutil.copytree(trials, tmp_path / "other")
    result = call("compare", trials, other, "-o", tmp_path / "page.html")
    assert result.code == 0, result


def test_a_scene_from_before_there_were_attempts_is_one_of_single_attempts() -> None:
    scene = Scene("recall", 3, inputs=("action",))
    stored = msgspec.json.decode(msgspec.json.encode(scene))
    before = {name: value for name, value in stored.items() if name not in ("attempts", "shuffle_actions")}
    assert len(stored) - len(before) == 2
    assert msgspec.convert(before, Scene) == scene


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--env", "recall", "--attempts", "0"), "--attempts must lie in [1, 1000], not 0"),
        (("--env", "Pendulum-v1", "--shuffle-actions"), "only Discrete actions can be shuffled"),
        (("--env", "hidden_controls", "--attempts", "2"), "has attempts of its own"),
        (("--env", "maze", "--attempts", "2", "--env-kwargs", "use_sequential_levels:true"), "use_sequential_levels"),
    ],
)
def test_wrong_options_are_refused(call: Any, options: tuple[str, ...], message: str, untouched: Path) -> None:
    assert message in call("train", *options, "-n", 64, "-f", untouched).error()


def test_a_report_shows_the_return_by_attempt(call: Any, trials: Path, recall: Path, tmp_path: Path) -> None:
    for run, shown in ((trials, True), (recall, False)):
        page = tmp_path / f"{shown}.html"
        result = call("report", run, "-o", page, "--train-levels", "none")
        assert result.code == 0, result
        html = page.read_text()
        assert ("By attempt" in html) == shown
        assert ("attempt 3 of 3" in html) == shown


def test_a_zip_of_a_model_trained_on_trials_needs_their_number(call: Any, trials: Path, tmp_path: Path) -> None:
    exported = tmp_path / "model.zip"
    assert call("export", trials, "--format", "sb3", "-o", exported).code == 0
    argv = ("eval", exported, "--trust", "--env", "recall", "--train-levels", "0:2", "--eval-levels", "100:104")
    assert "give their number with --attempts" in call(*argv).error()
    # The zip's own options are not those of the run beside it.
    result = call(*argv, "--attempts", 3, "--shuffle-actions", "--beside", trials, "--no-progress")
    assert result.code == 0, result
    assert f"{trials}, held-out 100:104" in result.out
