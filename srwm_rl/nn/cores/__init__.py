"""The registry of cores by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.lazy import import_own_module
from srwm_rl.nn.cores.base import Core
from srwm_rl.nn.cores.check import check_core
from srwm_rl.nn.cores.feedforward import FeedForwardCore
from srwm_rl.nn.cores.prototype import PrototypeCore
from srwm_rl.nn.cores.recurrent import GRUCore, LSTMCore
from srwm_rl.nn.cores.srwm import DeltaCore, FakeSRCore, SRDeltaCore, SRWMCore, SRWMNoCarryCore

__all__ = ["Core", "check_core", "core_names", "import_core", "make_core", "register_core"]

# Cores for some tasks alone, which `core_names` leaves out.
_SPECIAL: dict[str, type[Core]] = {"prototype": PrototypeCore}

CoreClass = TypeVar("CoreClass", bound=type[Core])

_CORES: dict[str, type[Core]] = {
    "srwm": SRWMCore,
    "srwm_no_carry": SRWMNoCarryCore,
    "sr_delta": SRDeltaCore,
    "fake_sr": FakeSRCore,
    "delta": DeltaCore,
    "lstm": LSTMCore,
    "gru": GRUCore,
    "feedforward": FeedForwardCore,
}
# Settings that are whole numbers of at least 1, and their bounds, far above any useful value.
_COUNTS = {"hidden_size": 2**16, "n_layers": 2**10, "n_heads": 2**16, "ff_size": 2**20}


def core_names() -> tuple[str, ...]:
    """Return every name that `make_core` accepts for any task; "prototype" is for few-shot episodes alone."""
    return tuple(_CORES)


def register_core(name: str) -> Callable[[CoreClass], CoreClass]:
    """Make a `Core` subclass usable wherever a core name is accepted (as a class decorator).

    Its constructor takes `input_size` first, then settings by keyword.

    Raises:
        UserError: the name is taken, or the class is no subclass of `Core`.
    """

    def register(core_class: CoreClass) -> CoreClass:
        if taken := (_CORES | _SPECIAL).get(name):
            raise UserError(f"a core named {name!r} exists already ({taken.__qualname__}); choose another name")
        if not issubclass(core_class, Core):
            raise UserError(
                f"{core_class.__qualname__} must be a subclass of srwm_rl.Core to be registered as {name!r}"
            )
        _CORES[name] = core_class
        return core_class

    return register


def import_core(target: str) -> str:
    """Import the core `"my_module:MyCore"` and register it under that string.

    The module is looked for in the current folder first. Importing runs the module's code; `make_core` and `load` never
    import, so call this before you load a model with such a core.

    Returns:
        `target`, the registered name.

    Raises:
        UserError: no such module or class, its code fails, or the class is no subclass of `Core`.
    """
    if target in _CORES:
        return target
    module_name, _, class_name = target.partition(":")
    if not module_name or not class_name:
        raise UserError(f"a core to import is written my_module:MyCore, not {target!r}")
    module = import_own_module(module_name, f"core {target!r}")
    core_class = getattr(module, class_name, None)
    if not isinstance(core_class, type):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Core)]
        raise UserError(
            f"core {target!r}: {module_name} has no class {class_name!r}{did_you_mean(class_name, classes)}"
        )
    register_core(target)(core_class)
    return target


def make_core(name: str, input_size: int, **settings: Any) -> Core:
    """Build the core called `name` for features of width `input_size`.

    Raises:
        UserError: an unknown name or setting (the message suggests the nearest one), or a setting out of range.
    """
    if not isinstance(name, str):
        raise UserError(
            f"a core is given by its name, not as {name!r}: a class of your own gets one by "
            "@srwm_rl.register_core('my_core')"
        )
    if name not in _CORES and ":" in name:
        raise UserError(
            f"core {name!r} is not imported: call srwm_rl.import_core({name!r}) first, or give --core {name} on the "
            "command line, if you trust that code to run"
        )
    core_class = _core_class(name)
    known = core_class.setting_defaults()
    if known is not None:
        check_settings(f"core {name!r}", settings, known)
    for setting, value in settings.items():
        if setting not in _COUNTS or value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _COUNTS[setting]:
            raise UserError(
                f"core {name!r}: {setting} must be a whole number from 1 to {_COUNTS[setting]}, not {value!r}"
            )
    return core_class(input_size, **settings)


def core_defaults(name: str) -> dict[str, Any]:
    """Return the settings of the core called `name` that have defaults; none if its constructor takes any.

    Raises:
        UserError: an unknown name.
    """
    known = _core_class(name).setting_defaults() or {}
    return {setting: value for setting, value in known.items() if value is not inspect.Parameter.empty}


def _core_class(name: str) -> type[Core]:
    core_class = (_CORES | _SPECIAL).get(name)
    if core_class is None:
        raise UserError(f"unknown core {name!r}{did_you_mean(name, _CORES)}")
    return core_class
