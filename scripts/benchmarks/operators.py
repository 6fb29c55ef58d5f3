"""`srwm-rl bench op`: the recurrences by backend and size, and the lower bound of their arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from srwm_rl.agents.engine.cuda_graphs import capture
from srwm_rl.ops.backends import choose
from srwm_rl.ops.delta import delta_scan
from srwm_rl.ops.scan import srwm_scan
from srwm_rl.scripts.benchmarks.measure import BenchOptions, alternate, device_clock, speeds
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import Count

Function = Callable[..., tuple[Tensor, Tensor]]
Size = tuple[int, int, int, int]  # T, B, H, D
SIZES = ((50, 32, 8, 16), (128, 64, 8, 16), (50, 32, 8, 8), (50, 32, 8, 32), (20, 16, 8, 64))
ACTING = ((1, 64, 8, 16), (1, 1, 8, 16))
DELTA_SIZES = ((50, 32, 8, 16), (50, 32, 8, 32))
MATMUL_SIZE = {"cpu": 512, "cuda": 4096}  # of the product that gives the bound
MAX_ERROR = 1e-4  # the largest relative error at which a time is reported


@dataclass(frozen=True)
class OperatorBench(BenchOptions):
    """Time the recurrence: `srwm-rl bench op`."""

    rounds: Count = 7
    """Measurements of each time; the median is printed."""
    threads: Count | None = 1
    """Threads of torch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu or cuda."""


def run(config: OperatorBench) -> dict[str, Any]:
    """Print the table and return it; a backend with wrong results is not timed.

    Raises:
        UserError: no such device.
    """
    check_device(config.device)
    clock = "CPU time" if (config.device, config.threads) == ("cpu", 1) else "wall time"
    clock += " of captured CUDA graphs" if config.device == "cuda" else ""
    print(f"torch {torch.__version__}, {config.device}, {torch.get_num_threads()} thread(s)")
    print(f"ns per head and step, medians, {clock}")
    print(
        f"{'work':<17} {'T,B,H,D':<14} {'backend':<10} {'ns':>9} {'bound':>7} {'x ref':>7} {'x loop':>7} {'error':>8}"
    )
    rows = []
    for row in measure(config.device, config.rounds):
        rows.append(row)
        print(_line(**row), flush=True)
    print(
        "loop: the recurrence step by step, as the authors wrote it; bound: its multiply-adds, as fast as torch.matmul"
    )
    wrong = any(row["ns"] is None for row in rows)
    return {"bench": "op", "threads": config.threads, "rows": rows, "wrong": wrong}


def _line(
    work: str, size: Size, backend: str, ns: float | None, bound_ns: float, error: float, **ratios: float | None
) -> str:
    head = f"{work:<17} {','.join(map(str, size)):<14} {backend:<10}"
    if ns is None:
        return f"{head} wrong results (relative error {error:.1e}): not timed"
    return f"{head} {ns:>9.1f} {bound_ns:>7.1f} {' '.join(f'{x:>7.1f}' for x in ratios.values())} {error:>8.0e}"


def measure(device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of each work and size: the loop, the reference and the fused kernel, timed in alternation."""
    srwm_works, delta_works = ("forward", "forward+backward"), ("delta forward", "delta fw+backward")
    for op, function, loop, sizes, works, acting in (
        ("srwm_scan", srwm_scan, step_loop, SIZES, srwm_works, "acting step"),
        ("delta_scan", delta_scan, delta_loop, DELTA_SIZES, delta_works, "delta acting step"),
    ):
        for size, work in [(size, work) for size in sizes for work in works] + [(size, acting) for size in ACTING]:
            fused = choose(op, "auto", device, torch.float32, size[-1], size[-1])
            runs = {"loop": loop, "reference": function, fused: function}
            yield from _compare(runs, work, size, make_inputs(op, size, device), device, rounds)


def _compare(
    runs: dict[str, Function], work: str, size: Size, inputs: list[Tensor], device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    truth = _run(runs["reference"], work, [t.double() for t in inputs], "reference")
    errors = {name: _error(_run(function, work, inputs, name), truth) for name, function in runs.items()}
    n = MATMUL_SIZE[device]
    square = torch.ones(n, n, device=device)
    n_steps, batch, heads, _ = size
    calls = 20 if n_steps == 1 or device == "cuda" else 1  # one step is too short to time alone, and a GPU's kernel
    sides = {"matmul": _side(lambda: square @ square, n**3, device)}
    for name, function in runs.items():
        sides[name] = _side(partial(_run, function, work, inputs, name), n_steps * batch * heads, device, calls)
    rates = {name: parts[""] for name, parts in alternate(sides, rounds).items()}
    ns = {name: 1e9 / statistics.median(values) for name, values in rates.items()}
    # Forward reads, reads and writes; backward has six products more, and runs the step again.
    again = 3 if "delta" not in work else 2
    macs = inputs[-2][0, 0].numel() * (3 + (6 + again) * work.endswith("backward"))
    for name in runs:
        correct = errors[name] <= MAX_ERROR
        yield {
            "work": work,
            "size": size,
            "backend": name,
            "ns": ns[name] if correct else None,
            "bound_ns": 1e9 * macs / max(rates["matmul"]),
            "error": errors[name],
            **{f"vs_{base}": ns[base] / ns[name] if correct else None for base in ("reference", "loop")},
        }


def _side(call: Callable[[], object], n: int, device: str, calls: int = 1) -> Callable[[], dict[str, float]]:
    """Return a function that times some calls which process `n` each.

    On a GPU they are one captured graph: launches from Python would take longer than the kernels.
    """

    def run() -> None:
        for _ in range(calls):
            call()

    work = capture(run, torch.cuda.Stream(), draws=False) if device == "cuda" else run
    # CPU time of a single thread: wall time includes other processes.
    single = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single else device_clock(torch.device(device))
    return lambda: speeds({"": work}, n * calls, clock)


def step_loop(x: Tensor, weight: Tensor, shift: Tensor, starts: Tensor, *, backend: str = "") -> tuple[Tensor, Tensor]:
    """Step as the authors' layer is written, with four separate matrices and two reads of each: the baseline."""
    widths = (*[x.shape[-1]] * 3, 4)
    slow = weight.expand_as(shift)
    first, fast, ys = slow.split(widths, -1), [*(slow + shift).split(widths, -1)], []
    for step, start in zip(x, starts, strict=True):
        fresh = (start != 0)[:, None, None, None]
        fast = [torch.where(fresh, a, b) for a, b in zip(first, fast, strict=True)]
        y, query, key, beta = (torch.einsum("bhi,bhij->bhj", step, w) for w in fast)
        query, key, rate = query.softmax(-1), key.softmax(-1), beta.sigmoid()
        ys.append(y)
        for n, w in enumerate(fast):
            target, present = (torch.einsum("bhi,bhij->bhj", a, w) for a in (query, key))
            fast[n] = w + torch.einsum("bhi,bhj->bhij", key, rate[..., n, None] * (target - present))
    return torch.stack(ys), torch.cat(fast, -1) - slow


def delta_loop(
    key: Tensor, value: Tensor, query: Tensor, rate: Tensor, weight: Tensor, starts: Tensor, *, backend: str = ""
) -> tuple[Tensor, Tensor]:
    """Step through the delta rule as its equations are written: the baseline."""
    ys = []
    for t in range(len(key)):
        weight = weight.masked_fill((starts[t] != 0)[:, None, None, None], 0)
        edit = rate[t, ..., None] * (value[t] - torch.einsum("bhi,bhij->bhj", key[t], weight))
        weight = weight + torch.einsum("bhi,bhj->bhij", key[t], edit)
        ys.append(torch.einsum("bhi,bhij->bhj", query[t], weight))
    return torch.stack(ys), weight


def make_inputs(op: str, size: Size, device: str) -> list[Tensor]:
    """Return the inputs of an operator, the same at each call."""
    n_steps, batch, heads, head_size = size
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, key, value, query = randn(4, *size)
    starts = (randn(n_steps, batch) > 2.0).float()
    if op == "srwm_scan":
        weight = randn(heads, head_size, 3 * head_size + 4) / head_size**0.5
        inputs = [x.softmax(-1), weight, 0.1 * randn(batch, *weight.shape), starts]
    else:
        weight, rate = randn(batch, heads, head_size, head_size), randn(size[:3]).sigmoid()
        inputs = [key.softmax(-1), value, query.softmax(-1), rate, weight, starts]
    return [tensor.to(device) for tensor in inputs]


def _run(function: Function, work: str, inputs: list[Tensor], backend: str) -> list[Tensor]:
    if not work.endswith("backward"):
        with torch.no_grad():
            return list(function(*inputs, backend=backend))
    leaves = [t.detach().requires_grad_() for t in inputs[:-1]]
    y, final = function(*leaves, inputs[-1], backend=backend)
    return [y.detach(), final.detach(), *torch.autograd.grad((y.sum(), final.sum()), leaves)]


def _error(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative error, 1e9 where a number is not finite."""
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).nan_to_num(1e9, 1e9).max())
