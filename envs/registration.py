"""Registration of `procgen-<game>-v0` and `srwm_rl/<Task>-v0` with Gymnasium; `import srwm_rl` does it."""

from __future__ import annotations

import gymnasium

from srwm_rl.envs.ids import PROCGEN_IDS, TASK_IDS

_MODULE = "srwm_rl.envs.gym_envs"


def register_envs() -> None:
    """Register all ids; those that are registered already stay as they are."""
    for env_id, game in PROCGEN_IDS.items():
        _register(env_id, "ProcgenGym", {"game": game})
    for env_id, task in TASK_IDS.items():
        _register(env_id, "TaskGym", {"task": task})


def _register(env_id: str, name: str, kwargs: dict[str, str]) -> None:
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point=f"{_MODULE}:{name}Env",
            vector_entry_point=f"{_MODULE}:{name}VectorEnv",
            kwargs=kwargs,
        )
