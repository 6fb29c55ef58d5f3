"""Environments: ProcGen, small memory tasks and any Gymnasium id, stepped in batches, for Stable-Baselines3."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srwm_rl.envs.batch import BatchEnv, BatchStep
    from srwm_rl.envs.gym_envs import BatchGymEnv, BatchGymVectorEnv
    from srwm_rl.envs.gymnasium_batch import GymnasiumBatch
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.envs.make import (
        EnvSpec,
        list_envs,
        make_batch_env,
        make_levels_env,
        make_vec_env,
        normalizer,
        resolve,
    )
    from srwm_rl.envs.procgen.batch import ProcgenBatch
    from srwm_rl.envs.procgen.games import GAMES, MODE_GAMES, PRESETS
    from srwm_rl.envs.procgen.scores import PROCGEN_NORMALIZATION
    from srwm_rl.envs.registration import register_envs
    from srwm_rl.envs.tasks import TASKS, BanditBatch, RecallBatch
    from srwm_rl.envs.vec_env import BatchVecEnv, ProcgenVecEnv
    from srwm_rl.envs.wrappers.fixed_levels import LevelsVecEnv
    from srwm_rl.envs.wrappers.grouped import GroupedVecEnv
    from srwm_rl.envs.wrappers.memory_inputs import VecMemoryInputs

_MODULES = {
    "batch": ("BatchEnv", "BatchStep"),
    "gym_envs": ("BatchGymEnv", "BatchGymVectorEnv"),
    "wrappers.grouped": ("GroupedVecEnv",),
    "gymnasium_batch": ("GymnasiumBatch",),
    "wrappers.memory_inputs": ("VecMemoryInputs",),
    "levels": ("LevelRange",),
    "wrappers.fixed_levels": ("LevelsVecEnv",),
    "make": (
        "EnvSpec",
        "list_envs",
        "make_batch_env",
        "make_levels_env",
        "make_vec_env",
        "normalizer",
        "resolve",
    ),
    "procgen.batch": ("ProcgenBatch",),
    "procgen.games": ("GAMES", "MODE_GAMES", "PRESETS"),
    "procgen.scores": ("PROCGEN_NORMALIZATION",),
    "registration": ("register_envs",),
    "tasks": ("TASKS", "BanditBatch", "RecallBatch"),
    "vec_env": ("BatchVecEnv", "ProcgenVecEnv"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GAMES",
    "MODE_GAMES",
    "PRESETS",
    "PROCGEN_NORMALIZATION",
    "TASKS",
    "BanditBatch",
    "BatchEnv",
    "BatchGymEnv",
    "BatchGymVectorEnv",
    "BatchStep",
    "BatchVecEnv",
    "EnvSpec",
    "GroupedVecEnv",
    "GymnasiumBatch",
    "LevelRange",
    "LevelsVecEnv",
    "ProcgenBatch",
    "ProcgenVecEnv",
    "RecallBatch",
    "VecMemoryInputs",
    "list_envs",
    "make_batch_env",
    "make_levels_env",
    "make_vec_env",
    "normalizer",
    "register_envs",
    "resolve",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the SB3 adapters bring torch with them, which the command line's --help cannot wait for.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
