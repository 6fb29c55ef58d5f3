"""The interface of all environments here: `n_envs` stepped together, with same-step autoreset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.envs.levels import MAX_LEVEL, BoolArray, IntArray, LevelRange, check_levels
from srwm_rl.errors import UserError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Observation = Array | dict[str, Array]
Space = spaces.Space[Any]
Acted = tuple[FloatArray, BoolArray, BoolArray, BoolArray | None]
"""Rewards, terminated, truncated and, where the game defines it, solved, each `[n]`."""
State = dict[str, Any]
"""A simulator's state: numpy arrays, bytes, lists, ints, strings and dicts of these; never a pickle."""


class BatchStep(NamedTuple):
    """The result of one step of all environments.

    `obs[i]` is already the next episode's first observation where `terminated[i] | truncated[i]`. `info` holds one
    array `[n]` per key: `level_seed` (the level of `obs`), `prev_level_seed` (the level the step was played in) and,
    where the game defines it, `is_success` (valid where an episode ended).
    """

    obs: Observation
    rewards: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    info: dict[str, Array]
    final_obs: Observation | None = None
    """The last observations of the episodes that ended (other rows mean nothing); None where there are none."""


class BatchEnv(ABC):
    """Step `n_envs` environments together.

    A subclass implements `_start`, `_restart`, `step`, `observe` and `level_seed`, and sets `games` and what `_start`
    needs before it calls this constructor.

    Args:
        n_envs: How many environments.
        observation_space: Of one environment.
        action_space: Of one environment.
        levels: The levels that episodes are drawn from.
        seed: Start of the random level sequences.

    Raises:
        UserError: If `n_envs` or `seed` is out of range, or a space is of a kind that agents cannot use.
    """

    games: tuple[str, ...]
    """Environment i plays game `i % len(games)`."""
    supports_state: bool = False
    """Whether `get_state` and `set_state` work."""
    solvable: bool = False
    """Whether `info["is_success"]` says if an episode was solved."""
    has_answers: bool = False
    """Whether `answers` works: some steps have one right action, which does not depend on earlier ones."""
    render_mode: str | None = None
    envs: Sequence[gymnasium.Env[Any, Any]] = ()
    """The single environments, where these are a list of Gymnasium's."""

    def __init__(
        self, n_envs: int, observation_space: Space, action_space: Space, levels: str | LevelRange, seed: int
    ) -> None:
        check_spaces(observation_space, action_space)
        self.n_envs = check_count("n_envs", n_envs)
        self.observation_space = observation_space
        self.action_space: Any = action_space
        self.levels = LevelRange.parse(levels)
        self.game_names = [self.games[i % len(self.games)] for i in range(self.n_envs)]
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start over exactly as a new instance with this seed would; call `reset` next."""
        self.seed = check_seed(seed)
        self._clock: IntArray = np.zeros(self.n_envs, np.int64)  # steps within the episode
        self._fresh = True  # the first episodes have begun and have not been stepped
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """Begin the first episodes of `seed`."""

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
        mask = np.ones(self.n_envs, np.bool_) if mask is None else np.asarray(mask)
        if mask.shape != (self.n_envs,) or mask.dtype != np.bool_:
            raise UserError(f"the reset mask must be {self.n_envs} booleans, not {mask.dtype} of shape {mask.shape}")
        # The first reset returns the episodes that have begun already, instead of skipping them.
        if not (self._fresh and mask.all() and levels is None):
            self._restart(mask, None if levels is None else check_levels(levels, self.n_envs))
        self._clock[mask] = 0
        self._fresh = False
        return self.observe()

    @abstractmethod
    def _restart(self, mask: BoolArray, levels: IntArray | None) -> None:
        """Begin new episodes, on these levels or the next ones; the arguments are checked."""

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

    def render(self) -> npt.NDArray[np.uint8]:
        """Return a picture `[n, height, width, 3]` of every environment.

        Raises:
            UserError: If the environments were not made with `render_mode="rgb_array"`.
        """
        raise UserError("these environments have no pictures; make them with render_mode='rgb_array' where they can")

    def answers(self) -> IntArray:
        """Return the right action for each current observation, `[n]`; -1 where none is asked for.

        Raises:
            UserError: If these environments have no right answers; see `has_answers`.
        """
        raise UserError(f"{self.games[0]} has no right answers to learn from: train it by reward, with ppo or impala")

    def step_notes(self) -> dict[str, IntArray]:
        """Return what a film says about the current observations, `[n]` per name, without what the action decides."""
        return {}

    def get_state(self) -> State:
        """Return everything that decides what happens next, without pickles.

        Raises:
            UserError: If this simulator cannot save its state.
        """
        if not self.supports_state:
            raise UserError(f"{self.games[0]} cannot save or restore a state; resume at an episode's start instead")
        arrays = {key: array.copy() for key, array in self._arrays().items()}
        return {**self._settings(), "seed": self.seed, "fresh": int(self._fresh), **arrays}

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance.

        Raises:
            UserError: If the state is not one of environments with these games, levels and settings.
        """
        self._check_state(state)
        self.seed = check_seed(state["seed"])
        self._fresh = bool(state["fresh"])
        for key, array in self._arrays().items():
            array[:] = state[key]

    def _check_state(self, state: State) -> None:
        check_state(state, self.get_state(), self._arrays(), self._settings())

    def _settings(self) -> State:
        """Return the entries of the state that must equal this instance's before it is restored."""
        return {"n_envs": self.n_envs, "games": list(self.games), "levels": str(self.levels)}

    def _arrays(self) -> dict[str, Array]:
        """Return the arrays of the state, not copied."""
        return {"clock": self._clock}

    def close(self) -> None:  # noqa: B027 (most simulators hold nothing)
        """Free what the simulator holds; it cannot be used afterwards."""

    def check_actions(self, actions: Any) -> Array:
        """Return `actions` as an array `[n, ...]` once they belong to the action space.

        Raises:
            UserError: If the shape, the type or a value is wrong.
        """
        array, space = np.asarray(actions), self.action_space
        shape = (self.n_envs, *(space.shape or ()))
        if array.shape != shape:
            raise UserError(f"actions must have shape {shape}, not {array.shape}")
        if isinstance(space, spaces.Box):
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise UserError(f"actions must be finite numbers, not {array.dtype} {array.ravel()[:3].tolist()}")
            return array
        bits = isinstance(space, spaces.MultiBinary)
        if bits and array.dtype.kind == "f" and np.isin(array, (0, 1)).all():  # as SB3's Bernoulli distribution samples
            array = array.astype(space.dtype)
        if array.dtype.kind not in ("iub" if bits else "iu"):
            raise UserError(f"actions must be whole numbers, not {array.dtype}")
        low = 0 if bits else space.start
        high = 1 if bits else low + (space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n) - 1
        if (array < low).any() or (array > high).any():
            raise UserError(f"actions must lie in {low} .. {high}, these reach from {array.min()} to {array.max()}")
        return array


def check_state(
    state: Any, keys: Iterable[str], arrays: dict[str, Array] | None = None, settings: State | None = None
) -> None:
    """Raise a UserError unless `state` has these keys alone, equal settings, and arrays of equal shape and dtype."""
    if not isinstance(state, dict) or set(state) != set(keys):
        raise UserError("this is not a saved state of these environments; give what their get_state returned")
    for key, value in (settings or {}).items():
        if state[key] != value:
            raise UserError(f"the saved state has {key} {state[key]}, this environment {value}; make them equal")
    for key, like in (arrays or {}).items():
        array = np.asarray(state[key])
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            raise UserError(
                f"the saved state's {key!r} is {array.dtype} of shape {array.shape}, not {like.dtype} of shape "
                f"{like.shape}; use the same environments and n_envs"
            )


def check_spaces(observation_space: Space, action_space: Space) -> None:
    """Raise a UserError unless agents can read the observations and give the actions of these spaces."""
    parts = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    for what, space in [*(("observations", part) for part in parts), ("actions", action_space)]:
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise UserError(
                f"{what} of type {type(space).__name__} are not supported; use Box, Discrete, MultiDiscrete, "
                f"MultiBinary{' or a flat Dict of these' if what == 'observations' else ''}"
            )


def check_count(name: str, value: Any) -> int:
    """Return `value` if it is a whole number above 0, else raise a UserError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name} must be a whole number above 0, not {value!r}")
    return int(value)


def check_count_or_zero(name: str, value: Any) -> int:
    """Return `value` if it is a whole number of 0 or more, else raise a UserError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise UserError(f"{name} must be a whole number of 0 or more, not {value!r}")
    return int(value)


def check_seed(seed: Any) -> int:
    """Return `seed` if it is a whole number in 0 .. 2**31 - 1, else raise a UserError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_LEVEL:
        raise UserError(f"the seed must be a whole number in 0 .. {MAX_LEVEL}, not {seed!r}")
    return int(seed)
