"""The parity task: observations, rewards, and default inputs that do not determine the answer."""

import numpy as np
import pytest

from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.envs import make_levels_env
from srwm_rl.envs.tasks import ParityBatch
from srwm_rl.errors import UserError


def bits_of(env: ParityBatch, levels: np.ndarray) -> np.ndarray:
    """Return the observed bits, `[T, n]`."""
    obs, frames = env.reset(levels=levels), []
    for _ in range(env.length):
        frames.append(obs.copy())
        obs = env.step(np.zeros(env.n_envs, int)).obs
    one_hot = np.array(frames)
    assert (one_hot.sum(-1) == 1).all()
    return one_hot.argmax(-1)


def test_the_rewarded_answer_is_the_parity_of_the_bits_so_far() -> None:
    env = ParityBatch(50, length=12)
    levels = np.arange(50)
    parity = bits_of(env, levels).cumsum(0) % 2
    env.reset(levels=levels)
    wrong_at = np.arange(50) % 12
    for t in range(12):
        answers = np.where(wrong_at == t, 1 - parity[t], parity[t])
        step = env.step(answers)
        assert step.rewards.tolist() == np.where(wrong_at == t, -1.0, 1.0).tolist()
        assert step.terminated.all() == step.terminated.any() == (t == 11)
    assert step.final_obs is not None
    assert (step.final_obs == 0).all()


def test_bits_are_even_and_independent() -> None:
    bits = bits_of(ParityBatch(4000, length=10), np.arange(4000))
    assert np.abs(bits.mean(1) - 0.5).max() < 0.04
    correlations = np.corrcoef(bits) - np.eye(10)
    assert np.abs(correlations).max() < 0.07  # standard error 0.016


def test_a_longer_episode_begins_with_the_bits_of_a_shorter_one() -> None:
    levels = np.arange(7)
    short, long = bits_of(ParityBatch(7, length=5), levels), bits_of(ParityBatch(7, length=20), levels)
    assert np.array_equal(short, long[:5])


class MemorylessAgent:
    """Answers without memory: the previous parity follows from the previous answer and reward; adds the present bit."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):  # type: ignore[no-untyped-def]
        bit = observation["observation"].argmax(1)
        answer, reward = observation["previous_action"].argmax(1), observation["previous_reward"][:, 0]
        parity = np.where(reward == 0, 0, np.where(reward > 0, answer, 1 - answer))
        return (parity + bit) % 2, None


def test_previous_action_and_reward_determine_the_answer_and_are_not_inputs_by_default() -> None:
    env = make_levels_env("parity", 8, "0:16", 1, 0, inputs=("action", "reward"))
    assert (play_levels(MemorylessAgent(), env).level_means() == 40).all()
    assert ParityBatch.memory_inputs == ()


def test_the_score_range_depends_on_the_length() -> None:
    assert ParityBatch.score_range() == (0.0, 40.0)
    assert ParityBatch.score_range(length=160) == (0.0, 160.0)
    with pytest.raises(UserError, match="length"):
        ParityBatch(2, length=0)
