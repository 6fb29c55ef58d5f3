"""Which actions do nothing in a game."""

import numpy as np
import pytest

from srwm_rl.envs import GAMES, ProcgenBatch
from srwm_rl.envs.procgen.games import ACTIONS, idle_actions


@pytest.mark.parametrize("game", GAMES)
def test_idle_actions_are_those_that_do_what_nothing_does(game: str) -> None:
    nothing, idle, rng = ACTIONS.index("nothing"), list(idle_actions(game)), np.random.default_rng(0)
    env = ProcgenBatch(game, len(ACTIONS))
    has_effect = np.zeros(len(ACTIONS), np.bool_)
    for level in range(20):
        env.reset(levels=[level] * len(ACTIONS))
        for action in rng.integers(len(ACTIONS), size=2 * level):  # the same moments of the game
            env.step(np.full(len(ACTIONS), action))
        for t in range(7):
            step = env.step(np.arange(len(ACTIONS)) if t == 0 else np.full(len(ACTIONS), nothing))
            frames = np.asarray(step.obs).reshape(len(ACTIONS), -1)
            has_effect |= (frames != frames[nothing]).any(1) | (step.rewards != step.rewards[nothing])
    rare = {"coinrun": 3}.get(game)  # down: through a crate below
    assert [action for action in np.flatnonzero(~has_effect).tolist() if action != rare] == idle
