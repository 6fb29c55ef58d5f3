"""The CPU backend: loads the C library of `csrc/` and calls it on the tensors' memory, with torch's own threads."""

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

VERSION = 9  # srwm_cpu_version() in csrc/srwm_cpu.c
DTYPES = (torch.float32, torch.float64)
REBUILD = "with a C compiler at hand, install the package again"
_COUNTS = ("T", "B", "H", "D", "E", "grain", "next")
_OUTPUTS = ("y", "final", "checkpoints", "grad_y", "grad_final", "grad_x", "grad_weight", "grad_shift")
_RETENTION = ("retention", "grad_retention")
_DELTA = ("value", "query", "rate", "grad_value", "grad_query", "grad_rate")
_POINTERS = ("x", "weight", "shift", "starts", *_OUTPUTS, *_RETENTION, *_DELTA)
# The approximate time of one weight in one step, and the shortest job for which a second thread pays.
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
    """The loaded library, the instruction set to use (an index of `LEVELS`), and torch's OpenMP entry or 0."""

    library: ctypes.CDLL
    level: int
    parallel: int


LEVELS = ("portable", "AVX2", "AVX-512")
_threads: int | None = None


def set_threads(n: int | None) -> None:
    """Set the number of threads of the C kernels; None: as many as torch has."""
    global _threads
    _threads = n


def n_threads() -> int:
    """Return the number of threads that a call of the C kernels may use."""
    return _threads or torch.get_num_threads()


@cache
def load_kernel(folder: Path = Path(__file__).parent) -> Kernel | str:
    """Load the library once; return a message if it is not available."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_srwm_cpu{suffix}"
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.srwm_cpu_version() != VERSION:
                return f"the C kernel {path.name} is of another version of the package; {REBUILD}"
            threading = (ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)  # level, threads, OpenMP's entry
            library.srwm_cpu_scan.argtypes = (ctypes.POINTER(_Job), ctypes.c_int, *threading)
            for function in (
                library.srwm_cpu_program_forward,
                library.srwm_cpu_program_backward,
                library.srwm_cpu_max_pool,
            ):
                function.argtypes = (ctypes.c_void_p, *threading)
            library.srwm_cpu_can_max_pool.argtypes = (ctypes.c_int64, ctypes.c_int)
        except (OSError, AttributeError) as error:
            return f"the C kernel cannot be loaded ({error}); {REBUILD}"
        return Kernel(library, library.srwm_cpu_level(), _torch_parallel())
    return f"the C kernel is not built; {REBUILD}"


def _torch_parallel() -> int:
    # torch's OpenMP is among the process's global symbols: torch's threads do the work, none are added.
    if sys.platform == "win32":
        return 0
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


def why_not(device_type: str, dtype: torch.dtype, head_size: int, width: int = 1) -> str | None:
    """Return why this backend cannot run such tensors, or None."""
    if device_type != "cpu":
        return f"x is on {device_type}, not on the CPU"
    if dtype not in DTYPES:
        return f"x is {dtype}; the C kernel takes float32 and float64"
    kernel = load_kernel()
    return kernel if isinstance(kernel, str) else None


def _run(x: Tensor, columns: int, width: int, bound: float | None, **tensors: Tensor | None) -> None:
    """Run the C kernel on tensors named like the fields of `Job`.

    Args:
        x: `[T, B, H, D]`.
        columns: of a head's matrix, to estimate the cost.
        width: of the output.
        bound: of the shift's norm.
        tensors: inputs, made contiguous; contiguous outputs.
    """
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    n_steps, batch, heads, size = x.shape
    job = _Job(n_steps, batch, heads, size, width, bound=bound or 0.0)
    packed = {name: tensor.contiguous() for name, tensor in (("x", x), *tensors.items()) if tensor is not None}
    for name, tensor in packed.items():
        setattr(job, name, tensor.data_ptr())
    cost = x.numel() * columns * _NS_PER_WEIGHT
    threads = n_threads() if cost > _NS_WORTH_THREADS else 1
    is_double = int(x.dtype == torch.float64)
    if kernel.library.srwm_cpu_scan(ctypes.byref(job), is_double, kernel.level, threads, kernel.parallel):
        raise MemoryError(f"no memory for the C kernel's work space of head size {size}")


def _run_forward(
    x: Tensor, columns: int, width: int, bound: float | None, keep: bool, **inputs: Tensor | None
) -> Outputs:
    n_steps, batch, heads, size = x.shape
    y = x.new_empty(n_steps, batch, heads, width)
    final = x.new_empty(batch, heads, size, columns)
    checkpoints = x.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)
    stored = checkpoints if len(checkpoints) else None
    _run(x, columns, width, bound, **inputs, y=y, final=final, checkpoints=stored)
    return y, final, checkpoints


def _empty(like: Tensor | None, x: Tensor) -> Tensor:
    """Return a contiguous tensor for the gradient of `like`, empty if that is None."""
    return x.new_empty(0 if like is None else like.shape)


def forward(
    x: Tensor,
    weight: Tensor,
    retention: Tensor | None,
    shift: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    keep: bool,
) -> Outputs:
    """Return `y`, the final shift and, with `keep`, the shift at every `CHUNK`-th step for `backward`."""
    width, columns = srwm_widths(x, weight)
    inputs = {"weight": weight, "retention": retention, "shift": shift, "starts": starts}
    return _run_forward(x, columns, width, bound, keep, **inputs)


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
    """Return the gradients of `x`, `weight`, `retention` and `shift` (empty for those that are None)."""
    width, columns = srwm_widths(x, weight)
    grad_x, grad_retention, grad_shift = _empty(x, x), _empty(retention, x), _empty(shift, x)
    grad_weight = x.new_empty(x.shape[1], *weight.shape)  # per batch entry: the order of the sum is then fixed
    inputs = {"weight": weight, "retention": retention, "shift": shift, "starts": starts, "checkpoints": checkpoints}
    upstream = {"grad_y": grad_y, "grad_final": grad_final}
    gradients = {
        "grad_x": grad_x,
        "grad_weight": grad_weight,
        "grad_retention": None if retention is None else grad_retention,
        "grad_shift": None if shift is None else grad_shift,
    }
    _run(x, columns, width, bound, **inputs, **upstream, **gradients)
    return grad_x, grad_weight.sum(0), grad_retention, grad_shift


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
    grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if grad or torch.compiler.is_compiling() or type(inputs[0]) is not Tensor:
        y, final, _ = operator(*inputs, starts, *options, grad)
    else:  # acting: torch's dispatcher would take as long as the step
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
    size = key.shape[-1]
    inputs = {"value": value, "query": query, "rate": rate, "shift": weight, "starts": starts}
    return _run_forward(key, size, size, None, keep, **inputs)


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
    """Return the gradients of key, value, query, rate and the initial fast weight (empty if that is None)."""
    size = key.shape[-1]
    inputs = {"value": value, "query": query, "rate": rate, "shift": weight, "starts": starts}
    upstream = {"checkpoints": checkpoints, "grad_y": grad_y, "grad_final": grad_final}
    pairs = {"grad_x": key, "grad_value": value, "grad_query": query, "grad_rate": rate}
    gradients = {name: _empty(tensor, key) for name, tensor in pairs.items()}
    grad_weight = _empty(weight, key)
    _run(key, size, size, None, **inputs, **upstream, **gradients, grad_shift=None if weight is None else grad_weight)
    return *gradients.values(), grad_weight


_delta_operator = register_scan("delta_cpu", DELTA_INPUTS, delta_widths, delta_forward, delta_backward)


def delta_scan(
    key: Tensor, value: Tensor, query: Tensor, rate: Tensor, weight: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the checked arguments of `srwm_rl.ops.delta_scan`; `starts` is uint8."""
    return _call(_delta_operator, delta_forward, (key, value, query, rate, weight), starts)
