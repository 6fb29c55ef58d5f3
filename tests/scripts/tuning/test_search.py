"""`srwm-rl tune` as a user runs it: real trainings, kills, two processes, wrong inputs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from srwm_rl.scripts.config.config_file import read_config_file
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.main import main
from srwm_rl.scripts.tuning.record import SearchSettings
from srwm_rl.scripts.tuning.space import Space, space_to_mapping

optuna = pytest.importorskip("optuna", reason="srwm-rl tune needs optuna")
from srwm_rl.scripts.evaluation.protocol import EvalConfig  # noqa: E402
from srwm_rl.scripts.evaluation.runner import evaluate  # noqa: E402
from srwm_rl.scripts.tuning.search import Search, score  # noqa: E402
from srwm_rl.storage.run_group import GroupRecord, RunGroup  # noqa: E402

FIXED = "n_envs: 4\nn_steps: 32\ncore_kwargs: {hidden_size: 8}\n"
SPACE = "learning_rate: {low: 1e-3, high: 1e-2, log: true}\nn_minibatches: [1, 2]\ncore_kwargs.n_heads: [2, 4]\n"


def _arguments(folder: Path, trials: int) -> list[str]:
    (folder / "fixed.yml").write_text(FIXED)
    (folder / "space.yml").write_text(SPACE)
    files = ["--config", str(folder / "fixed.yml"), "--space", str(folder / "space.yml"), "-f", str(folder / "tune")]
    sizes = ["-n", "512", "--seeds", "7:9", "--levels", "2000000:2000020", "--trials", str(trials), "--jobs", "1"]
    return ["tune", "--env", "recall", *sizes, *files]


def _study(folder: Path) -> "optuna.Study":
    return optuna.load_study(study_name="recall_srwm_ppo", storage=f"sqlite:///{folder / 'study.db'}")


def _start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "srwm_rl", *arguments], stdout=subprocess.PIPE, text=True)


def _first_trial(folder: Path, core: str, space: Space, *core_kwargs: str) -> dict[str, object]:
    """Return what the first trial of a search will have."""
    default = replace(defaults("recall", None, core), core_kwargs=core_kwargs)
    search = SearchSettings("recall", core, "ppo", 512, "7", "2000000:2000020", {}, space_to_mapping(space), True)
    study = optuna.create_study()
    Search(folder, study, search, space, default)
    (trial,) = study.get_trials()
    values: dict[str, object] = trial.system_attrs["fixed_params"]
    return values


def test_the_first_trial_has_what_the_core_itself_has(tmp_path: Path) -> None:
    assert _first_trial(tmp_path, "lstm", {"core_kwargs.hidden_size": (128, 256)}) == {"core_kwargs.hidden_size": 256}
    query: Space = {"core_kwargs.query_init": (0.01, 1.0)}
    assert _first_trial(tmp_path, "srwm", query) == {"core_kwargs.query_init": 0.01}
    assert _first_trial(tmp_path, "delta", query) == {"core_kwargs.query_init": 1.0}
    assert _first_trial(tmp_path, "srwm", query, "variant:paper") == {}  # which has settings of its own


@pytest.mark.parametrize(
    ("second", "is_hopeless"), [(0.9, False), (0.5, False), (0.1, True)]
)  # the median of the others is .3
def test_a_trial_is_hopeless_if_any_of_its_runs_is_below_the_median(
    second: float, is_hopeless: bool, tmp_path: Path
) -> None:
    settings = SearchSettings("recall", "srwm", "ppo", 800, "7:9", "2000000:2000020", {}, {}, True)
    study = optuna.create_study(direction="maximize")
    rungs = [100 * part for part in range(9)]  # steps of eight comparisons per run
    finished = [0.1, 0.2, 0.3, 0.4, 0.9]
    for value in finished[:-1]:
        _finish(study, value)
    folder = tmp_path / "trial"
    group = RunGroup.create(folder / "ppo_srwm" / "recall", GroupRecord([7, 8], ["train"], 1))
    for seed, value in ((7, 0.8), (8, second)):
        group.run_path(seed).mkdir(parents=True)
        rows = [{"step": step, "rollout/ep_rew_mean": value} for step in rungs]
        (group.run_path(seed) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    search = Search(tmp_path, study, settings, {}, defaults("recall", None, "srwm"))
    assert not search._is_hopeless(folder, study.ask(), set())  # four have ended: too few to compare with
    _finish(study, finished[-1])
    trial = study.ask()
    assert search._is_hopeless(folder, trial, set()) == is_hopeless
    reported = study.get_trials()[trial.number].intermediate_values
    assert reported[1] == 0.8
    assert reported[9] == second  # the first of the second run


def _finish(study: "optuna.Study", value: float) -> None:
    values = {index: value for index in range(1, 17)}
    study.add_trial(optuna.trial.create_trial(value=value, intermediate_values=values))


def test_few_shot_learning_is_searched_by_right_answers(capsys: pytest.CaptureFixture[str]) -> None:
    for options, setting in (((), "warmup_updates"), (("--algo", "ppo"), "gae_lambda")):
        assert main(["tune", "--env", "fewshot", *options, "--print-space"]) == 0
        assert setting in capsys.readouterr().out


def test_where_a_games_range_is_unknown_the_return_counts() -> None:
    row = {"return": {"mean": 2.0}, "normalized": None}
    assert score([row]) == score([row, row, row]) == 2.0
    assert score([{**row, "normalized": 0.5}]) == 2.0  # of one game


@pytest.mark.heavy
def test_of_several_games_the_normalised_score_counts(tmp_path: Path) -> None:
    network = ["--core-kwargs", "hidden_size:8", "n_layers:1", "--encoder-kwargs", 'cnn:{"channels":[4]}']
    sizes = ["-n", "32", "--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1"]
    assert main(["train", "--env", "maze,coinrun", "--levels", "0:9", *sizes, *network, "-f", str(tmp_path)]) == 0
    (run,) = (path.parent for path in tmp_path.glob("*/*/config.json"))
    rows = evaluate(EvalConfig(run=str(run), train_levels="none", eval_levels=("20:24",), progress=False, verbose=0))[
        "rows"
    ]
    returns = [row["return"]["mean"] for row in rows]
    assert score(rows) == pytest.approx((np.mean(returns[1:]) - 5) / 5)  # chance is at 5 in both games, the best 10


@pytest.mark.heavy
def test_a_search_ends_with_settings_that_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_arguments(tmp_path, 2), "--no-prune"]) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "tune" / "recall_srwm_ppo_1"
    trials = _study(folder).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(len(trial.user_attrs["scores"]) == 2 for trial in trials)
    assert "trial 0: " in output
    assert f"srwm-rl train --config {folder / 'best.yml'}" in output
    best = read_config_file(str(folder / "best.yml"))
    assert best["learning_rate"] == _study(folder).best_trial.params["learning_rate"]
    assert (best["env"], best["n_envs"], best["n_timesteps"]) == ("recall", 4, 512)
    assert "hidden_size:8" in best["core_kwargs"]
    page = (folder / "tune.html").read_text()
    assert "<svg" in page
    assert "srwm-rl tune --env recall" in page
    assert main(["train", "--config", str(folder / "best.yml"), "--dry-run"]) == 0
    assert main(["tune", "--resume", str(folder), "--trials", "2"]) == 0  # has them already
    assert len(_study(folder).get_trials()) == 2


@pytest.mark.heavy
def test_a_killed_search_continues_as_if_it_was_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert main([*_arguments(tmp_path / "a", 2), "--no-prune"]) == 0
    process = _start([*_arguments(tmp_path / "b", 2), "--no-prune"])
    folder = tmp_path / "b" / "tune" / "recall_srwm_ppo_1"
    _wait_for_a_row(folder / "trials" / "trial_0000")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_free(folder / "trials" / "trial_0000" / "lock")  # the orphan trains its runs to their end
    assert main(["tune", "--resume", str(folder)]) == 0
    expected, continued = (_study(of).get_trials() for of in (tmp_path / "a" / "tune" / folder.name, folder))
    assert [trial.params for trial in continued] == [trial.params for trial in expected]
    assert [trial.user_attrs["scores"] for trial in continued] == [trial.user_attrs["scores"] for trial in expected]


@pytest.mark.heavy
@pytest.mark.usefixtures("_stop_signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_continue(stop: signal.Signals, tmp_path: Path) -> None:
    arguments = [*_arguments(tmp_path, 1), "--no-prune"]
    arguments[arguments.index("512")] = "200000"
    process = subprocess.Popen([sys.executable, "-m", "srwm_rl", *arguments], stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "tune" / "recall_srwm_ppo_1"
    _wait_for_a_row(folder / "trials" / "trial_0000")
    process.send_signal(stop)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert f"stopped by {stop.name}. Continue with: srwm-rl tune --resume {folder}" in error
    assert list((folder / "trials" / "trial_0000").glob("*/*/seed_7/checkpoints/checkpoint-*"))
    assert _study(folder).get_trials()[0].state.name == "RUNNING"


@pytest.mark.heavy
def test_two_processes_share_a_search(tmp_path: Path) -> None:
    first = _start([*_arguments(tmp_path, 3), "--no-prune"])
    folder = tmp_path / "tune" / "recall_srwm_ppo_1"
    _wait_until((folder / "trials" / "trial_0000").exists)
    second = _start(["tune", "--resume", str(folder)])
    assert [process.wait(600) for process in (first, second)] == [0, 0]
    trials = _study(folder).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert len(list((folder / "trials").iterdir())) == 3


def _wait_for_a_row(trial: Path) -> None:
    """Wait until the trial's first run has learned: before that a stopped run keeps nothing."""
    _wait_until(lambda: any(path.stat().st_size for path in trial.glob("*/*/seed_7/metrics.jsonl")))


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 600  # a hang, not a loaded machine
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _wait_until_free(lock: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_refused_settings_end_the_search_with_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _arguments(tmp_path, 5)
    (tmp_path / "space.yml").write_text("core_kwargs.n_heads: [3, 5, 7]\n")
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert "settings of 3 trials in a row were refused: hidden_size 8 is no multiple of n_heads" in output.err
    folder = tmp_path / "tune" / "recall_srwm_ppo_1"
    assert not (folder / "best.yml").exists()
    _check_that_it_keeps_its_settings(folder, capsys)


def test_wrappers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fixed.yml"
    file.write_text("wrapper: [[srwm_rl.envs:OneHotImage]]\n")
    assert main(["tune", "--env", "CartPole-v1", "--config", str(file), "-f", str(tmp_path / "tune")]) == 2
    assert "names wrappers, which trials cannot have" in capsys.readouterr().err
    assert not (tmp_path / "tune").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "name an --env"),
        (("--env", "nowhere"), "nowhere"),
        (("--env", "recall", "--levels", "0:100"), "overlap"),
        (("--env", "recall", "--levels", "1000500:1000600"), "overlap"),
        (("--env", "recall", "--seeds", "3:3"), "--seeds"),
        (("--env", "recall", "--trials", "0"), "--trials"),
        (("--env", "recall", "--storage", "nonsense"), "--storage nonsense cannot be used"),
        (("--resume", "FOLDER"), "no folder of a search"),
    ],
)
def test_wrong_input_is_refused(
    tmp_path: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path) if word == "FOLDER" else word for word in argv]
    assert main(["tune", *words, *([] if "--resume" in words else ["-f", str(tmp_path / "tune")])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def _check_that_it_keeps_its_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["-n", "9"], ["--no-prune"], ["--storage", "sqlite:///x.db"], ["--env", "bandit"]):
        assert main(["tune", "--resume", str(folder), *option]) == 2
    errors = capsys.readouterr().err.splitlines()
    wanted = ("--n-timesteps", "--prune", "--storage", "--env")
    assert all(words in line for words, line in zip(wanted, errors, strict=True)), errors
    record = json.loads((folder / "tune.json").read_text())
    (folder / "tune.json").write_text(json.dumps({**record, "trials": "many"}))
    assert main(["tune", "--resume", str(folder)]) == 2
    assert "tune.json is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("SRWM_RL_POSTGRES" not in os.environ, reason="SRWM_RL_POSTGRES names no database")
def test_two_processes_share_a_postgresql_database(tmp_path: Path) -> None:
    storage = ["--storage", os.environ["SRWM_RL_POSTGRES"], "--study-name", f"test_{time.time_ns()}", "--no-prune"]
    processes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        processes.append(_start([*_arguments(tmp_path / name, 4), *storage]))
    assert [process.wait(600) for process in processes] == [0, 0]
    study = optuna.load_study(study_name=storage[3], storage=storage[1])
    assert sum(trial.state.name == "COMPLETE" for trial in study.get_trials()) in (4, 5)
