"""`srwm-rl bench op`: the recurrences by backend and size, and the lower bound of their arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srwm_rl.errors import UserError
from srwm_rl.ops import cpu
from srwm_rl.ops.backends import FUSED
from srwm_rl.ops.delta import delta_scan
from srwm_rl.ops.scan import srwm_scan
from srwm_rl.scripts.benchmarks.measure import device_clock
from srwm_rl.scripts.benchmarks.options import BenchOptions

Function = Callable[..., tuple[Tensor, Tensor]]
Size = tuple[int, int, int, int]  # T, B, H, D
SIZES = ((50, 32, 8, 16), (128, 64, 8, 16), (50, 32, 8, 8), (50, 32, 8, 32), (20, 16, 8, 64))
ACTING = ((1, 64, 8, 16), (1, 1, 8, 16))
DELTA_SIZES = ((50, 32, 8, 16), (50, 32, 8, 32))
MAX_ERROR = 1e-4  # the largest relative error at which a time is reported


@dataclass(frozen=True)
class OperatorBench(BenchOptions):
    """Time the recurrence: `srwm-rl bench op`."""

    rounds: int = 7
    """Measurements of each time; the median is printed."""
    threads: int | None = 1
    """Threads of torch."""
    device: str = "cpu"
    """cpu or cuda."""


def run(config: OperatorBench) -> dict[str, Any]:
    """Print the table and return it; a backend with wrong results is not timed.

    Raises:
        UserError: no such device.
    """
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    clock = "CPU time" if (config.device, config.threads) == ("cpu", 1) else "wall time"
    print(f"torch {torch.__version__}, {config.device}, {torch.get_num_threads()} thread(s)")
    print(f"ns per head and step, medians, {clock}")
    print(
        f"{'work':<17} {'T,B,H,D':<14} {'backend':<10} {'ns':>9} {'bound':>7} {'x ref':>7} {'x loop':>7} {'error':>8}"
    )
    rows = []
    for row in measure(_backends(config.device), config.device, config.rounds):
        rows.append(row)
        print(_line(**row), flush=True)
    print(
        "loop: the recurrence step by step, as the authors wrote it; bound: its multiply-adds, as fast as torch.matmul"
    )
    wrong = any(row["ns"] is None for row in rows)
    return {"bench": "op", "threads": config.threads, "rows": rows, "wrong": wrong}


def _backends(device: str) -> tuple[str, ...]:
    if device == "cuda":
        return ("triton",)
    reason = cpu.why_not(device, torch.float32, 16)
    if reason:
        print(f"no cpu backend: {reason}")
    return () if reason else ("cpu",)


def _line(
    work: str, size: Size, backend: str, ns: float | None, bound_ns: float, error: float, **ratios: float | None
) -> str:
    head = f"{work:<17} {','.join(map(str, size)):<14} {backend:<10}"
    if ns is None:
        return f"{head} wrong results (relative error {error:.1e}): not timed"
    return f"{head} {ns:>9.1f} {bound_ns:>7.1f} {' '.join(f'{x:>7.1f}' for x in ratios.values())} {error:>8.0e}"


def measure(backends: tuple[str, ...], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of each work and size: the loop, the reference and the backends, timed in alternation."""
    srwm_works, delta_works = ("forward", "forward+backward"), ("delta forward", "delta fw+backward")
    for op, function, loop, make_inputs, sizes, works, acting in (
        ("srwm_scan", srwm_scan, step_loop, srwm_inputs, SIZES, srwm_works, "acting step"),
        ("delta_scan", delta_scan, delta_loop, delta_inputs, DELTA_SIZES, delta_works, "delta acting step"),
    ):
        available = [name for name in backends if name in FUSED[op]]
        runs = {"loop": loop, "reference": function, **dict.fromkeys(available, function)}
        for size, work in [(size, work) for size in sizes for work in works] + [(size, acting) for size in ACTING]:
            yield from _compare(runs, work, size, make_inputs(size, device), device, rounds)


def _compare(
    runs: dict[str, Function], work: str, size: Size, inputs: list[Tensor], device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    truth = _run(runs["reference"], work, [t.double() for t in inputs], "reference")
    errors = {name: _error(_run(function, work, inputs, name), truth) for name, function in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ("matmul", *runs)}
    n = 512 if device == "cpu" else 4096
    square = torch.ones(n, n, device=device)
    calls = 20 if size[0] == 1 else 1  # one step is too short to time alone
    for _ in range(rounds):
        seconds["matmul"].append(_seconds(lambda: square @ square, device))
        for name, function in runs.items():
            seconds[name].append(_seconds(partial(_run, function, work, inputs, name), device, calls))
    # Forward reads, reads and writes; backward has six products more, and runs the step again.
    again = 3 if "delta" not in work else 2
    macs = inputs[-2][0, 0].numel() * (3 + (6 + again) * work.endswith("backward"))
    n_steps, batch, heads, _ = size
    ns = {name: statistics.median(times) / (n_steps * batch * heads) * 1e9 for name, times in seconds.items()}
    for name in runs:
        correct = errors[name] <= MAX_ERROR
        yield {
            "work": work,
            "size": size,
            "backend": name,
            "ns": ns[name] if correct else None,
            "bound_ns": macs * min(seconds["matmul"]) / n**3 * 1e9,
            "error": errors[name],
            **{f"vs_{base}": ns[base] / ns[name] if correct else None for base in ("reference", "loop")},
        }


def step_loop(
    x: Tensor, weight: Tensor, shift: Tensor | None, starts: Tensor | None, *, backend: str = ""
) -> tuple[Tensor, Tensor]:
    """Step as the authors' layer is written, with four separate matrices and two reads of each: the baseline."""
    n_steps, batch, heads, size = x.shape
    slow = weight.expand(batch, heads, size, 3 * size + 4)
    fast = list((slow if shift is None else slow + shift).split((size, size, size, 4), -1))
    first = slow.split((size, size, size, 4), -1)
    ys = []
    for t in range(n_steps):
        if starts is not None:
            fresh = (starts[t] != 0)[:, None, None, None]
            fast = [torch.where(fresh, a, b) for a, b in zip(first, fast, strict=True)]
        y, query, key, beta = (torch.einsum("bhi,bhij->bhj", x[t], w) for w in fast)
        query, key, rate = query.softmax(-1), key.softmax(-1), beta.sigmoid()
        ys.append(y)
        for n, w in enumerate(fast):
            target, present = (torch.einsum("bhi,bhij->bhj", a, w) for a in (query, key))
            edit = rate[..., n, None] * (target - present)
            fast[n] = w + torch.einsum("bhi,bhj->bhij", key, edit)
    return torch.stack(ys), torch.cat(fast, -1) - slow


def delta_loop(
    key: Tensor, value: Tensor, query: Tensor, rate: Tensor, weight: Tensor, starts: Tensor, *, backend: str = ""
) -> tuple[Tensor, Tensor]:
    """Step through the delta rule as its equations are written: the baseline."""
    ys = []
    for t in range(len(key)):
        weight = torch.where((starts[t] != 0)[:, None, None, None], 0, weight)
        present = torch.einsum("bhi,bhij->bhj", key[t], weight)
        edit = rate[t, ..., None] * (value[t] - present)
        weight = weight + torch.einsum("bhi,bhj->bhij", key[t], edit)
        ys.append(torch.einsum("bhi,bhij->bhj", query[t], weight))
    return torch.stack(ys), weight


def srwm_inputs(size: Size, device: str) -> list[Tensor]:
    """Return the inputs of `srwm_scan`."""
    n_steps, batch, heads, head_size = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).softmax(-1)
    weight = torch.randn(heads, head_size, 3 * head_size + 4, generator=generator) / head_size**0.5
    starts = torch.rand(n_steps, batch, generator=generator) < 0.02
    shift = 0.1 * torch.randn(batch, *weight.shape, generator=generator)
    return [x.to(device), weight.to(device), shift.to(device), starts.float().to(device)]


def delta_inputs(size: Size, device: str) -> list[Tensor]:
    """Return the inputs of `delta_scan`."""
    n_steps, batch, heads, head_size = size
    generator = torch.Generator().manual_seed(0)
    key, value, query = torch.randn(3, *size, generator=generator)
    rate = torch.rand(size[:3], generator=generator)
    weight = torch.randn(batch, heads, head_size, head_size, generator=generator)
    starts = (torch.rand(n_steps, batch, generator=generator) < 0.02).float()
    return [x.to(device) for x in (key.softmax(-1), value, query.softmax(-1), rate, weight, starts)]


def _run(function: Function, work: str, inputs: list[Tensor], backend: str) -> list[Tensor]:
    if not work.endswith("backward"):
        with torch.no_grad():
            return list(function(*inputs, backend=backend))
    leaves = [t.detach().requires_grad_() for t in inputs[:-1]]
    y, final = function(*leaves, inputs[-1], backend=backend)
    return [y.detach(), final.detach(), *torch.autograd.grad((y.sum(), final.sum()), leaves)]


def _error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))


def _seconds(call: Callable[[], object], device: str, calls: int = 1) -> float:
    # CPU time of a single thread: wall time includes other processes.
    single = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if single else device_clock(torch.device(device))
    begin = now()
    for _ in range(calls):
        call()
    return (now() - begin) / calls
