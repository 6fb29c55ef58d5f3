"""How many frames go through a CNN at once in training, by the device and its memory."""

from __future__ import annotations

import torch

from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.nn.policy import SRWMPolicy

# By device type. More frames at once are not faster on a CPU; on a GPU they are fewer launches, and the recurrence's
# steps take as long for few sequences as for many.
FRAMES_AT_ONCE = {"cpu": 256, "cuda": 4096}
MAX_ON_GPU = 16_384  # where their activations take at most a third of the memory


def default_frames_at_once(policy: SRWMPolicy, device: torch.device) -> int:
    """Return how many frames' activations are held at once: the same in every run on a machine."""
    if device.type != "cuda":
        return FRAMES_AT_ONCE.get(device.type, FRAMES_AT_ONCE["cpu"])
    cnns = [module for module in policy.modules() if isinstance(module, ImpalaCNN)]
    if not cnns:  # of other CNNs the memory is not known
        return FRAMES_AT_ONCE["cuda"]
    memory = torch.cuda.get_device_properties(device).total_memory
    return frames_that_fit(sum(cnn.activation_bytes for cnn in cnns), memory)


def frames_that_fit(bytes_of_frame: int, memory: int) -> int:
    """Return the largest default times a power of two, up to `MAX_ON_GPU`, that takes a third of `memory` in bytes."""
    n = FRAMES_AT_ONCE["cuda"]
    while n < MAX_ON_GPU and 2 * n * bytes_of_frame <= memory // 3:
        n *= 2
    return n
