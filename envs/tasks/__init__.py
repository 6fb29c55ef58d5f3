"""Small built-in memory tasks; `TASKS` maps a name to its class, and one more row adds a task."""

from __future__ import annotations

from srwm_rl.envs.tasks.associative_recall import AssociativeRecallBatch
from srwm_rl.envs.tasks.bandit import BanditBatch
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.envs.tasks.hidden_controls import HiddenControlsBatch
from srwm_rl.envs.tasks.mdp import MDPBatch
from srwm_rl.envs.tasks.parity import ParityBatch
from srwm_rl.envs.tasks.recall import RecallBatch
from srwm_rl.envs.tasks.repeat_previous import RepeatPreviousBatch

TASKS: dict[str, type[TaskBatch]] = {
    "recall": RecallBatch,
    "bandit": BanditBatch,
    "parity": ParityBatch,
    "repeat_previous": RepeatPreviousBatch,
    "associative_recall": AssociativeRecallBatch,
    "hidden_controls": HiddenControlsBatch,
    "mdp": MDPBatch,
    "fewshot": FewShotBatch,
}

TASK_IDS = {f"srwm_rl/{task.__name__.removesuffix('Batch')}-v0": name for name, task in TASKS.items()}
"""The tasks' Gymnasium ids, as `srwm_rl/Recall-v0`."""

RENDERED_TASKS = ("hidden_controls",)
"""The tasks with pictures, for `render_mode="rgb_array"`."""

__all__ = [
    "RENDERED_TASKS",
    "TASKS",
    "TASK_IDS",
    "AssociativeRecallBatch",
    "BanditBatch",
    "FewShotBatch",
    "HiddenControlsBatch",
    "MDPBatch",
    "ParityBatch",
    "RecallBatch",
    "RepeatPreviousBatch",
    "TaskBatch",
]
