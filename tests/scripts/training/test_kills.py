"""Training killed at random moments, half of them inside a save: at most one checkpoint interval is lost."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.storage.safe_file import TEMPORARY
from tests.scripts.commands.test_train import assert_same_end

KILLS = int(os.environ.get("SRWM_RL_KILLS", "200"))
STEPS = 64  # per update, and between checkpoints


def newest(run: Path) -> int:
    saved = sorted((run / "checkpoints").glob("checkpoint-*"))
    return int(saved[-1].stem.rpartition("-")[2]) if saved else 0


def saving(run: Path) -> bool:
    return any(name.startswith(TEMPORARY) for name in os.listdir(run / "checkpoints"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_killed_at_random_moments_no_run_and_at_most_one_interval_is_lost(
    algo: str, start: Any, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    rng = random.Random(0)
    tiny = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    kills = KILLS // 2
    argv = ["train", *tiny, "--save-freq", "1", "-n", 10**8]
    run = tmp_path / "cut" / f"{algo}_srwm" / "recall_1"
    process = start(*argv, "-f", tmp_path / "cut")
    inside = 0
    for kill in range(kills):
        before = newest(run)
        deadline = time.monotonic() + 600  # a hang, not a loaded machine
        while newest(run) < before + 2 * STEPS:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if kill % 2:
            while not saving(run):
                assert process.poll() is None, process.communicate()
            inside += 1
        else:
            time.sleep(rng.uniform(0, 0.1))
        seen = newest(run)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=600)
        assert newest(run) >= seen - STEPS
        process = start("train", "--resume", run, "--no-progress")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert inside == kills // 2
    steps = newest(run) + 4 * STEPS
    assert call("train", "--resume", run, "-n", steps, "--no-progress").code == 0
    assert call("train", *argv[1:-1], steps, "-f", tmp_path / "whole").code == 0
    assert_same_end(run, tmp_path / "whole" / f"{algo}_srwm" / "recall_1")
    assert not saving(run)
