"""What the built-in tasks share: spaces, exact state and the form of their episodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import FloatArray, Space, State
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange
from srwm_rl.envs.sampled_levels import SampledLevelsEnv


class TaskBatch(SampledLevelsEnv):
    """Run a task whose episodes are a function of (level, step, action), for all environments at once.

    A subclass gives `games`, `_begin_episodes`, `observe` and `_act`; everything that an episode contains is hashed
    from its level, so the levels, the clocks and what actions change are the whole state. Observations are vectors of
    `n_features` numbers in [0, 1], or of a given space; `settings` are what else decides what a level contains.
    """

    supports_state = True
    memory_inputs: ClassVar[tuple[str, ...]] = ("action", "reward", "step")
    """What `VecMemoryInputs` may add without giving the task's answer away."""
    levels_share_content: ClassVar[bool] = False
    """Whether different levels have something in common that can be learned; see `trained_levels`."""
    draws_controls: ClassVar[bool] = False
    """Whether a level draws already which action does what."""
    best_averages_luck: ClassVar[bool] = False
    """Whether the best mean return of `score_range` averages over luck: more can be earned where the luck of a level is
    known, as in a second attempt at it (`AttemptsBatch`)."""

    def __init__(
        self, n_envs: int, levels: str | LevelRange, seed: int, n_features: int | Space, n_actions: int, *settings: Any
    ) -> None:
        space = spaces.Box(0.0, 1.0, (n_features,), np.float32) if isinstance(n_features, int) else n_features
        super().__init__(n_envs, space, spaces.Discrete(n_actions), levels, seed)
        self._task_settings = repr((self.observation_space, self.action_space, *settings))

    @classmethod
    @abstractmethod
    def score_range(cls, **settings: int) -> tuple[float, float] | None:
        """Return the mean returns of a random and of the best possible agent, or None where that is not known."""

    @classmethod
    def reference_returns(cls, levels: Sequence[int] | IntArray | LevelRange, **settings: Any) -> dict[str, FloatArray]:
        """Return what reference policies earn, by name: the return of one episode of each level, `[len(levels)]`.

        Luck is that of the level, so that the returns can be compared in pairs with an agent's on the same levels.

        Args:
            levels: The levels.
            settings: The task's further arguments, as of the constructor.

        Raises:
            UserError: If a level or a setting is wrong.
        """
        return {}

    @classmethod
    def test_levels(cls, held_out: LevelRange) -> LevelRange:
        """Return the levels that an agent is tested on which holds out `held_out` while it trains: the same ones."""
        return held_out

    @classmethod
    def trained_levels(cls, training: LevelRange, levels: IntArray) -> BoolArray:
        """Return which of `levels` `[n]` have something in common with training levels: those that are among them."""
        return (levels >= training.start) & (levels < training.stop)

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return a name for each number of an observation, for films; (): they have none.

        `settings` are the task's further arguments, as of the constructor.
        """
        return ()

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return a name for each action, for films; (): they have none. `settings` are as of `feature_names`."""
        return ()

    def _settings(self) -> State:
        return {**super()._settings(), "settings": self._task_settings}
