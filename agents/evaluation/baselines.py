"""Constant actions: what an agent earns that ignores its observations.

def play(agent, levels):
    with closing(make_levels_env("starpilot", 32, levels, repeats=1, seed=0)) as env:
        return play_levels(agent, env)

best = best_constant_action(play, constant_actions(spaces.Discrete(15)).actions, range(100))  # training levels
returns = play(ConstantAgent(best.action), range(1000, 1200)).level_means()  # of held-out ones, [200]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.agents.evaluation.play_levels import Episodes, Predictor, State
from srwm_rl.nn.spaces import ACTION_MASK

Action = npt.NDArray[Any]

MAX_ACTIONS = 64  # of more, so many spread evenly are tried
FIRST_LEVELS = 4  # in the first round every action plays each fourth level, from 25 on
FINALISTS = 3  # actions that play all levels


class ConstantAgent:
    """Takes one action, `action_space.shape`, in every step of every environment.

    Where a mask of Discrete actions forbids it, the first allowed action takes its place.
    """

    def __init__(self, action: Any) -> None:
        self.action = np.asarray(action)

    def predict(self, observation: Any, *_: Any, **__: Any) -> tuple[np.ndarray, State]:
        """Return the action for every environment."""
        part = next(iter(observation.values())) if isinstance(observation, dict) else observation
        actions = np.repeat(self.action[None], len(part), axis=0)
        masks = observation.get(ACTION_MASK) if isinstance(observation, dict) else None
        if masks is not None and self.action.ndim == 0 and self.action < masks.shape[1]:
            actions = np.where(masks[:, int(self.action)] != 0, actions, (masks != 0).argmax(axis=1))
        return actions, None


class ConstantChoice(NamedTuple):
    """The best constant action of those that were tried."""

    name: str  # its key in `ConstantActions.actions`
    action: Action
    mean_return: float  # on the levels that it was chosen on: higher than it would be on others


class ConstantActions(NamedTuple):
    """Constant actions of a space."""

    actions: dict[str, Action]  # by a short name
    which: str  # says which actions these are, for people


def constant_actions(space: spaces.Space[Any]) -> ConstantActions:
    """Return the constant actions that stand for all of a space.

    Discrete: every action. MultiDiscrete and MultiBinary: all zeros, all at their highest, and every single choice with
    the others zero. Box: the centre, all lowest, all highest, and each component at either end with the others at the
    centre; where it is unbounded, from -1 to 1. Of more than `MAX_ACTIONS`, so many spread evenly.

    Raises:
        TypeError: the space is another one.
    """
    if isinstance(space, spaces.Discrete):
        actions = {str(action): np.asarray(action, space.dtype) for action in space.start + np.arange(space.n)}
        return _limited(actions, "each action")
    if isinstance(space, spaces.Box):
        low, high = np.maximum(space.low, -1e6), np.minimum(space.high, 1e6)
        low = np.where(np.isfinite(space.low), low, np.minimum(-1, high))
        high = np.where(np.isfinite(space.high), high, np.maximum(1, low))
        ends = {"centre": (low + high) / 2, "lowest": low, "highest": high}
        actions = _with_single(ends, "centre", {"lowest": low, "highest": high}, space.dtype)
        return _limited(actions, "the centre, the ends, each component at either end")
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        zero, top = _discrete_ends(space)
        values = {str(v): np.minimum(zero + v, top) for v in range(1, int((top - zero).max()) + 1)}
        ends = {"zeros": zero, "highest": top}
        return _limited(_with_single(ends, "zeros", values, space.dtype), "zeros, the highest, each single choice")
    raise TypeError(f"no constant actions of {space}")


def _discrete_ends(space: spaces.MultiDiscrete | spaces.MultiBinary) -> tuple[Action, Action]:
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    start = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape)
    return start.astype(np.int64), (start + space.nvec - 1).astype(np.int64)


def _with_single(
    ends: Mapping[str, Action], middle: str, values: Mapping[str, Action], dtype: Any
) -> dict[str, Action]:
    """Return `ends`, and the middle one with each component at each of its values."""
    actions = {name: action.astype(dtype) for name, action in ends.items()}
    for i in range(ends[middle].size):
        for name, value in values.items():
            action = ends[middle].astype(dtype)
            action.flat[i] = value.flat[i]
            if not any(np.array_equal(action, other) for other in actions.values()):
                actions[f"component {i} at {name}"] = action
    return actions


def _limited(actions: dict[str, Action], which: str) -> ConstantActions:
    if len(actions) <= MAX_ACTIONS:
        return ConstantActions(actions, f"{which} ({len(actions)})")
    kept = np.linspace(0, len(actions) - 1, MAX_ACTIONS).round().astype(int)
    names = list(actions)
    return ConstantActions({names[i]: actions[names[i]] for i in kept}, f"{MAX_ACTIONS} of {len(actions):,}: {which}")


def best_constant_action(
    play: Callable[[Predictor, Sequence[int]], Episodes], actions: Mapping[str, Any], levels: Sequence[int]
) -> ConstantChoice:
    """Return the constant action with the highest mean return.

    Choose it on training levels and play it on held-out ones, as an agent is. In a first round every action plays each
    fourth level (all, if there are fewer than 25); the three best play all levels.

    Args:
        play: Plays levels with an agent, such as `play_levels` in an environment made for them.
        actions: Actions by name, as of `constant_actions`.
        levels: The levels to choose on.
    """
    first = levels[::FIRST_LEVELS] if len(levels) >= 25 else levels
    names, means = list(actions), dict[str, float]()
    for n_kept, played in ((FINALISTS, first), (1, levels)):
        means = {name: float(play(ConstantAgent(actions[name]), played).level_means().mean()) for name in names}
        names = sorted(names, key=lambda name: -means[name])[:n_kept]
    return ConstantChoice(names[0], np.asarray(actions[names[0]]), means[names[0]])
