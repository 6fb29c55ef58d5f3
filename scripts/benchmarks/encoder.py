"""`srwm-rl bench encoder`: the CNN by layout and precision, and as a share of the device's matmul speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.agents.engine.cuda_graphs import capture
from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import IN_C, KERNELS, ImpalaCNN, fastest_precision
from srwm_rl.scripts.benchmarks.measure import BenchOptions, alternate, device_clock, ratio, speeds, summary
from srwm_rl.scripts.benchmarks.trainers import PlainFeatures
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import Count
from srwm_rl.scripts.training.build import describe_cudnn

PLAIN = "channels first, float32, whole batch"
BY_TRIAL = "cuDNN by trial"
MFLOP = 61.0  # of a 64 x 64 frame, forward; forward and backward are about three times that
MATMUL_SIZE = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class EncoderBench(BenchOptions):
    """Time the IMPALA CNN on 64 x 64 frames: `srwm-rl bench encoder`."""

    n_frames: Count = 256
    """Frames per pass."""
    micro_batch: Count | None = None
    """Frames that a CPU thread processes at once, about; None: by precision."""
    device: str = "cpu"
    """auto, cpu, cuda."""


class PlainCNN(PlainFeatures):
    """The same network as SB3 users run it: float frames, channels first, the whole batch at once."""

    def forward(self, frames: Tensor) -> Tensor:
        """Map uint8 `[N, 64, 64, 3]` to `[N, 256]`."""
        return super().forward(frames.permute(0, 3, 1, 2).contiguous().float() / 255)


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
    mode = f", {describe_cudnn()}" if device.type == "cuda" else ""
    print(
        f"{config.n_frames} frames, {device}{mode}, {torch.get_num_threads()} thread(s), {config.rounds} rounds in turn"
    )
    peak = {dtype: _matmul_speed(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    print(f"matrix products: {peak[torch.float32]:.0f} GFLOP/s in float32, {peak[torch.bfloat16]:.0f} in bfloat16")

    def sides_of(networks: dict[str, nn.Module]) -> dict[str, Callable[[], dict[str, float]]]:
        clock = device_clock(device)
        return {name: partial(speeds, _passes(net, frames), len(frames), clock) for name, net in networks.items()}

    sides = sides_of(networks)
    if device.type == "cuda":  # what training would gain by it
        sides |= {f"{name}, {BY_TRIAL}": _by_trial(side) for name, side in sides_of(networks).items()}
    rates, rows = alternate(sides, config.rounds), []
    for work, factor in (("forward", 1), ("forward and backward", 3)):
        for name, parts in rates.items():
            speed, relative = summary(parts[work]), ratio(parts[work], rates[PLAIN][work])
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            share = speed.median * MFLOP * factor / 1e3 / peak[dtype]
            print(f"{work:<21} {name:<38} {f'{speed:,.0f}':>22} frames/s  x first {relative:.2f}  {share:.0%}")
            rows.append({"work": work, "name": name, "frames_per_second": speed, "ratio": relative})
    print("the last column: share of the matrix products' speed")
    return {"bench": "encoder", "device": str(device), "threads": torch.get_num_threads(), "rows": rows}


def _networks(config: EncoderBench, device: torch.device) -> dict[str, nn.Module]:
    """Return the same network by layout and precision, and with the device's other kernels."""
    make = partial(ImpalaCNN, (64, 64, 3), False, micro_batch=config.micro_batch)
    plain = PlainCNN(spaces.Box(0, 1, (3, 64, 64)))
    networks: dict[str, nn.Module] = {PLAIN: plain, "ours, float32": make()}
    if fastest_precision(device) == "bfloat16":
        networks["ours, bfloat16"] = make(precision="bfloat16")
    for network in [*networks.values()][1:]:
        network.kernels = "plain"  # type: ignore[assignment]
    if device.type == "cuda":
        fastest = [*networks][-1]
        for kernels in [name for name in KERNELS if name != "plain"]:
            other = make(precision=fastest.removeprefix("ours, "))
            networks[f"{fastest}, {kernels}"], other.kernels = other, kernels
    else:
        for precision, kernels in IN_C.items():
            other = make(precision=precision)
            if other.can_run_in_c():
                networks[f"ours, {precision}, {kernels}"], other.kernels = other, kernels
    for network in [*networks.values()][1:]:
        network.load_state_dict(plain.network.state_dict())
    return {name: network.to(device) for name, network in networks.items()}


def check_same(networks: dict[str, nn.Module], frames: Tensor) -> None:
    """Raise a `UserError` unless all variants have the same features."""
    expected = networks["ours, float32"](frames).detach()
    exact = 5e-3 if frames.is_cuda else 1e-4  # GPUs compute float32 convolutions with ten bits of mantissa
    for name, network in networks.items():
        error = float((network(frames).detach() - expected).norm() / expected.norm())
        if error > (0.02 if "bfloat16" in name else exact):
            raise UserError(f"{name} gives other features (relative difference {error:.1e}): nothing was timed")


def _passes(network: nn.Module, frames: Tensor) -> dict[str, Callable[[], object]]:
    def train() -> None:
        torch.autograd.grad(network(frames).square().sum(), [*network.parameters()])

    passes: dict[str, Callable[[], object]] = {
        "forward": torch.no_grad()(partial(network, frames)),
        "forward and backward": train,
    }
    return {name: _captured(work) for name, work in passes.items()} if frames.is_cuda else passes


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    """Return `work` as a CUDA graph, as in training, captured at the first call; Python's launches take longer."""
    graph = cache(lambda: capture(work, torch.cuda.Stream(), draws=False))
    return lambda: graph()()


def _by_trial(run: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """Return `run` with the algorithms that are fastest in cuDNN's trials, which may give other bits each time."""

    def timed() -> dict[str, float]:
        cudnn: Any = torch.backends.cudnn
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = False, True
        try:
            return run()
        finally:
            cudnn.deterministic, cudnn.benchmark = before

    return timed


def _matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of a large matrix product, the best of eight."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    product = partial(torch.matmul, a, b)
    return max(speeds({"": product}, 2 * size**3, device_clock(device))[""] for _ in range(8)) / 1e9
