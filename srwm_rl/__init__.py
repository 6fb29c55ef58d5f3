"""Agents whose memory is a network that rewrites its own weights (SRWM), for Gymnasium and Stable-Baselines3.

Importing this registers the environments with Gymnasium and loads nothing heavy; torch arrives with the first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srwm_rl.errors import UserError
    from srwm_rl.nn.cores import Core, check_core, core_names, import_core, make_core, register_core
    from srwm_rl.nn.policy import SRWMPolicy
    from srwm_rl.ops import delta_scan, srwm_scan
    from srwm_rl.storage.model_file import Agent, load

__version__ = "0.1.0"
__all__ = [
    "Agent",
    "Core",
    "SRWMPolicy",
    "UserError",
    "check_core",
    "core_names",
    "delta_scan",
    "import_core",
    "load",
    "make_core",
    "register_core",
    "srwm_scan",
]

_HOMES = {
    "Agent": "srwm_rl.storage.model_file",
    "Core": "srwm_rl.nn.cores",
    "SRWMPolicy": "srwm_rl.nn.policy",
    "UserError": "srwm_rl.errors",
    "check_core": "srwm_rl.nn.cores",
    "core_names": "srwm_rl.nn.cores",
    "delta_scan": "srwm_rl.ops",
    "import_core": "srwm_rl.nn.cores",
    "load": "srwm_rl.storage.model_file",
    "make_core": "srwm_rl.nn.cores",
    "register_core": "srwm_rl.nn.cores",
    "srwm_scan": "srwm_rl.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'srwm_rl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _silence_gym() -> None:
    # SB3 and ProcGen import the retired `gym`, which prints a four-line notice taken from this module.
    if "gym" not in sys.modules:
        notices = ModuleType("gym_notices.notices")
        notices.notices = {}  # type: ignore[attr-defined]
        sys.modules.setdefault("gym_notices.notices", notices)


_silence_gym()


def _register_envs() -> None:
    # Here, not in srwm_rl.envs: gymnasium.make("srwm_rl:procgen-coinrun-v0") imports this module and no other.
    from srwm_rl.envs.registration import register_envs

    register_envs()


_register_envs()
