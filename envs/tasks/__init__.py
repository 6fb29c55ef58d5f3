"""Small built-in memory tasks; `TASKS` maps a name to its class, and one more row adds a task."""

from __future__ import annotations

from srwm_rl.envs.tasks.bandit import BanditBatch
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.envs.tasks.parity import ParityBatch
from srwm_rl.envs.tasks.recall import RecallBatch
from srwm_rl.envs.tasks.repeat_previous import RepeatPreviousBatch

TASKS: dict[str, type[TaskBatch]] = {
    "recall": RecallBatch,
    "bandit": BanditBatch,
    "parity": ParityBatch,
    "repeat_previous": RepeatPreviousBatch,
}

TASK_IDS = {f"srwm_rl/{task.__name__.removesuffix('Batch')}-v0": name for name, task in TASKS.items()}
"""The tasks' Gymnasium ids, as `srwm_rl/Recall-v0`."""

__all__ = ["TASKS", "TASK_IDS", "BanditBatch", "ParityBatch", "RecallBatch", "RepeatPreviousBatch", "TaskBatch"]
