"""Trainers and evaluation; imports `srwm_rl`, never `srwm_rl.envs`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srwm_rl.agents.ppo import PPO

__all__ = ["PPO"]


def __getattr__(name: str) -> Any:
    if name == "PPO":
        return import_module("srwm_rl.agents.ppo").PPO
    raise AttributeError(f"module 'srwm_rl.agents' has no attribute {name!r}")
