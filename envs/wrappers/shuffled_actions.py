"""Which action does what, drawn anew for every level."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, State
from srwm_rl.envs.levels import BoolArray, IntArray, hash_integers
from srwm_rl.envs.wrappers.action_masks import ACTION_MASK
from srwm_rl.envs.wrappers.wrapped_batch import WrappedBatch, innermost
from srwm_rl.errors import UserError

_SALT = 0x5AFF1E  # apart from what tasks hash from a level


class ShuffledActionsBatch(WrappedBatch):
    """Permute the actions, by a permutation that is a function of the level alone.

    Action `a` on level `s` does what action `action_permutations([s], n)[0, a]` does without this wrapper. An agent
    has to find out by trying, which pays within a long episode, or over several attempts (`AttemptsBatch`).

    Args:
        batch_env: Environments with Discrete actions; they start over.

    Raises:
        UserError: If the actions are of another kind, have masks, or do already what the level draws.
    """

    def __init__(self, batch_env: BatchEnv) -> None:
        space = batch_env.action_space
        if not isinstance(space, spaces.Discrete):
            raise UserError(
                f"only Discrete actions can be shuffled; {batch_env.games[0]} has {type(space).__name__} actions, "
                "leave --shuffle-actions out"
            )
        observed = batch_env.observation_space
        if isinstance(observed, spaces.Dict) and ACTION_MASK in observed.spaces:
            raise UserError(f"{batch_env.games[0]} has action masks, which name actions: leave --shuffle-actions out")
        if getattr(innermost(batch_env), "draws_controls", False):
            raise UserError(
                f"{batch_env.games[0]} has controls drawn for every level already: leave --shuffle-actions out"
            )
        super().__init__(batch_env)

    def _start(self) -> None:
        self.batch_env.reseed(self.seed)
        self.batch_env.reset()  # its first episodes count as begun, here `_fresh` says whether they are
        self._levels: IntArray = np.full(self.n_envs, -1, np.int64)
        self._permutations: IntArray = np.zeros((self.n_envs, int(self.action_space.n)), np.int64)
        self._permute(self.batch_env.level_seed())

    def _restart(self, mask: BoolArray, levels: IntArray | None) -> None:
        self.batch_env.reset(mask, levels)
        self._permute(self.batch_env.level_seed())

    def _permute(self, levels: Array) -> None:
        """Take over the levels being played, `[n]`, and their permutations."""
        changed = np.flatnonzero(levels != self._levels)
        if len(changed):
            self._levels[changed] = levels[changed]
            self._permutations[changed] = action_permutations(self._levels[changed], self._permutations.shape[1])

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        start = self.action_space.start
        chosen = self.check_actions(actions) - start
        step = self.batch_env.step(self._permutations[np.arange(self.n_envs), chosen] + start)
        self._fresh = False
        self._clock += 1
        self._clock[step.terminated | step.truncated] = 0
        self._permute(step.info["level_seed"])
        return step

    def answers(self) -> IntArray:
        """Return the right actions under the present permutations, `[n]`; see `BatchEnv.answers`."""
        answers, start = self.batch_env.answers(), self.action_space.start
        inverse = self._permutations.argsort(axis=1)
        return np.where(answers < 0, -1, inverse[np.arange(self.n_envs), answers - start] + start)

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance; see `BatchEnv.set_state`."""
        super().set_state(state)
        self._permute(self.batch_env.level_seed())


def action_permutations(levels: IntArray, n_actions: int) -> IntArray:
    """Return the permutation of the actions 0 .. n_actions - 1 on each level, `[n_levels, n_actions]`; all are equally
    likely."""
    return np.argsort(hash_integers(levels[:, None], _SALT, np.arange(n_actions)), axis=1)
