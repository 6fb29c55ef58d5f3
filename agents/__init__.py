"""Trainers and evaluation; imports `srwm_rl`, never `srwm_rl.envs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srwm_rl.lazy import lazy_exports

if TYPE_CHECKING:
    from srwm_rl.agents.action_masks import VecActionMasks as VecActionMasks
    from srwm_rl.agents.evaluation.play_levels import play_levels as play_levels
    from srwm_rl.agents.impala import IMPALA as IMPALA
    from srwm_rl.agents.ppo import PPO as PPO
    from srwm_rl.agents.run.callbacks import EditStatsCallback as EditStatsCallback
    from srwm_rl.agents.supervised import Supervised as Supervised
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__)
