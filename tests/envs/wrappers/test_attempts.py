"""`AttemptsBatch`: several episodes of one level as one trial."""

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.envs import (
    GAMES,
    AttemptsBatch,
    BanditBatch,
    BatchEnv,
    BatchGymEnv,
    BatchGymVectorEnv,
    BatchVecEnv,
    GymnasiumBatch,
    LevelsVecEnv,
    ProcgenBatch,
    RecallBatch,
    make_batch_env,
    make_levels_env,
    make_vec_env,
)
from srwm_rl.envs.wrappers.reward import VecNormalizeReward
from srwm_rl.errors import UserError


def attempts_of_a_trial(env: BatchEnv, script: np.ndarray) -> list[list[list[tuple]]]:
    """Play one trial per environment, step t of every attempt with action `script[t]`.

    Returns what each environment gave in each attempt: observations, rewards and ends.
    """
    obs = env.reset()["observation"]
    seen = [[[(row.tobytes(),)]] for row in obs]
    clock, over = np.zeros(env.n_envs, int), np.zeros(env.n_envs, bool)
    while not over.all():
        step = env.step(script[clock])
        clock += 1
        for i in np.flatnonzero(~over):
            ended, row = step.info["attempt_ended"][i], step.obs["observation"][i].tobytes()
            assert step.info["attempt"][i] == len(seen[i]) - 1
            seen[i][-1].append((float(step.rewards[i]), bool(ended), b"" if ended else row))
            if ended and not step.terminated[i]:
                seen[i].append([(row,)])
        over |= step.terminated | step.truncated
        clock[step.info["attempt_ended"]] = 0
    return seen


SCRIPT = np.random.default_rng(1).integers(0, 15, 1001)


@pytest.mark.parametrize("game", GAMES)
def test_the_attempts_at_a_procgen_level_begin_and_go_on_exactly_alike(game):
    env = AttemptsBatch(ProcgenBatch(game, 1, "0:50", seed=3), 2)
    ((first, *others),) = attempts_of_a_trial(env, SCRIPT)
    assert len(others) == 1
    assert all(other == first for other in others)


makers = {
    "bigfish,dodgeball": lambda n: ProcgenBatch("bigfish,dodgeball", n, "0:50", seed=3),
    "recall": lambda n: RecallBatch(n, "0:50", seed=3),
    "CartPole-v1": lambda n: GymnasiumBatch("CartPole-v1", n, "0:50", seed=3),
}


@pytest.mark.parametrize("name", ["recall", "CartPole-v1"])
def test_the_attempts_at_a_task_or_a_gymnasium_seed_are_alike(name):
    env = AttemptsBatch(makers[name](6), 4)
    for seen in attempts_of_a_trial(env, SCRIPT % env.action_space.n):
        assert len(seen) == 4
        assert all(attempt == seen[0] for attempt in seen)


@pytest.mark.parametrize("name", makers)
def test_a_trial_ends_with_its_last_attempt_and_has_one_level(name):
    env = AttemptsBatch(makers[name](4), 3)
    obs, rng = env.reset(), np.random.default_rng(0)
    assert np.array_equal(obs["attempt_begins"], np.ones((4, 1), np.float32))
    assert obs["attempt_begins"].dtype == np.float32
    attempt, returns, levels = np.zeros(4, int), np.zeros(4), env.level_seed()
    for _ in range(400):
        step = env.step(rng.integers(0, env.action_space.n, 4))
        returns += step.rewards
        ended, done = step.info["attempt_ended"], step.terminated | step.truncated
        assert step.info["attempt"].dtype == np.int64
        assert np.array_equal(step.info["attempt"], attempt)
        assert step.info["attempt_return"] == pytest.approx(returns)
        assert np.array_equal(done, ended & (attempt == 2))
        assert np.array_equal(step.info["prev_level_seed"], levels)
        assert np.array_equal(step.info["level_seed"][~done], levels[~done])
        assert np.array_equal(step.obs["attempt_begins"][:, 0], ended)
        assert np.array_equal(env.observe()["attempt_begins"], step.obs["attempt_begins"])
        attempt = np.where(done, 0, attempt + ended)
        returns[ended] = 0
        levels = step.info["level_seed"]
        assert np.array_equal(levels, env.batch_env.level_seed())


def test_trials_are_drawn_uniformly_from_the_range():
    env = AttemptsBatch(RecallBatch(500, "10:15", 0, delay=1), 2)
    levels = np.concatenate([(env.reset(), env.level_seed())[1] for _ in range(10)])
    counts = np.bincount(levels, minlength=15)
    assert counts[:10].sum() == 0
    assert np.all(np.abs(counts[10:] / len(levels) - 0.2) < 0.03)


@pytest.mark.parametrize("name", ["bigfish,dodgeball", "recall"])
def test_a_restored_state_goes_on_exactly(name):
    envs = [AttemptsBatch(makers[name](4), 3) for _ in range(2)]
    rng = np.random.default_rng(0)
    for env in envs:
        env.reset()
    for _ in range(130):
        envs[0].step(rng.integers(0, envs[0].action_space.n, 4))
    envs[1].set_state(envs[0].get_state())
    assert_equal(envs[0].observe(), envs[1].observe())
    for _ in range(300):
        actions = rng.integers(0, envs[0].action_space.n, 4)
        first, second = (env.step(actions) for env in envs)
        assert_equal(first.obs, second.obs)
        assert_equal(first.info, second.info)
        assert np.array_equal(first.rewards, second.rewards)
        assert np.array_equal(first.terminated, second.terminated)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_states_of_other_trials_are_refused_before_anything_changes():
    env = AttemptsBatch(RecallBatch(2, "0:9"), 3)
    env.reset()
    before = env.get_state()
    for other in (AttemptsBatch(RecallBatch(2, "0:9"), 4), RecallBatch(2, "0:9"), AttemptsBatch(RecallBatch(3), 3)):
        with pytest.raises(UserError):
            env.set_state(other.get_state())
    with pytest.raises(UserError):
        env.set_state({**before, "batch_env": {}, "attempt": np.ones(2, np.int64)})
    assert env.get_state()["attempt"].tolist() == before["attempt"].tolist()
    assert not AttemptsBatch(GymnasiumBatch("CartPole-v1", 1), 2).supports_state


def test_a_seed_starts_over_and_chosen_levels_are_kept():
    env, fresh = (AttemptsBatch(RecallBatch(3, "0:99", seed), 2) for seed in (4, 7))
    env.reset()
    for _ in range(20):
        env.step(np.zeros(3, int))
    env.reseed(7)
    assert np.array_equal(env.reset()["observation"], fresh.reset()["observation"])
    env.reset(np.array([True, False, False]), [55, 0, 0])
    for _ in range(100):
        assert env.step(np.zeros(3, int)).info["level_seed"][0] == 55
    env.reset()
    assert env.level_seed()[0] != 55


def test_the_last_observation_of_a_trial_is_known_where_it_is_inside():
    env = AttemptsBatch(GymnasiumBatch("CartPole-v1", 2, "0:9"), 2)
    plain = GymnasiumBatch("CartPole-v1", 2, "0:9")
    plain.reset(levels=env.level_seed())
    env.reset()
    while True:
        step, alone = env.step(np.ones(2, int)), plain.step(np.ones(2, int))
        done = step.terminated | step.truncated
        if done.any():
            assert np.array_equal(step.final_obs["observation"][done], alone.final_obs[done])
            assert not step.final_obs["attempt_begins"].any()
            return
        assert step.final_obs is None


def test_every_level_of_an_evaluation_is_one_trial():
    env = LevelsVecEnv(AttemptsBatch(RecallBatch(5, delay=2), 3), [7, 8, 9, 11])
    env.reset()
    returns, trials = [[] for _ in range(5)], {}
    for _ in range(100):
        _, _, dones, infos = env.step(np.zeros(5, int))
        for i, info in enumerate(infos):
            if info:
                assert info["attempt"] == len(returns[i])
                returns[i].append(info["attempt_return"])
            if dones[i] and "level" in info:
                assert info["episode"]["r"] == sum(returns[i])
                trials[info["level"]], returns[i] = returns[i], []
    assert env.remaining == 0
    assert trials.keys() == {7, 8, 9, 11}
    assert all(len(trial) == 3 and len(set(trial)) == 1 for trial in trials.values())  # the same action each time


def test_memory_inputs_go_on_over_attempts_and_start_over_with_trials():
    env = make_vec_env("recall", 2, "0:9", 0, env_kwargs={"delay": 1}, attempts=3)
    assert list(env.observation_space.spaces) == sorted(env.observation_space.spaces)
    assert env.observation_space["attempt_begins"] == spaces.Box(0.0, 1.0, (1,), np.float32)
    env.reset()
    seen = set()
    for t in range(1, 200):
        obs, _, dones, infos = env.step(np.ones(2, int))
        for i in range(2):
            begins, previous = bool(obs["attempt_begins"][i, 0]), bool(obs["previous_action"][i].any())
            assert begins == ("attempt" in infos[i])
            assert previous == (not dones[i])
            seen.add((begins, previous))
        if t < 3:
            assert obs["episode_step"][:, 0].tolist() == [t, t]
    assert seen == {(True, False), (True, True), (False, True)}


def test_reward_normalisation_and_its_state_work_on_trials():
    def make():
        return VecNormalizeReward(make_vec_env("bandit", 4, "0:100", 0, attempts=2, shuffle_actions=True), gamma=0.9)

    env, other = make(), make()
    env.reset()
    other.reset()
    for t in range(25):
        env.step(np.full(4, t % 5))
    other.set_state(env.get_state())
    for t in range(30):
        first, second = (some.step(np.full(4, t % 3)) for some in (env, other))
        assert np.array_equal(first[1], second[1])
        assert np.array_equal(first[2], second[2])


def test_one_attempt_is_the_environment_as_it_is():
    assert isinstance(make_batch_env("recall", 2, "0:9", 0, attempts=1), RecallBatch)
    levels = make_levels_env("recall", 2, "0:4", 1, 0, attempts=2)
    assert levels.remaining == 4
    assert "attempt_begins" in levels.observation_space.spaces


def test_pictures_places_and_closing_are_those_inside():
    env = AttemptsBatch(ProcgenBatch("maze", 1, "5:6", render_mode="rgb_array"), 2)
    env.reset()
    assert env.render().shape == (1, 512, 512, 3)
    assert "level 5" in env.places()
    assert BatchVecEnv(env).get_images()[0].shape == (512, 512, 3)
    env.close()


def test_gymnasium_infos_tell_of_the_attempts_that_ended():
    env = BatchGymEnv(AttemptsBatch(BanditBatch(1, "0:9", n_pulls=3), 2))
    vector = BatchGymVectorEnv(AttemptsBatch(BanditBatch(2, "0:9", n_pulls=3), 2))
    next_step = BatchGymVectorEnv(AttemptsBatch(BanditBatch(1, "0:9", n_pulls=1), 2), "NextStep")
    next_step.reset()
    assert [next_step.step([0])[4]["_attempt"].tolist() for _ in range(4)] == [[True], [True], [False], [True]]
    env.reset()
    vector.reset()
    for t in range(6):
        _, _, terminated, _, info = env.step(0)
        assert terminated == (t == 5)
        assert info.get("attempt") == {2: 0, 5: 1}.get(t)
        assert ("attempt_return" in info) == (t in (2, 5))
        *_, infos = vector.step(np.zeros(2, int))
        assert infos["_attempt"].tolist() == [t in (2, 5)] * 2
        assert infos["attempt"].tolist() == [t // 3] * 2


def test_rewards_that_are_not_finite_count_as_0_in_the_return_of_an_attempt():
    class NonFinite(BanditBatch):
        def step(self, actions):
            rewards = np.array([1.0, np.nan, np.inf], np.float32)[self._clock]
            return super().step(actions)._replace(rewards=rewards)

    env = BatchVecEnv(AttemptsBatch(NonFinite(1, n_pulls=3), 1), on_nan="skip")
    env.reset()
    with pytest.warns(UserWarning, match="the reward is not finite"):
        *_, infos = [env.step(np.zeros(1, int)) for _ in range(3)][-1]
    assert infos[0]["attempt_return"] == infos[0]["episode"]["r"] == 1.0


def test_wrong_settings_are_refused():
    for attempts in (0, -1, 2.5, True, None):
        with pytest.raises(UserError, match="attempts must be a whole number above 0"):
            AttemptsBatch(RecallBatch(1), attempts)
    for env in (AttemptsBatch(RecallBatch(1), 2), make_batch_env("recall", 1, "0:9", 0, "easy", {}, 2, True)):
        with pytest.raises(UserError, match="attempts of its own"):
            AttemptsBatch(env, 2)
    with pytest.raises(UserError, match="use_sequential_levels"):
        make_batch_env("maze", 1, "0:9", 0, env_kwargs={"use_sequential_levels": True}, attempts=2)
    with pytest.raises(UserError, match=r"actions must lie in 0 \.\. 3"):
        AttemptsBatch(RecallBatch(1), 2).step(np.array([9]))
