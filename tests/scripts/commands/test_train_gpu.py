"""`srwm-rl train` on a GPU: every trainer and core uses CUDA graphs and kernels, and a run resumes exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srwm_rl.nn.cores import core_names
from srwm_rl.ops.backends import log_fallback
from srwm_rl.scripts.main import main

pytestmark = pytest.mark.gpu


def train(folder: Path, *arguments: str, env: str = "recall") -> Path:
    """Train on the GPU and return the run's folder."""
    assert main(["train", "--env", env, "--device", "cuda", "--no-progress", "-f", str(folder), *arguments]) == 0
    return next(folder.glob(f"*/{env}_1"))


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


FRAMES = ("--n-envs", "4", "--n-steps", "16", "--batch-size", "32", "--n-epochs", "1", "--precision", "bfloat16")
PLAIN, FUSED = ("--cnn-kernels", "plain"), ("--cnn-kernels", "fused8")  # two runs might measure differently


@pytest.mark.parametrize(
    ("env", "settings", "steps"),
    [
        ("recall", ("--algo", "ppo"), 8192),
        ("recall", ("--algo", "impala", "--synchronous"), 8192),
        ("coinrun", (*FRAMES, *PLAIN), 256),
        ("coinrun", (*FRAMES, *FUSED), 256),
    ],
    ids=["ppo", "impala", "frames", "frames with fused operations"],
)
def test_a_run_resumes_exactly(
    env: str, settings: tuple[str, ...], steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*settings, "--lr-decay", "none", "-n")
    whole = train(tmp_path / "whole", *settings, str(steps), env=env)
    parted = train(tmp_path / "parted", *settings, str(steps // 2), env=env)
    assert main(["train", "--resume", str(parted), "--no-progress", "-n", str(steps)]) == 0
    assert "CUDA graph" not in caplog.text
    weights, resumed = (load_file(run / "checkpoints" / f"model-{steps:012}.safetensors") for run in (whole, parted))
    assert weights.keys() == resumed.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, resumed[name])] == []
