"""`ShuffledActionsBatch`: which action does what is a function of the level."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.envs import BanditBatch, GymnasiumBatch, ProcgenBatch, ShuffledActionsBatch, make_batch_env
from srwm_rl.envs.wrappers.shuffled_actions import action_permutations
from srwm_rl.errors import UserError
from tests.envs.steps import steps_equal


class Shifted(gymnasium.Env):
    """Actions 3, 4, 5; pays the action; an episode has four steps."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(3, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), float(action), self.t == 4, False, {}


makers = {
    "bigfish,leaper": lambda n, seed=0: ProcgenBatch("bigfish,leaper", n, "0:50", seed=seed),
    "bandit": lambda n, seed=0: BanditBatch(n, "0:50", seed),
    "CartPole-v1": lambda n, seed=0: GymnasiumBatch("CartPole-v1", n, "0:50", seed),
}


def test_permutations_are_uniform_and_a_function_of_the_level():
    levels = np.arange(6000)
    permutations = action_permutations(levels, 3)
    assert np.array_equal(permutations, action_permutations(levels[::-1], 3)[::-1])
    _, counts = np.unique(permutations, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.all(np.abs(counts - 1000) < 150)  # 5 standard deviations
    assert np.array_equal(np.sort(action_permutations(levels, 15), axis=1), np.tile(np.arange(15), (6000, 1)))


@pytest.mark.parametrize("name", makers)
def test_it_is_the_environment_with_permuted_actions(name):
    env, plain = ShuffledActionsBatch(makers[name](4)), makers[name](4)
    assert np.array_equal(env.reset(), plain.reset())
    rng, levels = np.random.default_rng(0), set()
    played = []
    for _ in range(300):
        actions = rng.integers(0, env.action_space.n, 4)
        now = plain.level_seed()
        levels |= set(now.tolist())
        does = action_permutations(now, env.action_space.n)
        played.append((env.step(actions), plain.step(does[np.arange(4), actions])))
    assert len(levels) > 4
    assert steps_equal(*zip(*played, strict=True))


def test_a_level_has_the_same_controls_in_every_environment_and_episode():
    env = ShuffledActionsBatch(GymnasiumBatch(f"{__name__}:Shifted-v0", 3, "0:9"))
    env.reset(levels=[4, 4, 7])
    paid = np.array([env.step(np.full(3, 3 + t % 3)).rewards for t in range(12)])
    for column, level in zip(paid.T, (4, 4, 7), strict=True):
        assert column.tolist() == np.tile(action_permutations(np.array([level]), 3)[0] + 3, 4).tolist()
    assert not np.array_equal(action_permutations(np.array([4]), 3), action_permutations(np.array([7]), 3))


@pytest.mark.parametrize("name", ["bigfish,leaper", "bandit"])
def test_a_restored_state_goes_on_exactly(name):
    env, other = (ShuffledActionsBatch(makers[name](4, seed)) for seed in (3, 8))
    rng = np.random.default_rng(0)
    env.reset()
    for _ in range(130):
        env.step(rng.integers(0, env.action_space.n, 4))
    other.set_state(env.get_state())
    actions = rng.integers(0, env.action_space.n, (200, 4))
    assert steps_equal([env.step(a) for a in actions], [other.step(a) for a in actions])
    with pytest.raises(UserError):
        env.set_state(makers[name](4).get_state())


def test_resets_are_those_of_the_environment_inside():
    env, plain = ShuffledActionsBatch(makers["bandit"](3)), makers["bandit"](3)
    for some in (env, plain):
        some.reset()
    for _ in range(3):  # without a step between them
        env.reset()
        plain.reset()
        assert np.array_equal(env.level_seed(), plain.level_seed())
    env.reset(np.array([False, True, False]), [0, 40, 0])
    assert env.level_seed()[1] == 40
    assert np.array_equal(env._permutations, action_permutations(env.level_seed(), 5))
    env.reseed(9)
    assert np.array_equal(env._permutations, action_permutations(makers["bandit"](3, 9).level_seed(), 5))


def test_other_action_spaces_are_refused():
    with pytest.raises(UserError, match="only Discrete actions can be shuffled; Pendulum-v1 has Box actions"):
        make_batch_env("Pendulum-v1", 1, "0:9", 0, shuffle_actions=True)
    with pytest.raises(UserError, match="hidden_controls has controls drawn for every level already"):
        make_batch_env("hidden_controls", 1, "0:9", 0, shuffle_actions=True, frame_stack=2)
    with pytest.raises(UserError, match=r"actions must lie in 0 \.\. 4"):
        ShuffledActionsBatch(BanditBatch(1)).step(np.array([5]))


gymnasium.register("Shifted-v0", Shifted)
