"""The CPU backend: finds the C kernel of `csrc/`, and calls it on the tensors' memory with torch's own threads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from srwm_rl.ops.registration import (
    CHUNK,
    DELTA_INPUTS,
    SRWM_INPUTS,
    SRWM_OPTION,
    Outputs,
    delta_widths,
    register_scan,
    srwm_widths,
)

VERSION = 7  # srwm_cpu_version() in csrc/srwm_cpu.c
DTYPES = (torch.float32, torch.float64)
REBUILD = "with a C compiler at hand, install the package again"
_COUNTS = ("T", "B", "H", "D", "E", "grain", "next")
_OUTPUTS = ("y", "final", "checkpoints", "grad_y", "grad_final", "grad_x", "grad_weight", "grad_shift")
_RETENTION = ("retention", "grad_retention")
_DELTA = ("value", "query", "rate", "grad_value", "grad_query", "grad_rate")
_POINTERS = ("x", "weight", "shift", "starts", *_OUTPUTS, *_RETENTION, *_DELTA)
# Nanoseconds that one weight costs in one step, roughly, and the shortest job worth waking a second thread for.
_NS_PER_WEIGHT, _NS_WORTH_THREADS = 0.15, 50_000


class _Job(ctypes.Structure):
    """`Job` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("bound", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("failed", ctypes.c_int),
    )


class Kernel(NamedTuple):
    """The loaded library, the best instruction set it may use here (0, 1, 2), and torch's OpenMP entry or 0."""

    library: ctypes.CDLL
    level: int
    parallel: int


LEVELS = ("portable", "AVX2", "AVX-512")
_threads: int | None = None


def set_threads(n: int | None) -> None:
    """Let the C kernels, whose calls are long enough to share, use `n` threads; None: as many as torch has."""
    global _threads
    _threads = n


def n_threads() -> int:
    """Return the number of threads that a call of the C kernels may use."""
    return _threads or torch.get_num_threads()


@cache
def load_kernel(folder: Path = Path(__file__).parent) -> Kernel | str:
    """Load the kernel, once; a string says why there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_srwm_cpu{suffix}"
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.srwm_cpu_version() != VERSION:
                return f"the C kernel {path.name} is of another version of the package; {REBUILD}"
            library.srwm_cpu_run.argtypes = (
                ctypes.POINTER(_Job),
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_uint,
                ctypes.c_void_p,
            )
            for of_struct in (library.srwm_cpu_play, library.srwm_cpu_play_back, library.srwm_cpu_pool):
                of_struct.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
            library.srwm_cpu_pools.argtypes = (ctypes.c_int64, ctypes.c_int)
        except (OSError, AttributeError) as error:
            return f"the C kernel cannot be loaded ({error}); {REBUILD}"
        return Kernel(library, library.srwm_cpu_level(), _torch_parallel())
    return f"the C kernel is not built; {REBUILD}"


def _torch_parallel() -> int:
    # torch loads its OpenMP into the process's global names: its threads then do our work, and none are added.
    if sys.platform == "win32":
        return 0
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


def why_not(device_type: str, dtype: torch.dtype, head_size: int, width: int = 1) -> str | None:
    """Say why this backend cannot take such tensors, whatever their sizes, or return None."""
    if device_type != "cpu":
        return f"x is on {device_type}, not on the CPU"
    if dtype not in DTYPES:
        return f"x is {dtype}; the C kernel takes float32 and float64"
    kernel = load_kernel()
    return kernel if isinstance(kernel, str) else None


def _run(x: Tensor, columns: int, bound: float | None, width: int, **tensors: Tensor | None) -> None:
    """Run the job that the tensors describe, `Job`'s names.

    Beside them go `columns`, of a head's matrix, to log_prob_and_entropy its size, and `width`, of the output.
    """
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    n_steps, batch, heads, size = x.shape
    job = _Job(n_steps, batch, heads, size, width, x=x.data_ptr())
    if bound is not None:
        job.bound = bound
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
    cost = x.numel() * columns * _NS_PER_WEIGHT
    threads = n_threads() if cost > _NS_WORTH_THREADS else 1
    is_double = int(x.dtype == torch.float64)
    if kernel.library.srwm_cpu_run(ctypes.byref(job), is_double, kernel.level, threads, kernel.parallel):
        raise MemoryError(f"no memory for the C kernel's work space of head size {size}")


def forward(
    x: Tensor,
    weight: Tensor,
    retention: Tensor | None,
    shift: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y`, the final shift and, with `keep`, the shift at every `CHUNK`-th step for `backward`."""
    x, weight, retention, shift, starts = _packed(x, weight, retention, shift, starts)
    n_steps, batch, heads, size = x.shape
    columns = weight.shape[-1]
    width = columns - 2 * size - 4
    y = torch.empty_like(x) if width == size else x.new_empty(n_steps, batch, heads, width)
    final = x.new_empty(batch, heads, size, columns)
    checkpoints = x.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)
    kept = checkpoints if keep and n_steps > CHUNK else None
    _run(
        x,
        columns,
        bound,
        width,
        weight=weight,
        retention=retention,
        shift=shift,
        starts=starts,
        y=y,
        final=final,
        checkpoints=kept,
    )
    return y, final, checkpoints


def backward(
    x: Tensor,
    weight: Tensor,
    retention: Tensor | None,
    shift: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, `weight`, `retention` and `shift` (empty where there was none)."""
    x, weight, retention, shift, starts, grad_y, grad_final = _packed(
        x, weight, retention, shift, starts, grad_y, grad_final
    )
    columns = weight.shape[-1]
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(x.shape[1], *weight.shape)  # one for each batch entry: the sum's order is then fixed
    grad_retention = x.new_empty(0) if retention is None else torch.empty_like(retention)
    grad_shift = x.new_empty(0) if shift is None else torch.empty_like(grad_weight)
    _run(
        x,
        columns,
        bound,
        columns - 2 * x.shape[-1] - 4,
        weight=weight,
        retention=retention,
        shift=shift,
        starts=starts,
        checkpoints=checkpoints,
        grad_y=grad_y,
        grad_final=grad_final,
        grad_x=grad_x,
        grad_weight=grad_weight,
        grad_retention=None if retention is None else grad_retention,
        grad_shift=None if shift is None else grad_shift,
    )
    return grad_x, grad_weight.sum(0), grad_retention, grad_shift


def _packed(*tensors):  # type: ignore[no-untyped-def]
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


_operator = register_scan("scan_cpu", SRWM_INPUTS, srwm_widths, forward, backward, SRWM_OPTION)


def scan(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    starts: Tensor | None,
    retention: Tensor | None = None,
    bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the checked arguments of `srwm_scan`; `starts` is uint8."""
    return _call(_operator, forward, (x, weight, retention, shift), starts, bound)


def _call(
    operator: Callable[..., Outputs],
    direct: Callable[..., Outputs],
    inputs: tuple[Tensor | None, ...],
    starts: Tensor | None,
    *options: float | None,
) -> tuple[Tensor, Tensor]:
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if grad or torch.compiler.is_compiling() or type(inputs[0]) is not Tensor:
        y, final, _ = operator(*inputs, starts, *options, grad)
    else:  # acting: torch's dispatcher would cost as much as the step
        y, final, _ = direct(*(None if t is None else t.detach() for t in inputs), starts, *options, keep=False)
    return y, final


def delta_forward(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> Outputs:
    """Return `y`, the final fast weight and, with `keep`, the fast weight at every `CHUNK`-th step."""
    key, value, query, rate, weight, starts = _packed(key, value, query, rate, weight, starts)
    n_steps, batch, heads, size = key.shape
    y = torch.empty_like(key)
    final = key.new_empty(batch, heads, size, size)
    checkpoints = key.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)
    kept = checkpoints if keep and n_steps > CHUNK else None
    inputs = {"value": value, "query": query, "rate": rate, "shift": weight, "starts": starts}
    _run(key, size, None, size, **inputs, y=y, final=final, checkpoints=kept)
    return y, final, checkpoints


def delta_backward(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of key, value, query, rate and the initial fast weight (empty where there was none)."""
    key, value, query, rate, weight, starts, grad_y, grad_final = _packed(
        key, value, query, rate, weight, starts, grad_y, grad_final
    )
    grads = {f"grad_{name}": torch.empty_like(like) for name, like in (("x", key), ("value", value), ("query", query))}
    grads["grad_rate"] = torch.empty_like(rate)
    inputs = {"value": value, "query": query, "rate": rate, "shift": weight, "starts": starts}
    upstream = {"checkpoints": checkpoints, "grad_y": grad_y, "grad_final": grad_final}
    grad_weight = None if weight is None else torch.empty_like(weight)
    size = key.shape[-1]
    _run(key, size, None, size, **inputs, **upstream, **grads, grad_shift=grad_weight)
    return *grads.values(), key.new_empty(0) if grad_weight is None else grad_weight


_delta_operator = register_scan("delta_cpu", DELTA_INPUTS, delta_widths, delta_forward, delta_backward)


def delta_scan(
    key: Tensor, value: Tensor, query: Tensor, rate: Tensor, weight: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the checked arguments of `srwm_rl.ops.delta_scan`; `starts` is uint8."""
    return _call(_delta_operator, delta_forward, (key, value, query, rate, weight), starts)
