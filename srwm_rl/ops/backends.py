"""The choice of a backend: the requested one, the device's fused kernel, or the reference with a logged reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.autograd import forward_ad

# By fused backend, the module with its `why_not(device_type, dtype, head_size, width)`.
_MODULES = {"cpu": "srwm_rl.ops.cpu", "triton": "srwm_rl.ops.triton_launch"}
_BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
FUSED: dict[str, tuple[str, ...]] = {"srwm_scan": ("cpu", "triton"), "delta_scan": ("cpu", "triton")}
_preferred: list[str] = []  # by nested `prefer` contexts, innermost last
_log = logging.getLogger(__name__)


@contextmanager
def prefer(backend: str) -> Iterator[None]:
    """Make "auto" this backend inside the context, to compare backends under a whole policy.

    Raises:
        ValueError: by calls inside the context that the backend cannot run.
    """
    _preferred.append(backend)
    try:
        yield
    finally:
        _preferred.pop()


def preferred() -> str:
    """Return the backend of the innermost `prefer`, or "auto"."""
    return _preferred[-1] if _preferred else "auto"


def check_backend(function: str, backend: str) -> None:
    """Raise a `ValueError` unless `function` has a backend of that name."""
    names = ("auto", "reference", *FUSED[function])
    if backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, not {backend!r}")


def choose(function: str, backend: str, device_type: str, dtype: torch.dtype, head_size: int, width: int = 1) -> str:
    """Return the name of the backend that will run; `width`: of the output if it is not the head size.

    Raises:
        ValueError: the requested backend cannot run; the message says why.
    """
    if backend == "auto":
        # Only the reference is made of operations that an exported graph can hold, and that have such derivatives.
        plain = torch.compiler.is_exporting() or is_forward_mode() or is_func_grad()
        backend = "reference" if plain else preferred()
    name = _BACKEND_OF_DEVICE.get(device_type, device_type) if backend == "auto" else backend
    if name == "reference":
        return name
    if name not in FUSED[function]:
        why_not = f"no fused kernel for {device_type} tensors"
    elif is_forward_mode():
        why_not = "it has no forward-mode derivatives"
    elif is_func_grad():
        why_not = "torch.func.grad cannot differentiate it"
    else:
        try:
            why_not = import_module(_MODULES[name]).why_not(device_type, dtype, head_size, width)
        except ImportError as error:
            why_not = f"{error.name or name} cannot be imported"
    if not why_not:
        return name
    if backend != "auto":
        raise ValueError(f"backend {backend!r} cannot run: {why_not}")
    log_fallback(function, why_not)
    return "reference"


def triton_module(name: str, device_type: str) -> Any:
    """Return the module `srwm_rl.ops.<name>` of Triton kernels, or None where they cannot run."""
    if _BACKEND_OF_DEVICE.get(device_type) != "triton":
        return None
    try:
        return import_module(f"srwm_rl.ops.{name}")
    except ImportError:
        return None


def is_forward_mode() -> bool:
    """Return whether `torch.func.jvp` or a dual level of forward-mode differentiation is active.

    An operation registered with torch has no tangent there, without an error.
    """
    return forward_ad._current_level >= 0


def is_func_grad() -> bool:
    """Return whether `torch.func.grad`, `vjp` or `jacrev` is active.

    They cannot differentiate an operation registered with torch.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


# As torch.compiler.assume_constant_result does, without importing torch's compiler, which takes a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def log_fallback(function: str, why_not: str) -> None:
    """Log once per reason that a slow path runs."""
    _log.warning("%s runs step by step in plain PyTorch, which is slow: %s", function, why_not)
