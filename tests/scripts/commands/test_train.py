"""`srwm-rl train`: run folders, exact resumes after signals, and errors that leave no files."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.envs.procgen.games import GAMES
from srwm_rl.envs.procgen.simulator import installed_distribution
from srwm_rl.scripts.main import main
from srwm_rl.scripts.training import train
from srwm_rl.scripts.training.checkpoints import Session
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file

Start = Callable[..., Any]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def assert_same_end(run: Path, reference: Path) -> None:
    """Check that two runs ended with equal checkpoints, models, best models and logs."""
    for kind in ("checkpoint", "model"):
        ours, theirs = (Run.open(path).files(kind)[-1] for path in (run, reference))
        assert ours.name == theirs.name
        (arrays, meta), (expected, expected_meta) = read_file(ours), read_file(theirs)
        assert arrays.keys() == expected.keys()
        assert arrays, "nothing was compared"
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
        if kind == "checkpoint":
            assert meta["state"]["counters"] == expected_meta["state"]["counters"]
            assert meta["state"]["best"] == expected_meta["state"]["best"]
    best, wanted = (Run.open(path).files("best")[-1:] for path in (run, reference))
    assert [file.name for file in best] == [file.name for file in wanted]
    for file, same in zip(best, wanted, strict=True):
        arrays, expected = read_file(file)[0], read_file(same)[0]
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    assert metrics(run) == metrics(reference)
    assert metrics(run), "nothing was compared"


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    """Wait until a condition holds; fail if the process ends before."""
    deadline = time.monotonic() + 600  # a hang, not a loaded machine
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the process made no progress"
        time.sleep(0.005)


def updates(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(("name", "algo"), [("SIGINT", "ppo"), ("SIGTERM", "ppo"), ("SIGTERM", "impala")])
def test_interrupted_and_resumed_is_as_if_never_interrupted(
    name: str, algo: str, start: Start, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    tiny = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    argv = ["train", *(word if word != "none" else "linear" for word in tiny), "-n", 64 * 60]
    process = start(*argv, "-f", tmp_path / "cut")
    run = tmp_path / "cut" / f"{algo}_srwm" / "recall_1"
    wait_until(lambda: updates(run) >= 3, process)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert f"stopped by {name}; saved at " in err
    assert err.rstrip().endswith(f"srwm-rl train --resume {run}")
    assert err.count("\n") == 1
    assert 0 < int(err.partition("saved at ")[2].split()[0]) < 64 * 60
    assert call("train", "--resume", run).code == 0
    assert call(*argv, "-f", tmp_path / "whole").code == 0
    assert_same_end(run, tmp_path / "whole" / f"{algo}_srwm" / "recall_1")


@pytest.mark.usefixtures("_stop_signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_again_while_the_run_is_saved_does_not_end_it(
    name: str, call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when a supervisor passes on what its trainer got as well.
    save, handler, signals = Session.save, signal.getsignal(signal.Signals[name]), []

    def save_and_stop(*args: Any) -> None:
        signals.append(name)
        signal.raise_signal(signal.Signals[name])
        save(*args)

    monkeypatch.setattr(Session, "save", save_and_stop)
    result = call("train", *recall_argv, "-n", 640, "--save-freq", 64, "-f", tmp_path)
    assert result.code == 130
    assert f"stopped by {name}; saved at 64 steps" in result.err
    assert len(signals) == 2
    assert signal.getsignal(signal.Signals[name]) == handler


def test_an_overlapped_run_warns_that_it_is_not_exact(
    start: Start, call: Any, impala_argv: list[str], tmp_path: Path
) -> None:
    process = start("train", *impala_argv, "-n", 64 * 10_000, "-f", tmp_path)
    run = tmp_path / "impala_srwm" / "recall_1"
    wait_until(lambda: updates(run) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    steps = int(err.partition("saved at ")[2].split()[0])
    result = call("train", "--resume", run, "-n", steps + 128)
    assert result.code == 0
    assert "not exactly as if never stopped (--synchronous is)" in result.err
    assert metrics(run)[-1]["step"] == steps + 128


def test_killed_and_resumed_is_as_if_never_killed(
    start: Start, call: Any, procgen_argv: list[str], tmp_path: Path
) -> None:
    argv = ["train", "--env", "coinrun,starpilot", *procgen_argv, "-n", 64 * 14, "--save-freq", 128]
    process = start(*argv, "-f", tmp_path / "cut")
    run = tmp_path / "cut" / "ppo_srwm" / "coinrun+starpilot_1"
    wait_until(lambda: len(list(run.glob("checkpoints/model-*"))) >= 2, process)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    saved = Run.open(run).files("checkpoint")
    assert int(saved[-1].stem.rpartition("-")[2]) < 64 * 14
    assert call("train", "--resume", run).code == 0
    assert call(*argv, "-f", tmp_path / "whole").code == 0
    assert_same_end(run, tmp_path / "whole" / "ppo_srwm" / "coinrun+starpilot_1")


def test_stopped_before_it_began_leaves_no_run(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    def stop(*args: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_prepare", stop)
        result = call("train", *recall_argv, "-n", 64, "-f", tmp_path / "logs")
    assert result.code == 130
    assert "nothing is kept" in result.err
    assert not list((tmp_path / "logs").rglob("recall_*"))


def test_plan_folder_and_result_are_printed(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    result = call("train", *recall_argv, "-n", 64, "-f", tmp_path)
    run = tmp_path / "ppo_srwm" / "recall_1"
    assert result.code == 0
    assert result.err == ""
    for part in ("core srwm hidden_size:16", "parameters", "0:12 for training, 100:108 held out", "cpu", str(run)):
        assert part in result.out
    assert result.out.rstrip().endswith(f"srwm-rl eval {run}")
    settings = json.loads((run / "config.json").read_text())
    assert settings["train"]["env"] == "recall"
    assert settings["train"]["n_timesteps"] == 64
    assert settings["versions"].keys() >= {"python", "torch", "srwm-rl"}
    assert list(run.glob("tensorboard/events*"))
    assert [path.name for path in Run.open(run).files("model")] == ["model-000000000064.safetensors"]


def test_plan_and_settings_name_the_package_of_procgen(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    distribution = installed_distribution()
    result = call("train", "--env", "maze", *procgen_argv, "-n", 64, "-f", tmp_path)
    assert result.code == 0, result
    assert f"mode easy of {distribution}\n" in result.out
    settings = json.loads((tmp_path / "ppo_srwm" / "maze_1" / "config.json").read_text())
    assert settings["versions"][distribution.name] == distribution.version


def test_progress_goes_to_stderr(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    argv = [word for word in recall_argv if word != "--no-progress"]
    result = call("train", *argv, "-n", 64, "-f", tmp_path, "--verbose", 0)
    assert result.out == ""
    assert "step/s" in result.err


def test_n_is_rounded_up_to_whole_rollouts_in_the_plan_and_the_progress_bar(
    call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    argv = [word for word in recall_argv if word != "--no-progress"]
    result = call("train", *argv, "-n", 100, "-f", tmp_path)
    assert result.code == 0
    assert "training recall for 128 steps (-n 100 in whole rollouts): ppo" in result.out
    assert "updates   2 of 4 environments x 16 steps" in result.out
    assert "done: 128 steps" in result.out
    assert "128/128" in result.err
    run = tmp_path / "ppo_srwm" / "recall_1"
    assert "has its 128 steps already" in call("train", "--resume", run).error()
    result = call("train", "--resume", run, "-n", 192)
    assert "resuming recall from 128 to 192 steps: ppo" in result.out
    assert "192/192" in result.err
    assert "done: 192 steps" in result.out


def test_a_run_folder_is_never_reused(call: Any, recall_argv: list[str], tmp_path: Path, snapshot: Any) -> None:
    argv = ["train", *recall_argv, "-n", 64, "-f", tmp_path]
    assert call(*argv).code == 0
    first = snapshot(tmp_path / "ppo_srwm" / "recall_1")
    assert call(*argv).code == 0
    assert snapshot(tmp_path / "ppo_srwm" / "recall_1") == first
    assert (tmp_path / "ppo_srwm" / "recall_2" / "config.json").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(call: Any, recall_argv: list[str], untouched: Path) -> None:
    for verbose in (0, 1):
        result = call("train", *recall_argv, "-f", untouched, "--dry-run", "--verbose", verbose)
        assert result.code == 0
        assert "parameters" in result.out


def test_env_list(call: Any) -> None:
    out = call("train", "--env-list").out
    for name in ("coinrun", "paper6", "recall", "bandit", "CartPole-v1"):
        assert name in out
    assert "  bigfish: up 7.91 (s.e. 0.75), random 0.90\n" in out
    assert all(f"  {game}: " in out for game in GAMES)


@pytest.mark.parametrize(
    "argv",
    [
        ["--core", "lstm"],
        ["--core", "feedforward"],
        ["--env", "Pendulum-v1"],
        ["--env", "CartPole-v1", "--inputs", "--normalize-reward"],
        ["--env", "FrozenLake-v1", "--inputs", "reward"],
    ],
)
def test_other_cores_actions_and_inputs_train(argv: list[str], call: Any, tmp_path: Path) -> None:
    env = [] if "--env" in argv else ["--env", "recall"]
    small = ["--n-envs", 2, "--n-steps", 16, "--batch-size", 32, "--n-epochs", 1, "--n-threads", 1, "--no-progress"]
    result = call("train", *env, *argv, *small, "-n", 64, "-f", tmp_path)
    assert result.code == 0, result
    (run,) = tmp_path.glob("*/*_1")
    assert call("train", "--resume", run, "-n", 96, "--no-progress").code == 0


def test_a_finished_run_is_extended(call: Any, recall: Path, recall_argv: list[str], tmp_path: Path) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in Run.open(run).files("checkpoint")}
    assert "has its 256 steps already; give more with -n" in call("train", "--resume", run).error()
    assert call("train", "--resume", run, "-n", 384).code == 0
    assert Run.open(run).config["train"]["n_timesteps"] == 384
    assert call("train", *recall_argv, "-n", 384, "-f", tmp_path / "whole").code == 0
    assert_same_end(run, tmp_path / "whole" / "ppo_srwm" / "recall_1")
    assert len(metrics(run)) == 6
    assert before.keys() != {path.name for path in Run.open(run).files("checkpoint")}


def test_an_interrupted_extension_resumes_without_flags(
    call: Any, recall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    signals = iter([True])
    save = Session.save

    def save_and_stop(*args: Any) -> None:
        save(*args)
        if next(signals, False):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "save", save_and_stop)
    result = call("train", "--resume", run, "-n", 512)
    assert result.code == 130
    assert int(Run.open(run).files("checkpoint")[-1].stem[-12:]) < 512
    assert call("train", "--resume", run).code == 0
    assert len(metrics(run)) == 8
    assert Run.open(run).files("model")[-1].stem.endswith("512")


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_skipped(damage: str, call: Any, recall: Path, tmp_path: Path) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    newest = Run.open(run).files("checkpoint")[-1]
    content = newest.read_bytes()
    if damage == "foreign":
        write_file(newest, {"a": np.zeros(3)}, {"kind": "model", "format": 1})
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        newest.write_bytes({"truncated": content[:middle], "empty": b"", "flipped": flipped}[damage])
    result = call("train", "--resume", run)
    assert result.code == 0
    assert result.err.startswith("srwm-rl: 1 newer checkpoint(s) cannot be used")
    assert result.err.rstrip().endswith("resuming from checkpoint-000000000192.safetensors")
    assert result.err.count("\n") == 1
    assert_same_end(run, recall)


def test_no_intact_checkpoint(call: Any, recall: Path, tmp_path: Path, snapshot: Any) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    for path in Run.open(run).files("checkpoint"):
        path.write_bytes(path.read_bytes()[:1000])
    before = snapshot(run)
    assert "no intact checkpoint to resume from" in call("train", "--resume", run, "-n", 512).error()
    assert snapshot(run) == before


def edit(run: Path, **settings: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    config["train"].update(settings)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"core": "lstm"}, "is of another architecture"),
        ({"core_kwargs": ["hidden_size:24", "n_layers:1"]}, "is of another architecture"),
        ({"env": "bandit"}, "is of another architecture"),
        ({"n_envs": 2}, "use the same environments and n_envs"),
        ({"n_envs": "4"}, "settings are damaged: n_envs: Expected `int`, got `str`"),
        ({"colour": "red"}, "unknown name 'colour'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    settings: dict[str, Any], part: str, call: Any, recall: Path, tmp_path: Path, snapshot: Any
) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    edit(run, **settings)
    before = snapshot(run)
    assert part in call("train", "--resume", run, "-n", 512).error()
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--seed", "1"], "leave out --seed (the run has 0)"),
        (["--core", "lstm"], "leave out --core (the run has 'srwm')"),
        (["--env", "coinrun"], "leave out --env (the run has 'recall')"),
        (["--n-envs", "8"], "leave out --n-envs (the run has 4)"),
        (["--core-kwargs", "n_layers:2"], "leave out --core-kwargs"),
        (["-n", "100"], "has its 256 steps already"),
        (["--n-evs", "8"], "did you mean '--n-envs'"),
    ],
)
def test_a_resumed_run_keeps_its_settings(argv: list[str], part: str, call: Any, recall: Path, snapshot: Any) -> None:
    before = snapshot(recall)
    assert part in call("train", "--resume", recall, *argv).error()
    assert snapshot(recall) == before


def test_a_resumed_run_accepts_the_core_settings_that_it_has(call: Any, recall: Path) -> None:
    result = call("train", "--resume", recall, "-n", 512, "--core-kwargs", "hidden_size:16", "--dry-run")
    assert result.code == 0
    assert "core srwm hidden_size:16 n_layers:1 n_heads:2 key_init:2 edit_lr_multiplier:3" in result.out


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "foreign", "list"])
def test_no_run_folder(kind: str, call: Any, tmp_path: Path, snapshot: Any) -> None:
    run = tmp_path / "run"
    if kind != "missing":
        run.mkdir()
    if kind in ("text", "foreign", "list"):
        (run / "config.json").write_text({"text": "{", "foreign": "{}", "list": '{"train": []}'}[kind])
    before = snapshot(tmp_path)
    for command in ("train", "eval"):
        argv = ["train", "--resume", run] if command == "train" else ["eval", run]
        message = call(*argv).error()
        assert str(run) in message or (kind == "list" and "settings are damaged" in message)
    assert snapshot(tmp_path) == before


REFUSED = [
    (["--env", "coinrum"], "did you mean 'coinrun'?"),
    (["--env", "coinrun,mze"], "did you mean 'maze'?"),
    (["--core", "srwmm"], "did you mean 'srwm'?"),
    (["--preset", "quikstart"], "did you mean 'quickstart'?"),
    (["--levels", "5:5"], "hold no level"),
    (["--levels", "9:3"], "hold no level"),
    (["--levels", "-3:5"], "cannot be negative"),
    (["--levels", "5"], "not of the form 'start:stop'"),
    (["--levels", "0:200", "--eval-levels", "100:300"], "overlap in 100 levels"),
    (["--env", "recall", "--batch-size", "16"], "batch_size 16 holds no whole sequence of 64 steps"),
    (["--env", "recall", "--sequence-length", "7"], "sequence_length 7 must divide n_steps 64"),
    (["--env", "recall", "--core-kwargs", "hidden_sise:8"], "did you mean 'hidden_size'?"),
    (["--env", "recall", "--core-kwargs", "hidden_size:x"], "hidden_size must be a whole number"),
    (["--env", "recall", "--env-kwargs", "n_symbol:8"], "did you mean 'n_symbols'?"),
    (["--env", "coinrun", "--mode", "memory"], "coinrun has no memory mode"),
    (["--env", "coinrun", "--mode", "esy"], "did you mean 'easy'?"),
    (["--env", "recall", "--mode", "hard"], "recall has no modes"),
    (["--env", "coinrun,maze", "--n-envs", "3"], "must be a multiple of the 2 games, such as 4"),
    (["--env", "recall", "--device", "gpu"], "there is no device 'gpu'"),
    (["--env", "recall", "--device", "cuda:99"], "--device cuda:99"),
]


@pytest.mark.parametrize(("argv", "part"), REFUSED)
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(
    argv: list[str], part: str, call: Any, untouched: Path
) -> None:
    result = call("train", *argv, "-n", 64, "-f", untouched, "--no-progress")
    assert part in result.error()
    assert result.out == ""


def test_cuda_without_a_gpu_is_refused(call: Any, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call("train", "--env", "recall", "--device", "cuda", "-n", 64, "-f", untouched)
    assert "torch finds no GPU here; use --device cpu" in result.error()


def test_a_folder_that_cannot_be_made(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    result = call("train", *recall_argv, "-n", 64, "-f", tmp_path / "file")
    assert "choose another with -f" in result.error()
    assert (tmp_path / "file").read_text() == "keep me"


def test_main_is_what_the_entry_point_calls(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env-list", "--env", "recall"]) == 0
    assert "recall" in capfd.readouterr().out
