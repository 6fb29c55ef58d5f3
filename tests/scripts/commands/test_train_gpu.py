"""`srwm-rl train` on a GPU: every trainer and core uses CUDA graphs and kernels, and a run resumes exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srwm_rl.nn.cores import core_names
from srwm_rl.ops.backends import log_fallback
from srwm_rl.scripts.main import main

pytestmark = pytest.mark.gpu


def train(folder: Path, *arguments: str) -> Path:
    """Train recall on the GPU and return the run's folder."""
    assert main(["train", "--env", "recall", "--device", "cuda", "--no-progress", "-f", str(folder), *arguments]) == 0
    return next(folder.glob("*/recall_1"))


@pytest.mark.parametrize(
    "settings",
    [("--core", name) for name in core_names()] + [("--algo", "impala"), ("--algo", "impala", "--synchronous")],
)
def test_every_trainer_and_core_is_captured(
    settings: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_fallback.cache_clear()  # it logs every message once
    train(tmp_path, *settings, "-n", "6144")
    assert "CUDA graph" not in caplog.text  # logged where one is disabled
    if torch.version.cuda is not None:  # simulated CUDA has no kernels
        assert "step by step" not in caplog.text


@pytest.mark.parametrize("algo", [("--algo", "ppo"), ("--algo", "impala", "--synchronous")])
def test_a_run_resumes_exactly(algo: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*algo, "--lr-decay", "none", "-n")
    whole, parted = train(tmp_path / "whole", *settings, "8192"), train(tmp_path / "parted", *settings, "4096")
    assert main(["train", "--resume", str(parted), "--no-progress", "-n", "8192"]) == 0
    weights, resumed = (load_file(run / "checkpoints" / "model-000000008192.safetensors") for run in (whole, parted))
    assert weights.keys() == resumed.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, resumed[name])] == []
