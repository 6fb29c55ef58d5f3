"""Trainers and evaluation; imports `srwm_rl`, never `srwm_rl.envs`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srwm_rl.agents.impala import IMPALA
    from srwm_rl.agents.ppo import PPO

__all__ = ["IMPALA", "PPO"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"srwm_rl.agents.{name.lower()}"), name)
    raise AttributeError(f"module 'srwm_rl.agents' has no attribute {name!r}")
