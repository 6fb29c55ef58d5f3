"""Agents whose memory is a network that rewrites its own weights (SRWM), for Gymnasium and Stable-Baselines3.

Importing it registers the environments with Gymnasium; torch is imported on first use.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from srwm_rl.lazy import lazy_exports

if TYPE_CHECKING:
    from srwm_rl.errors import UserError as UserError
    from srwm_rl.nn.cores import Core as Core
    from srwm_rl.nn.cores import check_core as check_core
    from srwm_rl.nn.cores import core_names as core_names
    from srwm_rl.nn.cores import import_core as import_core
    from srwm_rl.nn.cores import make_core as make_core
    from srwm_rl.nn.cores import register_core as register_core
    from srwm_rl.nn.policy import SRWMPolicy as SRWMPolicy
    from srwm_rl.ops import delta_scan as delta_scan
    from srwm_rl.ops import srwm_scan as srwm_scan
    from srwm_rl.storage.model_file import Agent as Agent
    from srwm_rl.storage.model_file import load as load
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "errors": "UserError",
            "nn.cores": "Core check_core core_names import_core make_core register_core",
            "nn.policy": "SRWMPolicy",
            "ops": "delta_scan srwm_scan",
            "storage.model_file": "Agent load",
        },
    )

__version__ = "0.1.0"


def _silence_gym() -> None:
    # SB3 and ProcGen import the unmaintained `gym`, which prints a notice from this module.
    if "gym" not in sys.modules:
        notices = ModuleType("gym_notices.notices")
        notices.notices = {}  # type: ignore[attr-defined]
        sys.modules.setdefault("gym_notices.notices", notices)


_silence_gym()


def _register_envs() -> None:
    # Here, because gymnasium.make("srwm_rl:procgen-coinrun-v0") imports this module only.
    from srwm_rl.envs.registration import register_envs

    register_envs()


_register_envs()
