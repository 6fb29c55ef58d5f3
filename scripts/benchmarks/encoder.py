"""`srwm-rl bench encoder`: the CNN by layout and precision, and as a share of the device's matmul speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import ImpalaCNN, fastest_precision
from srwm_rl.scripts.benchmarks.contrib import PlainFeatures
from srwm_rl.scripts.benchmarks.measure import alternate, device_clock, format_ratio, ratio, summary
from srwm_rl.scripts.benchmarks.options import BenchOptions
from srwm_rl.scripts.cli import check_device

PLAIN = "channels first, float32, whole batch"
MFLOP = 61.0  # of a 64 x 64 frame, forward; forward and backward are about three times that


@dataclass(frozen=True)
class EncoderBench(BenchOptions):
    """Time the IMPALA CNN on 64 x 64 frames: `srwm-rl bench encoder`."""

    n_frames: int = 256
    """Frames per pass."""
    micro_batch: int | None = None
    """Frames that a CPU thread processes at once, about; None: by precision."""
    device: str = "cpu"
    """auto, cpu, cuda."""


class PlainCNN(nn.Module):
    """The same network as SB3 users run it: float frames, channels first, the whole batch at once."""

    def __init__(self, network: ImpalaCNN) -> None:
        super().__init__()
        self.features = PlainFeatures(spaces.Box(0, 1, (3, 64, 64)))
        self.features.network.load_state_dict(network.state_dict())

    def forward(self, frames: Tensor) -> Tensor:
        """Map uint8 `[N, 64, 64, 3]` to `[N, 256]`."""
        features: Tensor = self.features(frames.permute(0, 3, 1, 2).contiguous().float() / 255)
        return features


def run(config: EncoderBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: no such device, or the variants' features differ.
    """
    device = torch.device(check_device(config.device))
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (config.n_frames, 64, 64, 3), dtype=torch.uint8).to(device)
    networks = _networks(config, device)
    check_same(networks, frames)
    print(f"{config.n_frames} frames, {device}, {torch.get_num_threads()} thread(s), {config.rounds} rounds in turn")
    peak = {dtype: _matmul_speed(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    print(f"matrix products: {peak[torch.float32]:.0f} GFLOP/s in float32, {peak[torch.bfloat16]:.0f} in bfloat16")
    rows = []
    for work, factor in (("forward", 1), ("forward and backward", 3)):
        rates = alternate(
            {name: _pass(network, frames, factor > 1) for name, network in networks.items()}, config.rounds
        )
        for name, values in rates.items():
            speed, relative = summary(values), ratio(values, rates[PLAIN])
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            share = speed.median * MFLOP * factor / 1e3 / peak[dtype]
            print(f"{work:<21} {name:<38} {speed!s:>22} frames/s  x first {format_ratio(relative)}  {share:.0%}")
            rows.append({"work": work, "name": name, "frames_per_second": speed._asdict(), "ratio": relative._asdict()})
    print("the last column: share of the matrix products' speed")
    return {"bench": "encoder", "device": str(device), "threads": torch.get_num_threads(), "rows": rows}


def _networks(config: EncoderBench, device: torch.device) -> dict[str, nn.Module]:
    """Return the same network by layout and precision."""
    shape = (64, 64, 3)
    ours = ImpalaCNN(shape, False, micro_batch=config.micro_batch)
    networks: dict[str, nn.Module] = {PLAIN: PlainCNN(ours), "ours, float32": ours}
    if fastest_precision(device) == "bfloat16":
        half = ImpalaCNN(shape, False, micro_batch=config.micro_batch, precision="bfloat16")
        half.load_state_dict(ours.state_dict())
        networks["ours, bfloat16"] = half
    return {name: network.to(device) for name, network in networks.items()}


def check_same(networks: dict[str, nn.Module], frames: Tensor) -> None:
    """Raise a `UserError` unless all variants have the same features."""
    expected = networks["ours, float32"](frames).detach()
    exact = 5e-3 if frames.is_cuda else 1e-4  # GPUs compute float32 convolutions with ten bits of mantissa
    for name, network in networks.items():
        error = float((network(frames).detach() - expected).norm() / expected.norm())
        if error > (0.02 if "bfloat16" in name else exact):
            raise UserError(f"{name} gives other features (relative difference {error:.1e}): nothing was timed")


def _pass(network: nn.Module, frames: Tensor, backward: bool) -> Callable[[], int]:
    wait = device_clock(frames.device)

    def work() -> int:
        if backward:
            network.zero_grad()
            network(frames).square().sum().backward()
        else:
            with torch.no_grad():
                network(frames)
        wait()
        return len(frames)

    return work


def _matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of a large matrix product, the best of eight."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best, now = 0.0, device_clock(device)
    for _ in range(8):
        start = now()
        a @ b
        best = max(best, 2 * size**3 / (now() - start) / 1e9)
    return best
