"""`srwm-rl bench encoder`: the CNN by layout and precision, beside the processor's matrix-product speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srwm_rl.encoders import ImpalaCNN, fastest_precision
from srwm_rl.errors import UserError
from srwm_rl.scripts.benchmarks.measure import alternate, ratio, show_ratio, summary
from srwm_rl.scripts.benchmarks.options import Common

MFLOP = 61.0  # of a 64 x 64 frame forward; about three times that with backward


@dataclass(frozen=True)
class EncoderBench(Common):
    """Time the IMPALA CNN on 64 x 64 frames: `srwm-rl bench encoder`."""

    n_frames: int = 256
    """Frames per pass."""
    micro_batch: int = 32
    """Frames that go through together."""


class PlainCNN(nn.Module):
    """The same network as SB3 users run it: float frames, channels first, the whole batch at once."""

    def __init__(self, network: ImpalaCNN) -> None:
        super().__init__()
        self.network = ImpalaCNN((3, 64, 64), channels_first=True, micro_batch=10**9)
        self.network.load_state_dict(network.state_dict())
        self.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, frames: Tensor) -> Tensor:
        """Map uint8 `[N, 64, 64, 3]` to `[N, 256]`."""
        x = frames.permute(0, 3, 1, 2).contiguous().float() / 255
        for stage in self.network.stages:
            x = stage(x)
        head = self.network.head
        return torch.relu(head(torch.relu(x).flatten(1)))


def run(config: EncoderBench) -> dict[str, Any]:
    """Print the table and return it; a variant whose features differ gets no figure."""
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (config.n_frames, 64, 64, 3), dtype=torch.uint8)
    shape = (64, 64, 3)
    ours = ImpalaCNN(shape, False, micro_batch=config.micro_batch)
    networks: dict[str, nn.Module] = {"channels first, float32, whole batch": PlainCNN(ours), "ours, float32": ours}
    if fastest_precision("cpu") == "bfloat16":
        half = ImpalaCNN(shape, False, micro_batch=config.micro_batch, precision="bfloat16")
        half.load_state_dict(ours.state_dict())
        networks["ours, bfloat16"] = half
    expected = ours(frames).detach()
    for name, network in networks.items():
        error = float((network(frames).detach() - expected).norm() / expected.norm())
        if error > (0.02 if "bfloat16" in name else 1e-4):
            raise UserError(f"{name} gives other features (relative difference {error:.1e}): nothing was timed")
    print(f"{config.n_frames} frames, {torch.get_num_threads()} thread(s), {config.rounds} rounds in turn")
    peak = {dtype: _matmul_speed(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"matrix products: {peak[torch.float32]:.0f} GFLOP/s in float32, {peak[torch.bfloat16]:.0f} in bfloat16")
    rows = []
    for work, factor in (("forward", 1), ("forward and backward", 3)):
        rates = alternate(
            {name: _pass(network, frames, factor > 1) for name, network in networks.items()}, config.rounds
        )
        for name, each in rates.items():
            against = ratio(each, rates["channels first, float32, whole batch"])
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            share = summary(each).median * MFLOP * factor / 1e3 / peak[dtype]
            print(f"{work:<21} {name:<38} {summary(each)!s:>22} frames/s  x first {show_ratio(against)}  {share:.0%}")
            rows.append(
                {"work": work, "name": name, "frames_per_second": summary(each)._asdict(), "ratio": against._asdict()}
            )
    print("the last column: share of the matrix products' speed")
    return {"bench": "encoder", "threads": torch.get_num_threads(), "rows": rows}


def _pass(network: nn.Module, frames: Tensor, backward: bool) -> Callable[[], int]:
    def work() -> int:
        if backward:
            network.zero_grad()
            network(frames).square().sum().backward()
        else:
            with torch.no_grad():
                network(frames)
        return len(frames)

    return work


def _matmul_speed(dtype: torch.dtype) -> float:
    """Return GFLOP/s of a large product, the best of a few."""
    size = 1024
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best
