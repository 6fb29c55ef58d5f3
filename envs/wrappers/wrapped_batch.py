"""What wrappers of a `BatchEnv`, themselves a `BatchEnv`, share."""

from __future__ import annotations

from typing import Any

from srwm_rl.envs.batch import Array, BatchEnv, Observation, Space, State
from srwm_rl.envs.levels import IntArray


class WrappedBatch(BatchEnv):
    """Hold a `BatchEnv` and pass on what a subclass does not change; the state holds the inner one's.

    Args:
        batch_env: The environments, which start over.
        observation_space: Of one environment, as the wrapper gives it; None: as inside.
    """

    def __init__(self, batch_env: BatchEnv, observation_space: Space | None = None) -> None:
        self.batch_env = batch_env
        self.games, self.solvable, self.render_mode = batch_env.games, batch_env.solvable, batch_env.render_mode
        self.supports_state, self.has_answers = batch_env.supports_state, batch_env.has_answers
        self.envs = batch_env.envs
        space = batch_env.observation_space if observation_space is None else observation_space
        super().__init__(batch_env.n_envs, space, batch_env.action_space, batch_env.levels, batch_env.seed)

    def observe(self) -> Observation:
        """Return the current observations without stepping."""
        return self.batch_env.observe()

    def answers(self) -> IntArray:
        """Return the right action for each current observation, `[n]`; see `BatchEnv.answers`."""
        return self.batch_env.answers()

    def step_notes(self) -> dict[str, IntArray]:
        """Return what a film says about the current observations, `[n]` per name."""
        return self.batch_env.step_notes()

    def level_seed(self) -> IntArray:
        """Return the levels being played, `[n]`."""
        return self.batch_env.level_seed()

    def places(self) -> str:
        """Describe the games and levels being played; see `BatchEnv.places`."""
        return self.batch_env.places()

    def render(self) -> Array:
        """Return a picture `[n, height, width, 3]` of every environment."""
        return self.batch_env.render()

    def close(self) -> None:
        """Free what the simulator holds."""
        self.batch_env.close()

    def get_state(self) -> State:
        """Return everything that decides what happens next, without pickles."""
        return {"batch_env": self.batch_env.get_state(), **super().get_state()}

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance; see `BatchEnv.set_state`."""
        BatchEnv.set_state(self, state)  # not `SampledLevelsEnv.set_state`, which begins episodes
        self.batch_env.set_state(state["batch_env"])

    def _check_state(self, state: Any) -> None:
        super()._check_state(state)
        self.batch_env._check_state(state["batch_env"])


def innermost(batch_env: BatchEnv) -> BatchEnv:
    """Return the environments inside all wrappers."""
    while isinstance(batch_env, WrappedBatch):
        batch_env = batch_env.batch_env
    return batch_env
