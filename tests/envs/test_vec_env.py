"""`BatchVecEnv` and `ProcgenVecEnv`: a batch as SB3's `VecEnv`."""

import copy
import warnings

import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecTransposeImage

from srwm_rl.envs import (
    AttemptsBatch,
    BanditBatch,
    BatchVecEnv,
    GymnasiumBatch,
    ProcgenBatch,
    ProcgenVecEnv,
    RecallBatch,
)
from srwm_rl.errors import FaultError, UserError


def random_steps(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(0, env.action_space.n, env.num_envs)) for _ in range(steps)]


def test_steps_equal_those_of_the_batch():
    env, batch = ProcgenVecEnv("maze,leaper", 4, "0:20", seed=2), ProcgenBatch("maze,leaper", 4, "0:20", seed=2)
    assert np.array_equal(env.reset(), batch.reset())
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.integers(0, 15, 4)
        obs, rewards, dones, _ = env.step(actions)
        step = batch.step(actions)
        assert np.array_equal(obs, step.obs)
        assert np.array_equal(rewards, step.rewards)
        assert rewards.dtype == np.float32
        assert np.array_equal(dones, step.terminated | step.truncated)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProcgenBatch("leaper,bigfish", 6, "0:20", seed=2),
        lambda: RecallBatch(6, "0:20"),
        lambda: GymnasiumBatch("CartPole-v1", 6),
    ],
    ids=["procgen", "task", "gymnasium"],
)
def test_episode_infos_hold_the_return_length_level_and_game(make):
    env = BatchVecEnv(make())
    env.reset()
    levels = env.batch_env.level_seed()
    returns, lengths, n_episodes = np.zeros(6), np.zeros(6, int), 0
    for _, rewards, dones, infos in random_steps(env, 250):
        returns += rewards
        lengths += 1
        for i in range(6):
            if not dones[i]:
                assert infos[i] == {}
                continue
            n_episodes += 1
            info = infos[i]
            assert info["episode"]["r"] == pytest.approx(returns[i])
            assert info["episode"]["l"] == lengths[i]
            assert info["episode"]["t"] > 0
            assert info["prev_level_seed"] == levels[i]
            assert info["game"] == env.batch_env.game_names[i]
            assert info["TimeLimit.truncated"] is False
            levels[i] = info["level_seed"]
            returns[i], lengths[i] = 0, 0
    assert n_episodes > 10
    assert levels.tolist() == env.batch_env.level_seed().tolist()


def test_infos_hold_is_success_and_terminal_observation_where_the_environment_has_them():
    def last_info(batch):
        env = BatchVecEnv(batch)
        env.reset()
        return next(info for *_, infos in random_steps(env, 400) for info in infos if info)

    recall, bandit = last_info(RecallBatch(2)), last_info(BanditBatch(2))
    procgen, cartpole = last_info(ProcgenBatch("leaper", 2)), last_info(GymnasiumBatch("CartPole-v1", 2))
    assert type(recall["is_success"]) is type(procgen["is_success"]) is bool
    assert "is_success" not in bandit
    assert "is_success" not in cartpole
    assert "terminal_observation" not in procgen
    assert bandit["terminal_observation"].tolist() == [1.0]
    assert abs(cartpole["terminal_observation"][0]) > 2 or abs(cartpole["terminal_observation"][2]) > 0.2


def test_truncation_is_reported_as_time_limit():
    env = BatchVecEnv(GymnasiumBatch("CartPole-v1", 1, env_kwargs={"max_episode_steps": 5}))
    env.reset()
    *_, infos = random_steps(env, 5)[-1]
    assert infos[0]["TimeLimit.truncated"] is True
    assert infos[0]["episode"]["l"] == 5


def test_an_end_that_is_both_counts_as_terminated():
    class Both(BanditBatch):
        def step(self, actions):
            return (step := super().step(actions))._replace(truncated=step.terminated)

    env = BatchVecEnv(Both(1, n_pulls=1))
    env.reset()
    assert env.step(np.zeros(1, int))[3][0]["TimeLimit.truncated"] is False


def test_a_reset_in_mid_episode_restarts_the_episode_statistics():
    env = BatchVecEnv(BanditBatch(2, n_pulls=4))
    env.reset()
    random_steps(env, 3)
    env.reset()
    assert [dones.all() for _, _, dones, _ in random_steps(env, 4)] == [False, False, False, True]
    assert random_steps(env, 4)[-1][3][0]["episode"]["l"] == 4


def test_a_seed_takes_effect_at_the_next_reset():
    env, other = ProcgenVecEnv("coinrun", 2, seed=1), ProcgenVecEnv("coinrun", 2, seed=55)
    env.reset()
    before = env.observe()
    env.seed(55)
    assert np.array_equal(before, env.observe())
    assert np.array_equal(env.reset(), other.reset())
    assert np.array_equal(env.reset(), other.reset())
    env.seed(2**32 - 1)
    env.reset()


def test_a_levels_option_holds_for_one_reset():
    env = ProcgenVecEnv("coinrun", 2, "0:10")
    env.set_options({"levels": [500, 600]})
    obs = env.reset()
    assert [info["level_seed"] for info in env.reset_infos] == [500, 600]
    assert np.array_equal(obs, ProcgenBatch("coinrun", 2, "0:10").reset(levels=[500, 600]))
    env.reset()
    assert all(info["level_seed"] < 10 for info in env.reset_infos)
    env.set_options({"level": 3})
    with pytest.raises(UserError, match="levels"):
        env.reset()
    env.reset()  # the refused option is gone


def test_attributes_and_methods_are_those_of_the_batch():
    env = ProcgenVecEnv("coinrun", 3, "0:10")
    env.reset()
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("mode", indices=[0, 2]) == ["easy"] * 2
    assert env.env_method("observe", indices=1)[0].shape == (3, 64, 64, 3)
    assert not env.has_attr("nonsense")
    env.set_attr("timeout_as_truncation", True)
    assert env.batch_env.timeout_as_truncation is True
    with pytest.raises(UserError, match="one simulator holds all environments"):
        env.set_attr("timeout_as_truncation", False, indices=[0])
    with pytest.raises(UserError, match="coinrun has no attribute 'note'"):
        env.set_attr("note", 5)
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(VecMonitor, 0) == [False]


def test_names_that_the_batch_has_not_are_those_of_gymnasium_environments():
    env = BatchVecEnv(AttemptsBatch(GymnasiumBatch("CartPole-v1", 3), 2))
    env.set_attr("force_mag", 5.0, indices=[0, 2])
    assert env.get_attr("force_mag") == [5.0, 10.0, 5.0]
    assert [single.unwrapped.force_mag for single in env.batch_env.batch_env.envs] == [5.0, 10.0, 5.0]
    assert env.env_method("get_wrapper_attr", "force_mag", indices=[1, 2]) == [10.0, 5.0]
    assert env.env_is_wrapped(TimeLimit, [0, 1]) == [True] * 2
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [False] * 3
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.get_attr("attempts") == [2] * 3
    assert not env.has_attr("nonsense")
    with pytest.raises(UserError, match="CartPole-v1 has no attribute 'nonsense'"):
        env.set_attr("nonsense", 1)


def test_exploration_mode_needs_no_levels():
    assert len(ProcgenVecEnv("coinrun", 1, mode="exploration").batch_env.levels) == 1
    assert str(ProcgenVecEnv("coinrun", 1).batch_env.levels) == "0:200"


def test_render_returns_an_image_per_environment():
    env = ProcgenVecEnv("maze", 2, render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (1024, 512, 3)
    assert len(env.get_images()) == 2


def test_a_restored_state_continues_the_running_episodes():
    env = ProcgenVecEnv("bigfish", 4, "0:20", seed=2)
    env.reset()
    random_steps(env, 60)
    state = copy.deepcopy(env.get_state())
    steps = random_steps(env, 150, seed=1)
    restored = ProcgenVecEnv("bigfish", 4, "0:20", seed=9)
    restored.set_state(state)
    for step, restored_step in zip(steps, random_steps(restored, 150, seed=1), strict=True):
        assert np.array_equal(step[0], restored_step[0])
        for a, b in zip(step[3], restored_step[3], strict=True):
            assert a.keys() == b.keys()
            if a:
                assert (a["episode"]["r"], a["episode"]["l"]) == (b["episode"]["r"], b["episode"]["l"])
    assert any(info for *_, infos in steps for info in infos)
    for invalid in ({}, {**state, "returns": np.zeros(3)}, {**state, "batch_env": {}}):
        with pytest.raises(UserError):
            restored.set_state(invalid)
    assert env.supports_state
    assert not BatchVecEnv(GymnasiumBatch("CartPole-v1", 1)).supports_state
    with pytest.raises(UserError, match="cannot save"):
        BatchVecEnv(GymnasiumBatch("CartPole-v1", 1)).get_state()


def test_sb3s_ppo_and_evaluate_policy_work():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = ProcgenVecEnv("bossfight", 4, "0:20")
        model = PPO("CnnPolicy", env, n_steps=32, batch_size=64, n_epochs=1, device="cpu", seed=0)
        assert isinstance(model.env, VecTransposeImage)
        model.learn(128)
        assert len(model.ep_info_buffer) > 0
        returns, lengths = evaluate_policy(
            model, ProcgenVecEnv("bossfight", 4, "1000:1010"), n_eval_episodes=5, return_episode_rewards=True
        )
    assert len(returns) == len(lengths) == 5


class NonFiniteRecall(RecallBatch):
    """Recall with an infinite reward or observation of environment 2 at the third step."""

    quantity = "reward"

    def step(self, actions):
        step = super().step(actions)
        if self._clock.max() != 3:
            return step
        rewards, obs = step.rewards.copy(), step.obs.copy()
        (rewards if self.quantity == "reward" else obs)[2] = np.inf
        return step._replace(rewards=rewards, obs=obs)


@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_a_non_finite_number_raises_or_counts_as_0(quantity):
    def batch():
        env = NonFiniteRecall(4, "5:6", delay=10)
        env.quantity = quantity
        return env

    with pytest.raises(UserError, match="on_nan must be stop or skip, not 'ignore'"):
        BatchVecEnv(batch(), on_nan="ignore")
    stopping = BatchVecEnv(batch())
    stopping.reset()
    for _ in range(2):
        stopping.step(np.zeros(4, int))
    with pytest.raises(FaultError, match=rf"the {quantity} is not finite \(recall, environment 2, level 5, step 2\)"):
        stopping.step(np.zeros(4, int))
    skipping = BatchVecEnv(batch(), on_nan="skip")
    skipping.reset()
    with pytest.warns(UserWarning, match=f"the {quantity} is not finite and counts as 0"):
        steps = [skipping.step(np.zeros(4, int)) for _ in range(9)]
    assert all(np.isfinite(obs).all() and np.isfinite(rewards).all() for obs, rewards, *_ in steps)
    assert not steps[2][1][2] if quantity == "reward" else not steps[2][0][2].any()


def test_numbers_whose_squares_are_too_large_are_finite():
    class Large(BanditBatch):
        def step(self, actions):
            return (step := super().step(actions))._replace(rewards=step.rewards + np.float32(1e30))

    env = BatchVecEnv(Large(4))
    env.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards = env.step(np.zeros(4, int))[1]
    assert (rewards >= np.float32(1e30)).all()
