"""Right answers: what they pay, where none is asked for, and through every wrapper."""

import numpy as np
import pytest

from srwm_rl.envs.make import make_batch_env, make_vec_env
from srwm_rl.envs.tasks import TASKS
from srwm_rl.envs.wrappers.grouped import GroupedVecEnv
from srwm_rl.errors import UserError

ANSWERED = [name for name, task in TASKS.items() if task.has_answers]
BEST = {"recall": 1.0, "parity": 40.0, "repeat_previous": 1.0, "associative_recall": 1.0}


def played(env, n_episodes, answer):
    """Return the mean return of the first episodes that end when `answer` maps the right answers to actions."""
    returns, totals = [], np.zeros(env.n_envs)
    while len(returns) < n_episodes:
        step = env.step(answer(env.answers()))
        totals += step.rewards
        done = step.terminated | step.truncated
        returns += totals[done].tolist()
        totals[done] = 0.0
    return np.mean(returns)


def test_the_tasks_with_answers():
    assert set(BEST) <= set(ANSWERED)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", BEST)
def test_right_answers_earn_the_best_return_and_others_do_not(name, shuffle):
    env = make_batch_env(name, 8, "0:1000", 0, shuffle_actions=shuffle)
    n_actions = env.action_space.n
    assert played(env, 16, lambda right: np.maximum(right, 0)) == pytest.approx(BEST[name], abs=1e-5)
    assert played(env, 16, lambda right: (right + 1) % n_actions) < BEST[name] / 2


@pytest.mark.parametrize("name", BEST)
def test_a_step_without_an_answer_pays_the_same_for_every_action(name):
    env = make_batch_env(name, 16, "0:1000", 3)
    unanswered = 0
    for t in range(30):
        right = env.answers()
        assert right.dtype == np.int64
        assert right.shape == (16,)
        rewards = env.step(np.full(16, t % env.action_space.n)).rewards
        assert not rewards[right < 0].any()
        unanswered += (right < 0).sum()
    assert (unanswered > 0) == (name != "parity")


def test_answers_through_the_wrappers():
    """Environments on level 7 give the same answers bare, and inside memory inputs, attempts and groups."""
    bare = make_batch_env("repeat_previous", 4, "7:8", 0)
    wrapped = [make_vec_env("repeat_previous", 2, "7:8", seed, attempts=2) for seed in range(2)]
    grouped = GroupedVecEnv(wrapped)
    assert grouped.has_answers
    bare.reset()
    grouped.reset()
    for _ in range(60):
        np.testing.assert_array_equal(grouped.answers(), bare.answers())
        bare.step(np.zeros(4, np.int64))
        grouped.step(np.zeros(4, np.int64))


def test_environments_without_answers_say_so():
    env = make_vec_env("bandit", 2, "0:10", 0)
    assert not env.has_answers
    with pytest.raises(UserError, match="bandit has no right answers"):
        env.answers()
