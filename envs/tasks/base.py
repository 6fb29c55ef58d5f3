"""What the built-in tasks share: levels, clocks, autoreset and exact state."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.batch import Array, BatchStep, SampledLevelsEnv, State, check_seed
from srwm_rl.envs.levels import BoolArray, IntArray

FloatArray = npt.NDArray[np.float32]


class TaskBatch(SampledLevelsEnv):
    """Run a task whose episodes are a function of (level, step, action), for all environments at once.

    A subclass gives `name`, `_read_levels`, `_observe` and `_play`; everything that an episode contains is hashed from
    its level, so the levels and the clocks are the whole state.
    """

    name: ClassVar[str]
    supports_state = True
    memory_inputs: ClassVar[tuple[str, ...]] = ("action", "reward", "step")
    """What `VecMemoryInputs` may add without giving the task's answer away."""

    @property
    def game_names(self) -> list[str]:
        """Name the game that each environment plays, `[n]`."""
        return [self.name] * self.n_envs

    @classmethod
    @abstractmethod
    def score_range(cls, **settings: int) -> tuple[float, float] | None:
        """Return the mean returns of a random and of the best possible agent, or None where that is not known."""

    @abstractmethod
    def _read_levels(self) -> None:
        """Work out what the current levels contain; called whenever they change."""

    @abstractmethod
    def _observe(self) -> FloatArray:
        """Return the observations of the current levels and clocks, `[n, ...]`."""

    @abstractmethod
    def _play(self, actions: IntArray) -> tuple[FloatArray, BoolArray, BoolArray]:
        """Return rewards, "this was the last step" and "solved", each `[n]`, of `actions` at the current clocks."""

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        rewards, done, solved = self._play(self.check_actions(actions))
        self._fresh = False
        self._clock += 1
        final_obs = None
        previous = self._level.copy()
        if done.any():
            final_obs = self._observe()
            self._begin(done)
        info: dict[str, Array] = {"level_seed": self._level.copy(), "prev_level_seed": previous}
        if self.solvable:
            info["is_success"] = solved
        return BatchStep(self._observe(), rewards, done, np.zeros(self.n_envs, np.bool_), info, final_obs)

    def observe(self) -> FloatArray:
        """Return the current observations without stepping."""
        return self._observe()

    def _begin_episodes(self, mask: BoolArray) -> None:
        self._read_levels()

    def _settings(self) -> tuple[str, ...]:
        return ("settings",)

    def _get_state(self) -> State:
        return {
            "settings": repr((self.observation_space, self.action_space, *self._task_settings())),
            "seed": self.seed,
            "fresh": int(self._fresh),
            "level": self._level.copy(),
            "clock": self._clock.copy(),
            "counts": self._sampler.counts.copy(),
            "pins": self._sampler.pins.copy(),
        }

    @abstractmethod
    def _task_settings(self) -> tuple[int, ...]:
        """Return the settings that decide what a level contains."""

    def _set_state(self, state: State) -> None:
        self.seed = self._sampler.seed = check_seed(state["seed"])
        self._fresh = bool(state["fresh"])
        self._level = state["level"].copy()
        self._clock = state["clock"].copy()
        self._sampler.counts = state["counts"].copy()
        self._sampler.pins = state["pins"].copy()
        self._read_levels()
