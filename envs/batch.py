"""The interface of all environments here: `n_envs` stepped together, with same-step autoreset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.envs.levels import MAX_LEVEL, BoolArray, IntArray, LevelRange, LevelSampler, check_levels
from srwm_rl.errors import UserError

Array = npt.NDArray[Any]
Observation = Array | dict[str, Array]
State = dict[str, Any]
"""A simulator's state: numpy arrays, bytes, lists, ints, strings and dicts of these; never a pickle."""


class BatchStep(NamedTuple):
    """The result of one step of all environments.

    `obs[i]` is already the next episode's first observation where `terminated[i] | truncated[i]`. `info` holds one
    array `[n]` per key: `level_seed` (the level of `obs`), `prev_level_seed` (the level the step was played in) and,
    where the game defines it, `is_success` (valid where an episode ended).
    """

    obs: Observation
    rewards: npt.NDArray[np.float32]
    terminated: BoolArray
    truncated: BoolArray
    info: dict[str, Array]
    final_obs: Observation | None = None
    """The last observations of the episodes that ended (other rows mean nothing); None where there are none."""


class BatchEnv(ABC):
    """Step `n_envs` environments together.

    A subclass implements `_reset`, `step`, `observe` and `level_seed`, and `_get_state` and `_set_state` if it sets
    `supports_state`.

    Args:
        n_envs: How many environments.
        observation_space: Of one environment.
        action_space: Of one environment.
        levels: The levels that episodes are drawn from.
        seed: Start of the random level sequences.

    Raises:
        UserError: If `n_envs` or `seed` is out of range, or a space is of a kind that agents cannot use.
    """

    supports_state: bool = False
    """Whether `get_state` and `set_state` work."""
    solvable: bool = False
    """Whether `info["is_success"]` says if an episode was solved."""
    render_mode: str | None = None

    def __init__(
        self,
        n_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        levels: str | LevelRange,
        seed: int,
    ) -> None:
        check_count("n_envs", n_envs)
        check_spaces(observation_space, action_space)
        self.n_envs = int(n_envs)
        self.observation_space = observation_space
        self.action_space = action_space
        self.levels = LevelRange.parse(levels)
        self.seed = check_seed(seed)

    @property
    @abstractmethod
    def game_names(self) -> list[str]:
        """Name the game that each environment plays, `[n]`."""

    def reset(self, mask: BoolArray | None = None, levels: Any = None) -> Observation:
        """Start new episodes in the masked environments (all if None), and leave the others as they are.

        `levels` `[n]` fixes the level of each masked environment, which stays on that level, episode after episode,
        until it is reset without `levels`; then it goes back to its own range and random sequence. Running episodes
        end without a result.

        Args:
            mask: `[n]` bool.
            levels: `[n]` level seeds, in or out of the own range; entries outside the mask are not used.

        Returns:
            The current observations of all environments.

        Raises:
            UserError: If a shape, type or level is wrong.
        """
        if mask is None:
            mask = np.ones(self.n_envs, np.bool_)
        mask = np.asarray(mask)
        if mask.shape != (self.n_envs,) or mask.dtype != np.bool_:
            raise UserError(f"the reset mask must be {self.n_envs} booleans, not {mask.dtype} of shape {mask.shape}")
        return self._reset(mask, None if levels is None else check_levels(levels, self.n_envs))

    @abstractmethod
    def _reset(self, mask: BoolArray, levels: IntArray | None) -> Observation:
        """Do what `reset` promises; the arguments are checked."""

    @abstractmethod
    def step(self, actions: Array) -> BatchStep:
        """Act in every environment.

        Args:
            actions: `[n, ...]`, one action per environment.

        Raises:
            UserError: If the actions do not belong to the action space.
        """

    @abstractmethod
    def observe(self) -> Observation:
        """Return the current observations without stepping."""

    @abstractmethod
    def level_seed(self) -> IntArray:
        """Return the levels being played, `[n]`."""

    def places(self) -> str:
        """Describe the games and levels being played, for the message about a step that does not end."""
        games, levels = self.game_names, self.level_seed().tolist()
        shown = [f"{game} level {level}" for game, level in zip(games, levels, strict=True)][:8]
        return f"the environments are in {', '.join(shown)}{', ...' if self.n_envs > 8 else ''}"

    @abstractmethod
    def reseed(self, seed: int) -> None:
        """Start over exactly as a new instance with this seed would; call `reset` next."""

    def render(self) -> npt.NDArray[np.uint8]:
        """Return a picture `[n, height, width, 3]` of every environment.

        Raises:
            UserError: If the environments were not made with `render_mode="rgb_array"`.
        """
        raise UserError("these environments have no pictures; make them with render_mode='rgb_array' where they can")

    def get_state(self) -> State:
        """Return everything that decides what happens next, without pickles.

        Raises:
            UserError: If this simulator cannot save its state.
        """
        if not self.supports_state:
            raise UserError(f"{self.game_names[0]} cannot save its state; resume at an episode's start instead")
        return {
            "n_envs": self.n_envs,
            "games": list(dict.fromkeys(self.game_names)),
            "levels": str(self.levels),
            **self._get_state(),
        }

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance.

        Raises:
            UserError: If the state is not one of environments with these games, levels and settings.
        """
        if not self.supports_state:
            raise UserError(f"{self.game_names[0]} cannot restore a state; resume at an episode's start instead")
        self._check_state(state, self.get_state())
        self._set_state(state)

    def _check_state(self, state: State, own: State) -> None:
        if not isinstance(state, dict) or set(state) != set(own):
            raise UserError(f"this is not a saved state of {type(self).__name__}; give what its get_state returned")
        for key in ("n_envs", "games", "levels", *self._settings()):
            if state[key] != own[key]:
                raise UserError(f"the saved state has {key} {state[key]}, this environment {own[key]}; make them equal")
        for key, value in own.items():
            if isinstance(value, np.ndarray):
                check_array(key, state[key], value)

    def _settings(self) -> tuple[str, ...]:
        """Name the entries of the state that must equal this instance's before it is restored."""
        return ()

    def _get_state(self) -> State:
        raise NotImplementedError

    def _set_state(self, state: State) -> None:
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 (most simulators hold nothing)
        """Free what the simulator holds; it cannot be used afterwards."""

    def check_actions(self, actions: Any) -> Array:
        """Return `actions` as an array `[n, ...]` once they belong to the action space.

        Raises:
            UserError: If the shape, the type or a value is wrong.
        """
        array = np.asarray(actions)
        shape = (self.n_envs, *(self.action_space.shape or ()))
        if array.shape != shape:
            raise UserError(f"actions must have shape {shape}, not {array.shape}")
        if isinstance(self.action_space, spaces.Box):
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise UserError(f"actions must be finite numbers, not {array.dtype} {array.ravel()[:3].tolist()}")
            return array
        if array.dtype.kind not in "iu" and not (
            array.dtype.kind == "b" and isinstance(self.action_space, spaces.MultiBinary)
        ):
            raise UserError(f"actions must be whole numbers, not {array.dtype}")
        low, high = action_bounds(self.action_space)
        if (array < low).any() or (array > high).any():
            raise UserError(f"actions must lie in {low} .. {high}, these reach from {array.min()} to {array.max()}")
        return array


class SampledLevelsEnv(BatchEnv):
    """A `BatchEnv` whose episodes are drawn by a `LevelSampler`; a subclass implements `_begin_episodes`."""

    def __init__(
        self,
        n_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        levels: str | LevelRange,
        seed: int,
    ) -> None:
        super().__init__(n_envs, observation_space, action_space, levels, seed)
        self._level: IntArray = np.zeros(self.n_envs, np.int64)
        self._clock: IntArray = np.zeros(self.n_envs, np.int64)  # steps within the episode
        self.reseed(self.seed)

    @abstractmethod
    def _begin_episodes(self, mask: BoolArray) -> None:
        """Start the masked environments on their levels, `_level`."""

    def reseed(self, seed: int) -> None:
        """Start over exactly as a new instance with this seed would."""
        self.seed = check_seed(seed)
        self._sampler = LevelSampler(self.levels, self.n_envs, self.seed)
        self._begin(np.ones(self.n_envs, np.bool_))
        self._fresh = True

    def _reset(self, mask: BoolArray, levels: IntArray | None) -> Observation:
        # A new instance has begun its first episodes already: the first reset returns them instead of skipping them.
        if not (self._fresh and mask.all() and levels is None):
            self._sampler.pin(mask, levels)
            self._begin(mask)
        self._fresh = False
        return self.observe()

    def _begin(self, mask: BoolArray) -> None:
        self._level[mask] = self._sampler.draw(mask)
        self._clock[mask] = 0
        self._begin_episodes(mask)

    def level_seed(self) -> IntArray:
        """Return the levels being played, `[n]`."""
        return self._level.copy()


def check_array(key: str, value: Any, like: Array) -> None:
    """Raise a UserError unless the entry `key` of a saved state has the shape and dtype of `like`."""
    array = np.asarray(value)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
        raise UserError(
            f"the saved state's {key!r} is {array.dtype} of shape {array.shape}, not {like.dtype} of shape "
            f"{like.shape}; use the same environments and n_envs"
        )


def action_bounds(space: spaces.Space[Any]) -> tuple[Any, Any]:
    """Return the lowest and the highest whole-number action of a Discrete, MultiDiscrete or MultiBinary space."""
    if isinstance(space, spaces.Discrete):
        return int(space.start), int(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Raise a UserError unless agents can read the observations and give the actions of these spaces."""
    flat = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    parts = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    for part in parts:
        if not isinstance(part, flat):
            raise UserError(
                f"observations of type {type(part).__name__} are not supported; "
                "use Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of these"
            )
    if not isinstance(action_space, flat):
        raise UserError(
            f"actions of type {type(action_space).__name__} are not supported; "
            "use Discrete, MultiDiscrete, MultiBinary or Box"
        )


def check_count(name: str, value: Any) -> int:
    """Return `value` if it is a whole number above 0, else raise a UserError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name} must be a whole number above 0, not {value!r}")
    return int(value)


def check_seed(seed: Any) -> int:
    """Return `seed` if it is a whole number in 0 .. 2**31 - 1, else raise a UserError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_LEVEL:
        raise UserError(f"the seed must be a whole number in 0 .. {MAX_LEVEL}, not {seed!r}")
    return int(seed)
