"""Frames at once: a number by device, larger on a GPU whose memory holds their activations."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents.frames_at_once import FRAMES_AT_ONCE, default_frames_at_once, frames_that_fit
from srwm_rl.nn.cnns import ImpalaCNN, NatureCNN, PatchCNN
from tests.agents.probe import small_model

GIB = 2**30
FRAMES = spaces.Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("shape", "settings", "memory", "frames"),
    [
        ((64, 64, 3), {}, 80 * GIB, 16_384),
        ((64, 64, 3), {}, 39 * GIB, 8192),
        ((64, 64, 3), {}, 24 * GIB, 8192),
        ((64, 64, 3), {}, 16 * GIB, 4096),
        ((64, 64, 3), {"precision": "float32"}, 80 * GIB, 8192),
        ((3, 64, 64), {"channels": (32, 64, 64)}, 140 * GIB, 16_384),
        ((64, 64, 3), {"channels": (64, 128, 128)}, 80 * GIB, 4096),
    ],
)
def test_activations_take_a_third_of_the_memory(
    shape: tuple[int, ...], settings: dict[str, object], memory: int, frames: int
) -> None:
    cnn = ImpalaCNN(shape, shape[0] == 3, **{"precision": "bfloat16", **settings})  # type: ignore[arg-type]
    assert frames_that_fit(cnn.activation_bytes, memory) == frames


@pytest.mark.parametrize(("kind", "estimate"), [(ImpalaCNN, 2**20), (NatureCNN, 2**17), (PatchCNN, 2**17)])
def test_the_estimate_of_a_frames_activations_is_about_what_is_saved(kind: type[ImpalaCNN], estimate: int) -> None:
    cnn, saved = kind((64, 64, 3), False, precision="bfloat16"), 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    frames = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        cnn._encode(frames)
    assert cnn.activation_bytes == estimate
    assert 0.5 < saved / 8 / cnn.activation_bytes < 1.5


def test_on_a_cpu_the_number_is_fixed() -> None:
    model = small_model("ppo", observation_space=FRAMES)
    assert default_frames_at_once(model.policy, model.device) == FRAMES_AT_ONCE["cpu"]


@pytest.mark.gpu
def test_on_a_gpu_the_number_depends_on_its_memory() -> None:
    encoder = {"precision": "bfloat16"}
    model = small_model("ppo", observation_space=FRAMES, device="cuda", policy_kwargs={"encoder_kwargs": encoder})
    memory = torch.cuda.get_device_properties(0).total_memory
    expected = frames_that_fit(2**20, memory)
    assert default_frames_at_once(model.policy, model.device) == expected
    assert model.sequences_at_once(256) == expected // 256
