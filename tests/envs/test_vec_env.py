import copy
import warnings

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecTransposeImage

from srwm_rl.envs import BanditBatch, BatchVecEnv, GymnasiumBatch, ProcgenBatch, ProcgenVecEnv, RecallBatch
from srwm_rl.errors import FaultError, UserError


def random_steps(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(0, env.action_space.n, env.num_envs)) for _ in range(steps)]


def test_steps_are_those_of_the_batch():
    env, batch = ProcgenVecEnv("maze,leaper", 4, "0:20", seed=2), ProcgenBatch("maze,leaper", 4, "0:20", seed=2)
    assert np.array_equal(env.reset(), batch.reset())
    rng = np.random.default_rng(0)
    for _ in range(200):
        a = rng.integers(0, 15, 4)
        obs, rewards, dones, _ = env.step(a)
        step = batch.step(a)
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
def test_episode_infos_equal_sums_by_hand(make):
    env = BatchVecEnv(make())
    env.reset()
    playing = env.batch_env.level_seed()
    returns, lengths, ended = np.zeros(6), np.zeros(6, int), 0
    for _, rewards, dones, infos in random_steps(env, 250):
        returns += rewards
        lengths += 1
        for i in range(6):
            if not dones[i]:
                assert infos[i] == {}
                continue
            ended += 1
            info = infos[i]
            assert info["episode"]["r"] == pytest.approx(returns[i])
            assert info["episode"]["l"] == lengths[i]
            assert info["episode"]["t"] > 0
            assert info["prev_level_seed"] == playing[i]
            assert info["game"] == env.batch_env.game_names[i]
            assert info["TimeLimit.truncated"] is False
            playing[i] = info["level_seed"]
            returns[i], lengths[i] = 0, 0
    assert ended > 10
    assert playing.tolist() == env.batch_env.level_seed().tolist()


def test_success_and_terminal_observation_are_there_where_they_exist():
    def last_info(batch):
        env = BatchVecEnv(batch)
        env.reset()
        return next(i for s in random_steps(env, 400) for i in s[3] if i)

    recall, bandit = last_info(RecallBatch(2)), last_info(BanditBatch(2))
    procgen, cartpole = last_info(ProcgenBatch("leaper", 2)), last_info(GymnasiumBatch("CartPole-v1", 2))
    assert type(recall["is_success"]) is type(procgen["is_success"]) is bool
    assert "is_success" not in bandit
    assert "is_success" not in cartpole
    assert "terminal_observation" not in procgen
    assert bandit["terminal_observation"].tolist() == [1.0]
    assert abs(cartpole["terminal_observation"][0]) > 2 or abs(cartpole["terminal_observation"][2]) > 0.2


def test_truncation_is_told_apart():
    env = BatchVecEnv(GymnasiumBatch("CartPole-v1", 1, env_kwargs={"max_episode_steps": 5}))
    env.reset()
    infos = [s[3][0] for s in random_steps(env, 5)]
    assert infos[-1]["TimeLimit.truncated"] is True
    assert infos[-1]["episode"]["l"] == 5


def test_reset_in_mid_episode_starts_the_counts_again():
    env = BatchVecEnv(BanditBatch(2, n_pulls=4))
    env.reset()
    random_steps(env, 3)
    env.reset()
    dones = [s[2].all() for s in random_steps(env, 4)]
    assert dones == [False, False, False, True]
    assert random_steps(env, 4)[-1][3][0]["episode"]["l"] == 4


def test_seed_acts_at_the_next_reset():
    env, fresh = ProcgenVecEnv("coinrun", 2, seed=1), ProcgenVecEnv("coinrun", 2, seed=55)
    env.reset()
    before = env.observe()
    env.seed(55)
    assert np.array_equal(before, env.observe())
    assert np.array_equal(env.reset(), fresh.reset())
    assert np.array_equal(env.reset(), fresh.reset())
    env.seed(2**32 - 1)
    env.reset()


def test_options_choose_levels_once():
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


def test_attributes_and_methods_of_the_simulator():
    env = ProcgenVecEnv("coinrun", 3, "0:10")
    env.reset()
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("mode", indices=[0, 2]) == ["easy"] * 2
    assert env.env_method("observe", indices=1)[0].shape == (3, 64, 64, 3)
    assert not env.has_attr("nonsense")
    env.set_attr("note", 5)
    assert env.batch_env.note == 5
    with pytest.raises(UserError):
        env.set_attr("note", 6, indices=[0])
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(VecMonitor, 0) == [False]


def test_render_gives_one_picture_per_environment():
    env = ProcgenVecEnv("maze", 2, render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (1024, 512, 3)
    assert len(env.get_images()) == 2


def test_state_holds_the_running_episodes():
    env = ProcgenVecEnv("bigfish", 4, "0:20", seed=2)
    env.reset()
    random_steps(env, 60)
    state = copy.deepcopy(env.get_state())
    rest = random_steps(env, 150, seed=1)
    other = ProcgenVecEnv("bigfish", 4, "0:20", seed=9)
    other.set_state(state)
    again = random_steps(other, 150, seed=1)
    for one, two in zip(rest, again, strict=True):
        assert np.array_equal(one[0], two[0])
        for a, b in zip(one[3], two[3], strict=True):
            assert a.keys() == b.keys()
            if a:
                assert (a["episode"]["r"], a["episode"]["l"]) == (b["episode"]["r"], b["episode"]["l"])
    assert any(info for step in rest for info in step[3])
    for bad in ({}, {**state, "returns": np.zeros(3)}, {**state, "batch_env": {}}):
        with pytest.raises(UserError):
            other.set_state(bad)
    assert env.supports_state
    assert not BatchVecEnv(GymnasiumBatch("CartPole-v1", 1)).supports_state
    with pytest.raises(UserError, match="cannot save"):
        BatchVecEnv(GymnasiumBatch("CartPole-v1", 1)).get_state()


def test_sb3_learns_and_evaluates_on_it():
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


class Sick(RecallBatch):
    """Gives a reward and an observation that are not finite, at the third step."""

    what = "reward"

    def step(self, actions):
        step = super().step(actions)
        if self._clock.max() != 3:
            return step
        rewards, obs = step.rewards.copy(), step.obs.copy()
        (rewards if self.what == "reward" else obs)[2] = np.inf
        return step._replace(rewards=rewards, obs=obs)


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_number_that_is_not_finite_is_named_or_counts_as_0(what):
    def batch():
        sick = Sick(4, "5:6", delay=10)
        sick.what = what
        return sick

    stops = BatchVecEnv(batch())
    stops.reset()
    for _ in range(2):
        stops.step(np.zeros(4, int))
    with pytest.raises(FaultError, match=rf"the {what} is not finite \(recall, environment 2, level 5, step 2\)"):
        stops.step(np.zeros(4, int))
    skips = BatchVecEnv(batch(), on_nan="skip")
    skips.reset()
    with pytest.warns(UserWarning, match=f"the {what} is not finite and counts as 0"):
        steps = [skips.step(np.zeros(4, int)) for _ in range(9)]
    assert all(np.isfinite(obs).all() and np.isfinite(rewards).all() for obs, rewards, *_ in steps)
    assert not steps[2][1][2] if what == "reward" else not steps[2][0][2].any()


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
