"""What runs on a GPU, run on one that is none, in a process of its own: torch must find it when it is loaded."""

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
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its way into torch is Linux's"),
    pytest.mark.timeout(900),
]
pytestmark = NEEDS


def on_it(*arguments: str) -> str:
    """Run pytest where there is a pretended GPU, and return what it says at the end."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.pretended_gpu.plugin", "-p", "no:cacheprovider", "-rs"]
    env = {key: each for key, each in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "SKIPPED" not in result.stdout, result.stdout[-2000:]
    return result.stdout


def test_it_finds_what_it_is_there_for_and_this_projects_commands_leave_it_nothing_to_find() -> None:
    on_it("tests/pretended_gpu/checks.py")


def test_what_is_marked_as_a_gpus() -> None:
    # But Triton's kernels, for which a machine without a GPU has an interpreter: test_triton.py.
    on_it("-m", "gpu", "tests", "--ignore", "tests/srwm_rl/ops/test_triton.py")
