"""Registration of `procgen-<game>-v0` and `srwm_rl/<Task>-v0` with Gymnasium; `import srwm_rl` does it."""

from __future__ import annotations

import gymnasium

from srwm_rl.envs.procgen.games import PROCGEN_IDS
from srwm_rl.envs.tasks import RENDERED_TASKS, TASK_IDS

_MODULE = "srwm_rl.envs.gym_envs"


def register_envs() -> None:
    """Register all ids; those that are registered already stay as they are."""
    ids = [(env_id, "Procgen", {"game": game}) for env_id, game in PROCGEN_IDS.items()]
    ids += [
        (env_id, "RenderedTask" if task in RENDERED_TASKS else "Task", {"task": task})
        for env_id, task in TASK_IDS.items()
    ]
    for env_id, kind, kwargs in ids:
        if env_id not in gymnasium.registry:
            env, vector = f"{_MODULE}:{kind}GymEnv", f"{_MODULE}:{kind}GymVectorEnv"
            gymnasium.register(env_id, entry_point=env, vector_entry_point=vector, kwargs=kwargs)
