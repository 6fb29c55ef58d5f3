"""The CPU backend: loads the C library of `csrc/` and calls it on the tensors' memory, with torch's own threads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srwm_rl.ops.registration import (
    DELTA_INPUTS,
    SRWM_INPUTS,
    Outputs,
    delta_widths,
    new_gradients,
    new_outputs,
    register_scan,
    srwm_widths,
)

VERSION = 10  # srwm_cpu_version() in csrc/srwm_cpu.c
DTYPES = (torch.float32, torch.float64)
LEVELS = ("portable", "AVX2", "AVX-512")
REBUILD = "with a C compiler at hand, install the package again"
# The approximate time of one weight in one step, and the shortest job for which a second thread pays.
_NS_PER_WEIGHT, _NS_WORTH_THREADS = 0.15, 50_000
_threads: int | None = None
Scan = Callable[..., tuple[Tensor, Tensor]]
ForwardFn = Callable[..., Outputs]
BackwardFn = Callable[..., tuple[Tensor, ...]]


def c_fields(**names: str) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a C structure in order, from their names by type."""
    return tuple((name, getattr(ctypes, f"c_{kind}")) for kind, group in names.items() for name in group.split())


class _Job(ctypes.Structure):
    """`Job` of csrc/srwm_cpu.c."""

    _fields_ = c_fields(
        int64="T B H D E grain next",
        double="bound",
        void_p="x weight shift starts y final checkpoints grad_y grad_final grad_x grad_weight grad_shift "
        "retention grad_retention value query rate grad_value grad_query grad_rate",
        int="is_double failed",
    )


class Kernel(NamedTuple):
    """The loaded library, the instruction set to use (an index of `LEVELS`), and torch's OpenMP entry or 0."""

    library: ctypes.CDLL
    level: int
    parallel: int


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
            for name in ("scan", "program_forward", "program_backward", "max_pool"):
                # The job, the level, the number of threads, OpenMP's entry.
                arguments = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
                getattr(library, f"srwm_cpu_{name}").argtypes = arguments
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


def call(function: str, job: ctypes.Structure, threads: int) -> None:
    """Run a function of the library on its structure, with at most so many threads.

    Raises:
        RuntimeError: the library is not available.
        MemoryError: no memory for its work space.
    """
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    if getattr(kernel.library, f"srwm_cpu_{function}")(ctypes.byref(job), kernel.level, threads, kernel.parallel):
        raise MemoryError("no memory for the C kernel's work space")


def _register(name: str, inputs: str, widths: Callable[..., tuple[int, int]]) -> tuple[Scan, ForwardFn, BackwardFn]:
    """Register a recurrence; return its function, its forward and its backward pass, as of `register_scan`."""
    fields = [argument.split()[-1] for argument in inputs.split(",")]  # of `Job`

    def run(inputs: Sequence[Tensor | None], bound: float | None, **more: Tensor | None) -> None:
        x = inputs[0]
        assert x is not None
        width, columns = widths(*inputs)
        job = _Job(*x.shape, width, bound=bound or 0.0, is_double=x.dtype == torch.float64)
        tensors = dict(zip(fields, inputs, strict=True), **more)
        packed = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in packed.items():
            setattr(job, name, tensor.data_ptr())  # of an empty tensor NULL
        call("scan", job, n_threads() if x.numel() * columns * _NS_PER_WEIGHT > _NS_WORTH_THREADS else 1)

    def forward(*arguments: Any) -> Outputs:
        *inputs, starts, bound, keep = arguments
        y, final, checkpoints = outputs = new_outputs(inputs[0], *widths(*inputs), keep)
        run(inputs, bound, starts=starts, y=y, final=final, checkpoints=checkpoints)
        return outputs

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, starts, bound, checkpoints, grad_y, grad_final = arguments
        grads = {f"grad_{name}": grad for name, grad in zip(fields, new_gradients(inputs), strict=True)}
        if "weight" in fields:  # per batch entry: the order of the sum is then fixed
            grads["grad_weight"] = inputs[0].new_empty(inputs[0].shape[1], *inputs[1].shape)
        upstream = {"starts": starts, "checkpoints": checkpoints, "grad_y": grad_y, "grad_final": grad_final}
        run(inputs, bound, **upstream, **grads)
        if "weight" in fields:
            grads["grad_weight"] = grads["grad_weight"].sum(0)
        return tuple(grads.values())

    return register_scan(name, inputs, widths, forward, backward), forward, backward


scan, forward, backward = _register("scan_cpu", SRWM_INPUTS, srwm_widths)
delta_scan, *_ = _register("delta_cpu", DELTA_INPUTS, delta_widths)
