"""GPU code on simulated CUDA devices, in subprocesses: the devices must exist before torch is imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TWO_GPUS = "tests/scripts/training/test_launch_gpu.py"
NEEDS = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has real CUDA"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library overrides symbols as on Linux"),
]
pytestmark = NEEDS


def run_pytest(*arguments: str) -> str:
    """Run pytest on simulated CUDA and return its output."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.simulated_cuda.plugin", "-p", "no:cacheprovider", "-rs"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=env, timeout=1700, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "SKIPPED" not in result.stdout, result.stdout[-2000:]
    return result.stdout


def test_hazards_are_found_and_the_commands_have_none() -> None:
    run_pytest("tests/simulated_cuda/checks.py")


def test_tests_marked_gpu_pass() -> None:
    # Without Triton's kernels, which run in its interpreter.
    others = ("tests/srwm_rl/ops/test_triton*.py", TWO_GPUS)
    run_pytest("-m", "gpu", "tests", *(f"--ignore-glob={path}" for path in others))


def test_two_processes_with_a_gpu_each() -> None:
    run_pytest(TWO_GPUS)
