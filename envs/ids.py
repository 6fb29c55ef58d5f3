"""Gymnasium ids of the games and tasks."""

from __future__ import annotations

from srwm_rl.envs.procgen.games import GAMES

TASK_IDS = {
    "srwm_rl/Recall-v0": "recall",
    "srwm_rl/Bandit-v0": "bandit",
    "srwm_rl/Parity-v0": "parity",
    "srwm_rl/RepeatPrevious-v0": "repeat_previous",
}
"""The built-in tasks' Gymnasium ids."""

PROCGEN_IDS = {f"procgen-{game}-v0": game for game in GAMES}
"""The games' Gymnasium ids, the same as in the original package."""
