"""Memories by name. A new one is a class and a row in the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from srwm_rl.cores.base import Core
from srwm_rl.cores.feedforward import FeedForwardCore
from srwm_rl.cores.lstm import LSTMCore
from srwm_rl.cores.srwm import SRWMCore
from srwm_rl.errors import UserError, check_settings, did_you_mean

__all__ = ["Core", "core_names", "make_core", "register_core"]

CoreClass = TypeVar("CoreClass", bound=type[Core])

_CORES: dict[str, type[Core]] = {"srwm": SRWMCore, "lstm": LSTMCore, "feedforward": FeedForwardCore}


def core_names() -> tuple[str, ...]:
    """Return every name that `make_core` accepts."""
    return tuple(_CORES)


def register_core(name: str) -> Callable[[CoreClass], CoreClass]:
    """Make a `Core` subclass usable wherever a core name is accepted (as a class decorator).

    Its constructor takes `input_size` first, then settings by keyword.

    Raises:
        UserError: the name is taken, or the class is no `Core`.
    """

    def register(core_class: CoreClass) -> CoreClass:
        if name in _CORES:
            raise UserError(f"a core named {name!r} exists already ({_CORES[name].__qualname__}); choose another name")
        if not issubclass(core_class, Core):
            raise UserError(
                f"{core_class.__qualname__} must be a subclass of srwm_rl.Core to be registered as {name!r}"
            )
        _CORES[name] = core_class
        return core_class

    return register


def make_core(name: str, input_size: int, **settings: Any) -> Core:
    """Build the core called `name` for features of width `input_size`.

    Raises:
        UserError: an unknown name or setting (the nearest known one is suggested), or a setting out of range.
    """
    if name not in _CORES:
        raise UserError(f"unknown core {name!r}{did_you_mean(name, _CORES)}")
    known = [p for p in inspect.signature(_CORES[name]).parameters if p != "input_size"]
    check_settings(f"core {name!r}", settings, known)
    for setting, value in settings.items():
        if setting in _COUNTS and value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"core {name!r}: {setting} must be a whole number of at least 1, not {value!r}")
    return _CORES[name](input_size, **settings)


_COUNTS = ("hidden_size", "n_layers", "n_heads", "ff_size")
