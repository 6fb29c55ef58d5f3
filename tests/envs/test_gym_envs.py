"""The environments registered with Gymnasium, single and vectorised."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from packaging.version import Version
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env

from srwm_rl.envs import BatchGymEnv, ProcgenBatch, RecallBatch
from srwm_rl.envs.registration import PROCGEN_IDS, TASK_IDS, register_envs
from srwm_rl.errors import UserError

register_envs()
register_envs()  # a second call changes nothing


@pytest.mark.parametrize("env_id", [*PROCGEN_IDS, *TASK_IDS])
def test_gymnasiums_and_sb3s_checkers_pass_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The minimal resolution for an image")  # of SB3's CnnPolicy
        check_env(gymnasium.make(env_id).unwrapped)
        sb3_check_env(gymnasium.make(env_id), warn=True)


def test_an_id_with_its_module_can_be_made():
    env = gymnasium.make("srwm_rl.envs.registration:srwm_rl/Recall-v0", levels="0:9", delay=4)
    assert env.reset(seed=1)[1]["level_seed"] < 9


def test_seed_and_level_determine_the_episode():
    env = gymnasium.make("procgen-coinrun-v0", num_levels=200, start_level=300, distribution_mode="hard")
    first, info = env.reset(seed=5)
    second, _ = env.reset()
    same_seed, _ = env.reset(seed=5)
    assert 300 <= info["level_seed"] < 500
    assert np.array_equal(first, same_seed)
    assert not np.array_equal(first, second)
    obs, info = env.reset(options={"level": 1003})
    assert info["level_seed"] == 1003
    assert np.array_equal(obs, ProcgenBatch("coinrun", 1, "1003:1004", "hard").reset()[0])
    assert 300 <= env.reset()[1]["level_seed"] < 500
    env.reset(seed=2**40)


@pytest.mark.filterwarnings("ignore:.*render_mode")  # SB3 asks every environment for one
@pytest.mark.parametrize("env_id", TASK_IDS)
def test_sb3_makes_every_task_by_its_id(env_id):
    env = make_vec_env(env_id, 2, seed=1)
    env.reset()
    assert not env.step(np.zeros(2, int))[2].all()


def finish_episode(env, action=4, max_steps=2000):
    """Return the last observation, `terminated` and info of the episode."""
    for _ in range(max_steps):
        obs, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return obs, terminated, info
    raise AssertionError(f"the episode does not end within {max_steps} steps")


def test_steps_after_the_episodes_end_change_nothing_until_reset():
    env = BatchGymEnv(ProcgenBatch("bossfight", 1, "0:50", seed=1))
    _, first_info = env.reset()
    obs, terminated, info = finish_episode(env)
    assert terminated
    assert info["is_success"] is False
    assert info["prev_level_seed"] == first_info["level_seed"]
    same_obs, reward, terminated, _, same_info = env.step(4)
    assert np.array_equal(obs, same_obs)
    assert same_obs is not obs
    assert (reward, terminated, same_info) == (0.0, True, info)
    next_obs, next_info = env.reset()
    assert np.array_equal(next_obs, obs)
    assert next_info["level_seed"] == info["level_seed"]


def test_a_level_option_holds_for_one_episode():
    env = BatchGymEnv(ProcgenBatch("bossfight", 1, "0:50", seed=1))
    env.reset(options={"level": 777})
    assert finish_episode(env)[2]["prev_level_seed"] == 777
    assert env.reset()[1]["level_seed"] < 50
    assert env.step(4)[4]["prev_level_seed"] < 50


def test_successive_episodes_equal_those_of_the_batch():
    env, batch = BatchGymEnv(RecallBatch(1, seed=3)), RecallBatch(1, seed=3)
    obs, rows = env.reset()[0], [batch.reset()[0]]
    for _ in range(60):
        assert np.array_equal(obs, rows[-1])
        obs, reward, terminated, _, info = env.step(1)
        step = batch.step(np.array([1]))
        assert reward == step.rewards[0]
        assert terminated == step.terminated[0]
        rows.append(step.obs[0])
        if terminated:
            assert np.array_equal(obs, step.final_obs[0])
            assert info["is_success"] == step.info["is_success"][0]
            obs, _ = env.reset()


def test_rendered_images_are_large_and_match_the_observation():
    env = gymnasium.make("procgen-maze-v0", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    image = env.render()
    assert image.shape == (512, 512, 3)
    small = image.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(small - obs).mean() < 12
    assert env.metadata["render_fps"] == 15
    assert gymnasium.make("procgen-maze-v0").unwrapped.render() is None


@pytest.mark.filterwarnings("ignore:.*render_mode")
@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("procgen-coinrun-v0", {"levels": "0:9", "num_levels": 9}, "not both"),
        ("procgen-coinrun-v0", {"mode": "easy", "distribution_mode": "easy"}, "two names"),
        ("procgen-coinrun-v0", {"mode": "memory"}, "memory"),
        ("procgen-coinrun-v0", {"num_levels": -5}, "levels"),
        ("procgen-coinrun-v0", {"num_levels": 5, "start_level": -1}, "levels"),
        ("procgen-coinrun-v0", {"use_background": False}, "'use_backgrounds'"),
        ("procgen-coinrun-v0", {"rand_seed": 3}, "'rand_seed': here it is seed"),
        ("srwm_rl/Bandit-v0", {"n_arm": 3}, "'n_arms'"),
        ("srwm_rl/Bandit-v0", {"n_arms": 0}, "n_arms"),
        ("srwm_rl/Bandit-v0", {"render_mode": "rgb_array"}, "bandit has no pictures"),
    ],
)
def test_invalid_settings_are_refused(env_id, kwargs, message):
    for make in (gymnasium.make, lambda *a, **k: gymnasium.make_vec(*a, num_envs=2, **k)):
        with pytest.raises(UserError, match=message):
            make(env_id, **kwargs)


def test_invalid_reset_options_are_refused():
    env = BatchGymEnv(RecallBatch(1))
    for options in ({"levels": [1]}, {"level": -1}, {"level": "3"}):
        with pytest.raises(UserError):
            env.reset(options=options)
    with pytest.raises(UserError):
        BatchGymEnv(RecallBatch(2))


def test_vector_env_steps_equal_those_of_the_batch_with_episode_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make_vec("procgen-leaper-v0", num_envs=3, levels="0:50", seed=4)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.observation_space.shape == (3, 64, 64, 3)
    batch = ProcgenBatch("leaper", 3, "0:50", seed=4)
    obs, infos = env.reset()
    assert np.array_equal(obs, batch.reset())
    returns, lengths, n_episodes = np.zeros(3), np.zeros(3, int), 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        actions = rng.integers(0, 15, 3)
        obs, rewards, terminated, _, infos = env.step(actions)
        step = batch.step(actions)
        assert np.array_equal(obs, step.obs)
        assert np.array_equal(rewards, step.rewards)
        assert env.observation_space.contains(obs)
        returns += rewards
        lengths += 1
        assert ("final_info" in infos) == terminated.any()
        assert "episode" not in infos  # Gymnasium's RecordEpisodeStatistics adds it
        if terminated.any():
            n_episodes += terminated.sum()
            assert np.array_equal(infos["_final_info"], terminated)
            episodes = infos["final_info"]["episode"]
            assert episodes["r"][terminated].tolist() == returns[terminated].tolist()
            assert episodes["l"][terminated].tolist() == lengths[terminated].tolist()
            assert np.array_equal(infos["final_info"]["is_success"], step.info["is_success"] & terminated)
            assert "final_obs" not in infos
            returns[terminated], lengths[terminated] = 0, 0
    assert n_episodes > 3


def test_vector_env_returns_final_observations_of_ended_episodes():
    env = gymnasium.make_vec("srwm_rl/Bandit-v0", num_envs=2, n_pulls=3)
    env.reset(seed=1)
    env.step(np.array([0, 0]))
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(np.array([0, 0]))
    *_, infos = env.step(np.array([0, 0]))
    assert infos["_final_obs"].tolist() == [True, False]
    assert infos["final_obs"][0].tolist() == [1.0]
    assert infos["final_obs"][1] is None
    assert infos["final_info"]["episode"]["l"].tolist() == [3, 0]


def test_vector_env_resets_a_mask_of_environments_to_levels():
    env = gymnasium.make_vec("procgen-maze-v0", num_envs=3, levels="0:50")
    before, _ = env.reset(seed=3)
    assert np.array_equal(before, env.reset(seed=3)[0])
    obs, infos = env.reset(options={"reset_mask": np.array([True, False, False]), "levels": [999, 0, 0]})
    assert infos["level_seed"][0] == 999
    assert infos["_level_seed"].tolist() == [True, False, False]
    assert np.array_equal(obs[1:], before[1:])
    with pytest.raises(UserError):
        env.reset(seed=3, options={"reset_mask": np.array([True, False, False])})
    with pytest.raises(UserError):
        env.reset(options={"mask": [True, False, False]})
    with pytest.raises(UserError):
        env.reset(seed=[1, 2, 3])
    env.close()


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize("env_id", ["procgen-leaper-v0", "srwm_rl/Bandit-v0"])
def test_gymnasium_records_the_episodes_of_a_vector(env_id, mode):
    if mode == "SameStep" and Version(gymnasium.__version__) < Version("1.4"):
        pytest.skip("Gymnasium before 1.4 counts one step too few, and leaves out its reward, in SAME_STEP mode")
    settings = {"n_pulls": 3} if "Bandit" in env_id else {}
    env = gymnasium.make_vec(env_id, num_envs=3, autoreset_mode=mode, seed=1, **settings)
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    env.action_space.seed(0)
    returns, lengths, ended, n_episodes = np.zeros(3), np.zeros(3, int), np.zeros(3, bool), 0
    for _ in range(2_000):  # three of ProcGen's episodes end within 1,000 steps, whatever is pressed
        _, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
        begins = ended if mode == "NextStep" else np.zeros(3, bool)
        assert not rewards[begins].any()
        returns, lengths = returns + rewards, lengths + ~begins
        ended = terminated | truncated
        assert not (ended & begins).any()
        assert (infos["prev_level_seed"] == infos["level_seed"])[begins].all()
        for i in np.flatnonzero(ended):
            n_episodes += 1
            assert infos["episode"]["r"][i] == pytest.approx(returns[i])
            assert infos["episode"]["l"][i] == lengths[i]
        returns, lengths = np.where(ended, 0, returns), np.where(ended, 0, lengths)
        if n_episodes > 5:
            break
    assert n_episodes > 2
    env.close()


def test_next_step_autoreset_returns_last_observations_and_keeps_chosen_levels():
    env = gymnasium.make_vec("srwm_rl/Recall-v0", num_envs=2, delay=1, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    first, _ = env.reset(seed=1, options={"levels": [5, 7]})
    ended, n_episodes = np.zeros(2, bool), 0
    while n_episodes < 6 or not ended.any():
        begins = ended
        obs, rewards, terminated, truncated, infos = env.step(np.array([0, 0]))
        ended = terminated | truncated
        n_episodes += ended.sum()
        assert infos["level_seed"].tolist() == [5, 7]
        assert "final_obs" not in infos
        assert np.array_equal(obs[begins], first[begins])
        assert not obs[ended].any()  # what follows the answer, not the next episode's cue
        assert not rewards[begins].any()
        assert not ended[begins].any()
    env.reset(options={"levels": [5, 7]})
    assert (env.step(np.array([0, 0]))[0] != first).any(axis=1).all()  # the step after a reset counts
    with pytest.raises(UserError, match="'SameStep' or 'NextStep'"):
        gymnasium.make_vec("srwm_rl/Bandit-v0", num_envs=2, autoreset_mode="Disabled")


def test_observation_wrappers_of_gymnasium_take_next_step_vectors():
    env = gymnasium.make_vec("procgen-coinrun-v0", num_envs=2, autoreset_mode="NextStep", seed=0)
    wrapped = gymnasium.wrappers.vector.NormalizeObservation(env)
    obs, _ = wrapped.reset(seed=0)
    assert obs.shape == (2, 64, 64, 3)
    grey = gymnasium.wrappers.vector.GrayscaleObservation(env)
    assert grey.step(np.zeros(2, int))[0].shape == (2, 64, 64)
    env.close()
