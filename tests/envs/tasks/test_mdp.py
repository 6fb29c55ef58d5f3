"""Tabular MDPs: draws, luck, attempts, and value iteration against brute force."""

import itertools
from typing import Any

import numpy as np
import pytest

from srwm_rl.envs.tasks import MDPBatch
from srwm_rl.envs.tasks.mdp import draw_mdps, optimal_action_values
from srwm_rl.errors import UserError


def test_means_are_normal_and_transitions_flat_dirichlet() -> None:
    means, transitions = draw_mdps(np.arange(3000), 10, 5)
    assert means.mean() == pytest.approx(1.0, abs=0.01)
    assert means.std() == pytest.approx(1.0, abs=0.01)
    assert ((means < 1 - 1.6449).mean(), (means > 1 + 1.6449).mean()) == pytest.approx((0.05, 0.05), abs=0.003)
    assert transitions.sum(-1) == pytest.approx(np.ones((3000, 10, 5)))
    assert transitions.mean((0, 1, 2)) == pytest.approx(np.full(10, 0.1), abs=0.002)
    # The marginals of a flat Dirichlet distribution of 10 are Beta(1, 9): P(p > x) = (1 - x)^9.
    assert (transitions > 0.2).mean() == pytest.approx(0.8**9, abs=0.003)
    assert transitions.var() == pytest.approx(9 / (100 * 11), rel=0.02)


def brute_force(rewards: np.ndarray, transitions: np.ndarray, n_steps: int) -> float:
    """Return the best return from state 0 over all deterministic policies of (step, state)."""
    n_states, n_actions = rewards.shape
    best = -np.inf
    for choices in itertools.product(range(n_actions), repeat=n_states * n_steps):
        policy, at, total = np.reshape(choices, (n_steps, n_states)), np.eye(n_states)[0], 0.0
        for actions in policy:
            rows = np.arange(n_states)
            total += at @ rewards[rows, actions]
            at = at @ transitions[rows, actions]
        best = max(best, total)
    return best


@pytest.mark.parametrize(("n_states", "n_actions", "n_steps"), [(2, 2, 3), (3, 2, 3), (2, 3, 2)])
def test_value_iteration_equals_brute_force(n_states: int, n_actions: int, n_steps: int) -> None:
    rewards, transitions = draw_mdps(np.arange(5), n_states, n_actions)
    values = optimal_action_values(rewards, transitions, n_steps)
    assert values.shape == (n_steps, 5, n_states, n_actions)
    expected = [brute_force(*mdp, n_steps) for mdp in zip(rewards, transitions, strict=True)]
    assert values[0, :, 0].max(-1) == pytest.approx(expected)


def test_rewards_and_transitions_are_those_of_the_mdp() -> None:
    n = 4000
    env = MDPBatch(n, n_states=3, n_actions=2, attempts=1, attempt_steps=30)
    env.reset(levels=np.full(n, 7))  # one level everywhere: all have the same luck
    means, transitions = (part[0] for part in draw_mdps(np.array([7]), 3, 2))
    step = env.step(np.zeros(n, int))
    assert (step.rewards == step.rewards[0]).all()
    assert (step.obs == step.obs[0]).all()
    env.reset(levels=np.arange(n))
    noise, chances = [], []
    for _ in range(30):
        state, actions = env._state.copy(), np.arange(n) % 2
        rows = np.arange(n), state, actions
        all_means, all_transitions = draw_mdps(np.arange(n), 3, 2)
        step = env.step(actions)
        noise.append(step.rewards - all_means[rows])
        if not step.terminated.any():
            chances.append(((env._state == 1), all_transitions[rows][:, 1]))
    assert np.mean(noise) == pytest.approx(0.0, abs=0.01)
    assert np.std(noise) == pytest.approx(1.0, abs=0.01)
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.06
    came, chance = (np.concatenate(part) for part in zip(*chances, strict=True))
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (chance >= low) & (chance < low + 0.25)
        assert came[chosen].mean() == pytest.approx(chance[chosen].mean(), abs=0.015)
    assert means.shape == (3, 2)
    assert transitions.shape == (3, 2, 3)


def test_attempts_begin_in_state_0_and_are_reported() -> None:
    env, rng = MDPBatch(50, attempts=3, attempt_steps=4), np.random.default_rng(0)
    obs, total = env.reset(), np.zeros(50)
    for t in range(12):
        first = t % 4 == 0
        assert (obs[:, -1] == first).all()
        assert (obs[:, :-1].sum(1) == 1).all()
        assert (obs[:, 0] == 1).all() or not first
        step = env.step(rng.integers(0, 5, 50))
        total = step.rewards + (0 if first else total)
        assert (step.info["attempt"] == t // 4).all()
        assert (step.info["attempt_ended"] == (t % 4 == 3)).all()
        assert step.info["attempt_return"] == pytest.approx(total, abs=1e-5)
        assert (step.terminated == (t == 11)).all()
        obs = step.obs


def test_the_same_state_and_action_have_the_same_luck() -> None:
    first, second = MDPBatch(500), MDPBatch(500)
    rng = np.random.default_rng(0)
    for env in (first, second):
        env.reset(levels=np.arange(500))
    compared = 0
    for _ in range(20):
        a, b = rng.integers(0, 5, (2, 500))
        same = (first._state == second._state) & (a == b)
        one, two = first.step(a), second.step(b)
        assert (one.rewards[same] == two.rewards[same]).all()
        assert (one.obs[same] == two.obs[same]).all()
        compared += same.sum()
    assert compared > 200


def test_the_score_range_is_that_of_random_play_and_of_the_optimal_policy() -> None:
    env, rng = MDPBatch(1000), np.random.default_rng(0)
    env.reset(levels=np.arange(1000))
    total = sum(env.step(rng.integers(0, 5, 1000)).rewards.sum() for _ in range(100)) / 1000
    random, best = MDPBatch.score_range()
    assert total == pytest.approx(random, abs=2.0)  # standard error 0.4
    references = MDPBatch.reference_returns(range(10_000, 11_000))
    returns = references["optimal policy (knows the MDP)"]
    assert returns.mean() == pytest.approx(best, abs=float(4 * returns.std() / 1000**0.5))
    assert best == pytest.approx(219, abs=1)
    bonus, drawn, greedy = (references[name].mean() for name in [*references][1:])
    assert bonus == pytest.approx(150.2, abs=4)  # Duan et al. 2016, table 2; standard error .8
    assert best - 50 > bonus > greedy > drawn > random + 25


@pytest.mark.parametrize("settings", [{"n_states": 0}, {"n_actions": 0}, {"attempts": 0}, {"attempt_steps": True}])
def test_invalid_arguments_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        MDPBatch(2, **settings)
