"""GPU code on simulated CUDA devices, in subprocesses: the devices must exist before torch is imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has real CUDA"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library overrides symbols as on Linux"),
    pytest.mark.timeout(900),
]
pytestmark = NEEDS


def run_pytest(*arguments: str) -> str:
    """Run pytest on simulated CUDA and return its output."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.simulated_cuda.plugin", "-p", "no:cacheprovider", "-rs"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=env, timeout=800, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "SKIPPED" not in result.stdout, result.stdout[-2000:]
    return result.stdout


def test_hazards_are_found_and_the_commands_have_none() -> None:
    run_pytest("tests/simulated_cuda/checks.py")


def test_tests_marked_gpu_pass() -> None:
    # Without Triton's kernels, which run in its interpreter.
    run_pytest("-m", "gpu", "tests", "--ignore-glob", "tests/srwm_rl/ops/test_triton*.py")


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_two_processes_with_a_gpu_each(algo: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["train", "--env", "recall", "--algo", algo, "-n", "8192", "--no-progress", "-f", str(tmp_path)]
    command = [*torchrun, "-m", "tests.simulated_cuda.run", *train, "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "2 processes, 32 environments each" in result.stdout
    assert "done: 8192 steps" in result.stdout
    assert "CUDA graph" not in result.stdout + result.stderr
    metrics = next(tmp_path.glob("*/recall_1/metrics.jsonl")).read_text().splitlines()
    assert "train/loss" in json.loads(metrics[-1])
