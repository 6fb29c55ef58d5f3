"""Time the backends of `srwm_scan` and `delta_scan` in alternation; one with wrong results gets no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from srwm_rl.ops.backends import FUSED
from srwm_rl.ops.delta import delta_scan
from srwm_rl.ops.scan import srwm_scan

SIZES = ((50, 32, 8, 16), (128, 64, 8, 16), (50, 32, 8, 8), (50, 32, 8, 32), (20, 16, 8, 64))  # T, B, H, D
ACTING = ((1, 64, 8, 16), (1, 1, 8, 16))
DELTA_SIZES = ((50, 32, 8, 16), (50, 32, 8, 32))
MAX_ERROR = 1e-4  # the largest relative error at which a time is reported


class Row(NamedTuple):
    """One line of the table; times are nanoseconds per head and step."""

    work: str
    size: tuple[int, int, int, int]
    backend: str
    ns: float | None  # None: wrong results
    bound_ns: float
    error: float
    vs_reference: float | None = None
    vs_loop: float | None = None


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


Function = Callable[..., tuple[Tensor, Tensor]]
Size = tuple[int, int, int, int]


class _Op(NamedTuple):
    """A recurrence to time; its last input is `episode_starts`, and gradients are taken of the others."""

    name: str
    function: Function
    loop: Function
    inputs: Callable[[Size, str], list[Tensor]]
    columns: Callable[[int], int]
    macs: tuple[int, int]  # multiply-adds per weight and step: forward, and what backward adds


def measure(backends: tuple[str, ...], device: str = "cpu", repeats: int = 7) -> Iterator[list[Row]]:
    """Yield the rows of each work and size: the loop, the reference and the backends, timed in alternation."""
    # Forward reads, reads and writes; backward has six products more, and runs the step again.
    srwm = _Op("srwm_scan", srwm_scan, step_loop, _inputs, lambda size: 3 * size + 4, (3, 6 + 3))
    delta = _Op("delta_scan", delta_scan, delta_loop, _delta_inputs, lambda size: size, (3, 6 + 2))
    for op, sizes, works, acting in (
        (srwm, SIZES, ("forward", "forward+backward"), "acting step"),
        (delta, DELTA_SIZES, ("delta forward", "delta fw+backward"), "delta acting step"),
    ):
        available = tuple(name for name in backends if name in FUSED[op.name])
        for size in sizes:
            for work in works:
                yield _compare(op, work, size, available, device, repeats)
        for size in ACTING:
            yield _compare(op, acting, size, available, device, repeats)


def _compare(op: _Op, work: str, size: Size, backends: tuple[str, ...], device: str, repeats: int) -> list[Row]:
    n_steps, batch, heads, head_size = size
    inputs = op.inputs(size, device)
    runs = {"loop": op.loop, "reference": op.function, **dict.fromkeys(backends, op.function)}
    truth = _run(op.function, work, [t.double() for t in inputs], "reference")
    errors = {name: _error(_run(function, work, inputs, name), truth) for name, function in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    macs = []
    calls = 20 if n_steps == 1 else 1  # one step is too short to time alone
    for _ in range(repeats):
        macs.append(_seconds_per_mac(device))
        for name, function in runs.items():
            seconds[name].append(_clock(partial(_run, function, work, inputs, name), device, calls))
    steps = n_steps * batch * heads
    mac_count = head_size * op.columns(head_size) * (op.macs[0] + op.macs[1] * work.endswith("backward"))
    bound = mac_count * min(macs) * 1e9
    median = {name: statistics.median(values) / steps * 1e9 for name, values in seconds.items()}
    return [
        Row(work, size, name, median[name], bound, errors[name], *(median[b] / median[name] for b in _BASES))
        if errors[name] <= MAX_ERROR
        else Row(work, size, name, None, bound, errors[name])
        for name in runs
    ]


_BASES = ("reference", "loop")


def _inputs(size: Size, device: str) -> list[Tensor]:
    n_steps, batch, heads, head_size = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).softmax(-1)
    weight = torch.randn(heads, head_size, 3 * head_size + 4, generator=generator) / head_size**0.5
    starts = torch.rand(n_steps, batch, generator=generator) < 0.02
    shift = 0.1 * torch.randn(batch, *weight.shape, generator=generator)
    return [x.to(device), weight.to(device), shift.to(device), starts.float().to(device)]


def _delta_inputs(size: Size, device: str) -> list[Tensor]:
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
    pairs = zip(ours, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _clock(call: Callable[[], object], device: str, calls: int = 1) -> float:
    # CPU time of a single thread: wall time includes other processes.
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begin = now()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - begin) / calls


def _seconds_per_mac(device: str) -> float:
    n = 512 if device == "cpu" else 4096
    a = torch.ones(n, n, device=device)
    return _clock(lambda: a @ a, device) / n**3
