"""`torchrun ... -m srwm_rl train`: one output and one run folder, exact resumes, and interruptions of every kind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import TensorBoardOutputFormat

from srwm_rl import UserError
from srwm_rl.agents.distributed import RankInfo
from srwm_rl.scripts.commands import train
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import make_env, make_model, shard_config
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file
from tests.scripts.commands.test_train import assert_same_end, metrics, updates, wait_until

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "srwm_rl")
TINY = [
    "--env",
    "recall",
    "--levels",
    "0:1000000",
    "--eval-levels",
    "1000000:1000008",
    "--n-steps",
    "16",
    "--n-threads",
    "1",
]
TINY += ["--no-progress", "--core-kwargs", "hidden_size:16", "n_layers:1"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def torchrun() -> Iterator[Start]:
    """Return a function that starts the command line in two processes, which end with the test."""
    started = []

    def run(*argv: object) -> "subprocess.Popen[str]":
        command = [*TORCHRUN, *map(str, argv)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.terminate()  # SIGKILL would leave its child processes
        process.communicate(timeout=600)


def end_of(process: Any) -> tuple[int, str, list[str]]:
    """Return the exit code, stdout, and our own lines of stderr."""
    out, err = process.communicate(timeout=600)
    print(err, file=sys.stderr)  # shown if the test fails
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("srwm-rl: ")]


def ranks(torchrun: Any) -> dict[int, int]:
    """Return the process ids of torchrun's workers, by rank."""
    pids = {}
    for task in Path(f"/proc/{torchrun.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if line.startswith(b"RANK="):
                    pids[int(line[5:])] = int(pid)
    return pids


def rewind(run: Path, to: Path) -> Path:
    """Copy a run without its newest checkpoint and model."""
    copy = Path(shutil.copytree(run, to / "rewound"))
    for kind in ("checkpoint", "model"):
        Run.open(copy).files(kind)[-1].unlink()
    return copy


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_two_processes_write_one_run_and_resume_it_exactly(algo: str, torchrun: Start, tmp_path: Path) -> None:
    # IMPALA's batches do not divide a rollout: unrolls of both processes wait when a checkpoint is taken.
    batch = ["--batch-size", "96", "--algo", "impala", "--synchronous", "--n-groups", "1"]
    argv = [*TINY, "--n-envs", "8", *(batch if algo == "impala" else ["--batch-size", "64", "--n-epochs", "2"])]
    argv += ["--eval-freq", "256", "--eval-episodes", "5"]
    code, out, err = end_of(torchrun("train", *argv, "-n", 512, "--save-freq", 1, "-f", tmp_path / "logs"))
    assert code == 0, err
    assert err == []
    assert out.count("2 processes, 4 environments each") == out.count("\ndone: 512 steps") == 1
    (run,) = (tmp_path / "logs" / f"{algo}_srwm").iterdir()
    assert json.loads((run / "config.json").read_text())["processes"] == 2
    assert len(list((run / "tensorboard").iterdir())) == 1
    lines = metrics(run)
    assert [line["step"] for line in lines] == [128, 256, 384, 512]
    assert [step for step, line in zip((128, 256, 384, 512), lines, strict=True) if "eval/gap" in line] == [256, 512]

    newest = Run.open(run).files("checkpoint")[-1]
    arrays, meta = read_file(newest)
    state = unpack(arrays, meta["state"])
    (part_1,) = state["processes"]
    assert len(state["episode_starts"]) == len(part_1["episode_starts"]) == 4
    assert pack(state["environments"])[1] is not None
    assert not np.array_equal(state["core_state"], part_1["core_state"]), "both play the same"
    assert not np.array_equal(state["generators"]["torch"], part_1["generators"]["torch"])
    if algo == "impala":
        waiting = [sum(len(unrolls["versions"]) for unrolls in part["extra"]["unrolls"]) for part in (state, part_1)]
        assert waiting == [16 % 3] * 2
    else:  # the window of episodes holds those of both, and all of them: 512 steps are about 55 episodes
        played = 512 / np.mean([episode["l"] for episode in state["episodes"]])
        assert 1.1 * played > len(state["episodes"]) > 0.75 * played
        levels = np.unpackbits(state["levels_played"]["games"]["recall"]["map"]).sum()  # hardly any is repeated
        assert levels > 0.75 * played

    copy = rewind(run, tmp_path)
    code, _, err = end_of(torchrun("train", "--resume", copy, "--no-progress"))
    assert code == 0, err
    assert err == []
    assert_same_end(copy, run)


def test_stopped_in_two_processes_and_resumed_in_one(
    torchrun: Start, call: Any, impala_argv: list[str], tmp_path: Path
) -> None:
    process = torchrun("train", *impala_argv, "-n", 10**7, "-f", tmp_path)
    run = tmp_path / "impala_srwm" / "recall_1"
    wait_until(lambda: updates(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, _, (line,) = end_of(process)
    assert code != 0
    assert "stopped by SIGTERM; saved at " in line
    assert line.endswith(f"Resume with: torchrun --standalone --nproc-per-node 2 -m srwm_rl train --resume {run}")
    steps = int(line.partition("saved at ")[2].split()[0])
    saved, meta = read_file(Run.open(run).files("checkpoint")[-1])
    assert meta["state"]["counters"]["num_timesteps"] == steps

    check_damaged_parts_are_refused(call, run, tmp_path)
    result = call("train", "--resume", run, "-n", steps + 128, "--no-progress")
    assert result.code == 0, result
    warnings = [line for line in result.err.splitlines() if "no longer exact" in line]
    assert warnings == [
        "srwm-rl: the run was trained by 2 process(es) and resumes in 1: weights, optimizer and counters are restored, "
        "the environments are reset; it is no longer exact"
    ]
    after, meta = read_file(Run.open(run).files("checkpoint")[-1])
    assert meta["state"]["counters"]["num_timesteps"] == steps + 128
    assert "processes" not in meta["state"]
    weights = [name for name in after if name.startswith("/policy/")]
    moved = [np.abs(after[name] - saved[name]).max() for name in weights]
    # An update moves a weight by at most 10 learning rates (RMSProp with alpha 0.99): 0.04, and there are four or five.
    assert 0 < max(moved) <= 0.2, "the weights were not restored"


def check_damaged_parts_are_refused(call: Any, run: Path, folder: Path) -> None:
    """Check that a checkpoint with a damaged part of process 1 is refused."""
    name = Run.open(run).files("checkpoint")[-1].name

    def refused(change: Callable[[dict[str, Any]], Any]) -> str:
        copy = Path(shutil.copytree(run, folder / "damaged"))
        for path in Run.open(copy).files("checkpoint"):
            if path.name != name:
                path.unlink()
        arrays, meta = read_file(copy / "checkpoints" / name)
        state = unpack(arrays, meta["state"])
        change(state)
        arrays, meta["state"] = pack(state)
        write_file(copy / "checkpoints" / name, arrays, meta)
        line: str = call("train", "--resume", copy, "-n", 10**7).error()
        shutil.rmtree(copy)
        return line

    def part_1(**changed: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda state: state["processes"][0].update(changed)

    assert "damaged: processes" in refused(lambda state: state.update(processes={}))
    assert "damaged: processes" in refused(lambda state: state["processes"].append("x"))
    assert "not of 4 environments" in refused(lambda state: state["processes"].append(state["processes"][0]))
    assert "not of 4 environments" in refused(part_1(episode_starts=np.ones(4, bool)))
    assert "generators" in refused(part_1(generators={}))
    assert "environments" in refused(part_1(environments=[]))
    assert "core_state" in refused(part_1(core_state=np.zeros((1, 2, 1), np.float32)))
    assert "other observations" in refused(part_1(last_obs={}))
    assert "extra" in refused(part_1(extra=[]))


def test_a_killed_process_ends_the_others_and_the_run_is_saved(
    torchrun: Start, recall_argv: list[str], tmp_path: Path
) -> None:
    process = torchrun("train", *recall_argv, "-n", 10**7, "-f", tmp_path)
    run = tmp_path / "ppo_srwm" / "recall_1"
    wait_until(lambda: updates(run) >= 3, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    code, _, (line,) = end_of(process)
    assert code != 0
    assert "stopped" in line
    saved = Run.open(run).files("checkpoint")[-1]
    assert f"saved at {int(saved.stem.rpartition('-')[2])} steps. Resume with: torchrun" in line
    assert len(read_file(saved)[1]["state"]["processes"]) == 1


def test_a_run_of_one_process_resumes_in_two(torchrun: Start, recall: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    code, out, (line,) = end_of(torchrun("train", "--resume", run, "-n", 384, "--no-progress", "--verbose", 1))
    assert code == 0
    assert "trained by 1 process(es) and resumes in 2" in line
    assert out.count("resuming recall") == 1
    assert metrics(run)[-1]["step"] == 384
    assert len(read_file(Run.open(run).files("checkpoint")[-1])[1]["state"]["processes"]) == 1


def test_an_error_is_printed_once(torchrun: Start, untouched: Path) -> None:
    code, out, err = end_of(torchrun("train", *TINY, "--n-envs", 5, "-f", untouched))
    assert (code, out) == (1, "")
    assert err == ["srwm-rl: error: --n-envs 5 cannot be divided evenly among 2 processes; use a multiple of 2"]


PROCESS_1 = RankInfo(rank=1, size=2, local_rank=1, local_size=2)


def config(**settings: Any) -> TrainConfig:
    small = {"env": "recall", "n_envs": 8, "n_steps": 16, "batch_size": 64, "device": "cpu", "n_threads": 1}
    return TrainConfig(**{**small, "normalize_reward": False, **settings})


def test_environments_and_batch_are_divided() -> None:
    own = shard_config(config(), PROCESS_1)
    assert (own.n_envs, own.batch_size, own.seed != 0) == (4, 32, True)
    assert shard_config(config(), RankInfo()) == config()
    assert shard_config(config(batch_size=79), PROCESS_1).batch_size == 32  # four whole sequences in all
    many = config(n_envs=64, batch_size=1024)
    seeds = {
        shard_config(replace(many, seed=seed), RankInfo(rank, 8, rank, 8)).seed
        for seed in range(8)
        for rank in range(8)
    }
    assert len(seeds) == 64, "two processes of runs with different seeds have the same seed"


def test_the_processes_play_different_levels() -> None:
    levels = []
    for rank in range(2):
        own = shard_config(config(levels="all"), PROCESS_1._replace(rank=rank))
        model = make_model(own, make_env(own))
        assert model.env is not None
        model.env.reset()
        levels.append({int(level) for group in model.env.env_method("level_seed") for level in group})
        model.env.close()
    assert len(levels[0]) == len(levels[1]) == 4
    assert not levels[0] & levels[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_envs": 9}, "--n-envs 9 cannot be divided evenly among 2 processes; use a multiple of 2"),
        ({"env": "coinrun,maze", "n_envs": 6}, "2 processes, 2 games; use a multiple of 4"),
        ({"algo": "impala", "n_groups": 4, "n_envs": 12}, "2 processes and 4 groups each; use a multiple of 8"),
        ({"algo": "ppo", "n_groups": 4, "n_envs": 12}, "2 processes and 4 groups each; use a multiple of 8"),
        ({"batch_size": 48}, "--batch-size 48 holds 3 sequence(s) of 16 steps, which cannot be divided"),
        ({"device": "cuda:1"}, "one device for 2 processes"),
        ({"device": "cuda"}, "torch finds no GPU here"),
    ],
)
def test_settings_that_cannot_be_divided_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        shard_config(config(**settings), PROCESS_1)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["supervise", "verify"])
def test_options_for_one_process_are_refused(
    name: str, call: Any, recall: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "is_distributed", lambda: True)
    monkeypatch.setattr(train, "run_rank", lambda command, argv: command())
    assert f"--{name} is for one process" in call("train", "--resume", recall, f"--{name}").error()


RANK = """
import atexit, os
from srwm_rl.scripts.training.launch import run_rank

class Global:
    def __del__(self):
        print("deleted")

keep = Global()
atexit.register(print, "exit functions")
os.environ.update(RANK="0", WORLD_SIZE="2")
run_rank(lambda: CODE, ["train"])
"""


@pytest.mark.parametrize(("code", "output"), [(0, "exit functions\n"), (3, "")])
def test_a_process_ends_without_the_interpreters_teardown(code: int, output: str) -> None:
    # At interpreter exit, a thread of torch.distributed that releases a tensor aborts the process.
    command = [sys.executable, "-c", RANK.replace("CODE", str(code))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, output, "")


def test_a_log_is_written_whole_before_a_signal_stops_the_run(
    call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An exception within TensorBoard's queue lost the wake-up of its thread, for which `close` then waited.
    write, whole = TensorBoardOutputFormat.write, []

    def interrupted(*args: Any) -> None:
        if not whole:
            signal.raise_signal(signal.SIGTERM)
        write(*args)
        whole.append(args)

    monkeypatch.setattr(TensorBoardOutputFormat, "write", interrupted)
    result = call("train", *recall_argv, "-n", 640, "-f", tmp_path)
    assert result.code == 130
    assert "stopped by SIGTERM; saved at 0 steps" in result.err
    assert len(metrics(tmp_path / "ppo_srwm" / "recall_1")) == 1
    assert len(whole) == 2  # the log, and the settings beside the last return
