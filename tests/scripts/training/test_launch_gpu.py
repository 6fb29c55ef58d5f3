"""`torchrun -m srwm_rl train` with a GPU for each of two processes; on simulated CUDA Gloo replaces NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srwm_rl.nn.cnns import KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROOT = Path(__file__).parents[3]
MODULE = "srwm_rl" if torch.version.cuda is not None else "tests.simulated_cuda.run"
FRAMES = ("--env", "coinrun", "--n-envs", "4", "--n-steps", "16", "--batch-size", "32", "--n-epochs", "1")


def train(*arguments: str) -> str:
    """Train in two processes and return what they print."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", MODULE]
    command = [*torchrun, "train", *arguments, "--no-progress"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert "CUDA graph" not in output  # logged where one is disabled
    return output


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_two_processes_with_a_gpu_each(algo: str, tmp_path: Path) -> None:
    output = train("--env", "recall", "--algo", algo, "-n", "8192", "-f", str(tmp_path), "--device", "cuda")
    assert "2 processes, 32 environments each" in output
    assert "done: 8192 steps" in output
    metrics = next(tmp_path.glob("*/recall_1/metrics.jsonl")).read_text().splitlines()
    assert "train/loss" in json.loads(metrics[-1])


def test_frames_in_two_processes_resume_exactly_with_one_choice_of_kernels(tmp_path: Path) -> None:
    settings, runs = (*FRAMES, "--precision", "bfloat16", "--lr-decay", "none", "--device", "cuda"), []
    kernels = "auto"
    for folder, steps in ((tmp_path / "whole", 256), (tmp_path / "parted", 128)):
        train(*settings, "--cnn-kernels", kernels, "-n", str(steps), "-f", str(folder))
        runs.append(next(folder.glob("*/coinrun_1")))
        kernels = json.loads((runs[0] / "config.json").read_text())["train"]["cnn_kernels"]
        assert kernels in KERNELS
    train("--resume", str(runs[1]), "-n", "256")
    whole, resumed = (load_file(run / "checkpoints" / "model-000000000256.safetensors") for run in runs)
    assert whole.keys() == resumed.keys()
    assert [name for name, weight in whole.items() if not torch.equal(weight, resumed[name])] == []
