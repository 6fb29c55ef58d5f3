"""Which levels a run is tested on."""

from __future__ import annotations

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.envs.tasks import TASKS
from srwm_rl.scripts.config.settings import TrainConfig


def tested_range(trained: TrainConfig) -> LevelRange:
    """Return the levels that a run is tested on: those it was started with, unless its task has others for tests."""
    held_out, spec = LevelRange.parse(trained.eval_levels), resolve(trained.env)
    return TASKS[spec.names[0]].test_levels(held_out) if spec.kind == "task" else held_out
