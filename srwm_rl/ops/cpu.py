"""The CPU backend: loads the C library of `csrc/` and calls it on the tensors' memory, with torch's own threads."""

from __future__ import annotations

import ctypes
import sys
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srwm_rl.ops.registration import (
    DELTA_INPUTS,
    SRWM_INPUTS,
    Inputs,
    Outputs,
    delta_widths,
    new_gradients,
    new_outputs,
    register_scan,
    srwm_widths,
)

VERSION = 13  # srwm_cpu_version() in csrc/srwm_cpu.c
DTYPES = (torch.float32, torch.float64)
REBUILD = "with a C compiler at hand, install the package again"
_COUNTS = ("T", "B", "H", "D", "E", "grain", "next")
_OUTPUTS = ("y", "final", "checkpoints", "grad_y", "grad_final", "grad_x", "grad_weight", "grad_shift")
_RETENTION = ("retention", "grad_retention")
_DELTA = ("value", "query", "rate", "grad_value", "grad_query", "grad_rate")
# The fields of the differentiable inputs, by recurrence.
_SRWM_FIELDS, _DELTA_FIELDS = ("x", "weight", "retention", "shift"), ("x", "value", "query", "rate", "shift")
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
                library.srwm_cpu_tile_cnn,
                library.srwm_cpu_vector_cnn,
            ):
                function.argtypes = (ctypes.c_void_p, *threading)
            for function in (library.srwm_cpu_short_conv_forward, library.srwm_cpu_short_conv_backward):
                function.argtypes = (ctypes.c_void_p, ctypes.c_int)
                function.restype = None
            library.srwm_cpu_has_tiles.argtypes = ()
            library.srwm_cpu_cnn_kept.argtypes = (ctypes.c_void_p, ctypes.c_int)
            library.srwm_cpu_cnn_kept.restype = ctypes.c_int64
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


def _run(
    fields: tuple[str, ...], inputs: Inputs, width: int, columns: int, bound: float | None, **more: Tensor | None
) -> None:
    """Run the C kernel on `inputs`, which are the `fields` of `Job`, and on `more`, contiguous outputs among them."""
    kernel, x = load_kernel(), inputs[0]
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    assert x is not None
    job = _Job(*x.shape, width, bound=bound or 0.0)
    tensors = dict(zip(fields, inputs, strict=True), **more)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in packed.items():
        setattr(job, name, tensor.data_ptr())
    cost = x.numel() * columns * _NS_PER_WEIGHT
    threads = n_threads() if cost > _NS_WORTH_THREADS else 1
    is_double = int(x.dtype == torch.float64)
    if kernel.library.srwm_cpu_scan(ctypes.byref(job), is_double, kernel.level, threads, kernel.parallel):
        raise MemoryError(f"no memory for the C kernel's work space of head size {x.shape[-1]}")


def _forward(fields: tuple[str, ...], widths: Any, *arguments: Any) -> Outputs:
    """Return `y`, the final state and, with `keep`, the state at every `CHUNK`-th step."""
    *inputs, starts, bound, keep = arguments
    width, columns = widths(*inputs)
    y, final, checkpoints = new_outputs(inputs[0], width, columns, keep)
    stored = checkpoints if len(checkpoints) else None
    _run(fields, inputs, width, columns, bound, starts=starts, y=y, final=final, checkpoints=stored)
    return y, final, checkpoints


def _backward(fields: tuple[str, ...], widths: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, empty for those that are None."""
    *inputs, starts, bound, checkpoints, grad_y, grad_final = arguments
    gradients = dict(zip(fields, new_gradients(inputs), strict=True))
    if "weight" in fields:  # per batch entry: the order of the sum is then fixed
        gradients["weight"] = inputs[0].new_empty(inputs[0].shape[1], *inputs[1].shape)
    outputs = {f"grad_{name}": grad for (name, grad), x in zip(gradients.items(), inputs, strict=True) if x is not None}
    upstream: dict[str, Any] = {"starts": starts, "grad_y": grad_y, "grad_final": grad_final}
    width, columns = widths(*inputs)
    _run(fields, inputs, width, columns, bound, checkpoints=checkpoints, **upstream, **outputs)
    if "weight" in fields:
        gradients["weight"] = gradients["weight"].sum(0)
    return tuple(gradients.values())


# Arguments and results as in `register_scan`.
forward, backward = partial(_forward, _SRWM_FIELDS, srwm_widths), partial(_backward, _SRWM_FIELDS, srwm_widths)
scan = register_scan("scan_cpu", SRWM_INPUTS, srwm_widths, forward, backward)
delta_forward = partial(_forward, _DELTA_FIELDS, delta_widths)
delta_backward = partial(_backward, _DELTA_FIELDS, delta_widths)
delta_scan = register_scan("delta_cpu", DELTA_INPUTS, delta_widths, delta_forward, delta_backward)
