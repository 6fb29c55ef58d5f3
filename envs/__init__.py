"""Environments: ProcGen, small memory tasks and any Gymnasium id, stepped in batches, for Stable-Baselines3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srwm_rl.lazy import lazy_exports

if TYPE_CHECKING:
    from srwm_rl.envs.batch import BatchEnv as BatchEnv
    from srwm_rl.envs.batch import BatchStep as BatchStep
    from srwm_rl.envs.gym_envs import BatchGymEnv as BatchGymEnv
    from srwm_rl.envs.gym_vector_env import BatchGymVectorEnv as BatchGymVectorEnv
    from srwm_rl.envs.gymnasium_batch import GymnasiumBatch as GymnasiumBatch
    from srwm_rl.envs.levels import LevelRange as LevelRange
    from srwm_rl.envs.make import EnvSpec as EnvSpec
    from srwm_rl.envs.make import list_envs as list_envs
    from srwm_rl.envs.make import make_batch_env as make_batch_env
    from srwm_rl.envs.make import make_levels_env as make_levels_env
    from srwm_rl.envs.make import make_vec_env as make_vec_env
    from srwm_rl.envs.make import normalizer as normalizer
    from srwm_rl.envs.make import resolve as resolve
    from srwm_rl.envs.procgen.batch import ProcgenBatch as ProcgenBatch
    from srwm_rl.envs.procgen.games import GAME_SETS as GAME_SETS
    from srwm_rl.envs.procgen.games import GAMES as GAMES
    from srwm_rl.envs.procgen.games import MODE_GAMES as MODE_GAMES
    from srwm_rl.envs.procgen.published import PROCGEN_NORMALIZATION as PROCGEN_NORMALIZATION
    from srwm_rl.envs.registration import register_envs as register_envs
    from srwm_rl.envs.tasks import TASKS as TASKS
    from srwm_rl.envs.tasks import BanditBatch as BanditBatch
    from srwm_rl.envs.tasks import RecallBatch as RecallBatch
    from srwm_rl.envs.vec_env import BatchVecEnv as BatchVecEnv
    from srwm_rl.envs.vec_env import ProcgenVecEnv as ProcgenVecEnv
    from srwm_rl.envs.wrappers.attempts import AttemptsBatch as AttemptsBatch
    from srwm_rl.envs.wrappers.fixed_levels import LevelsVecEnv as LevelsVecEnv
    from srwm_rl.envs.wrappers.flat_observation import FlatDictObservation as FlatDictObservation
    from srwm_rl.envs.wrappers.frame_stack import FrameStackBatch as FrameStackBatch
    from srwm_rl.envs.wrappers.grouped import GroupedVecEnv as GroupedVecEnv
    from srwm_rl.envs.wrappers.memory_inputs import VecMemoryInputs as VecMemoryInputs
    from srwm_rl.envs.wrappers.named_wrapper import NamedWrapper as NamedWrapper
    from srwm_rl.envs.wrappers.one_hot_image import OneHotImage as OneHotImage
    from srwm_rl.envs.wrappers.shuffled_actions import ShuffledActionsBatch as ShuffledActionsBatch
else:
    # The adapters to SB3 import torch.
    __getattr__, __dir__, __all__ = lazy_exports(__name__)
