"""Policies that learn a finite MDP while they act: their posterior, and what they earn."""

import numpy as np
import pytest

from srwm_rl.envs.tasks import MDPBatch
from srwm_rl.envs.tasks.mdp import optimal_action_values
from srwm_rl.envs.tasks.mdp_policies import BONUS, Seen, exploration_bonus, greedy, posterior_sampling


def seen_after(n_steps: int) -> Seen:
    """Return what is seen in two MDPs of three states and two actions after random steps, of which every 5th ends."""
    seen, rng = Seen.nothing(2, 3, 2), np.random.default_rng(0)
    for t in range(n_steps):
        states, following, actions = rng.integers(0, 3, 2), rng.integers(0, 3, 2), rng.integers(0, 2, 2)
        seen.add(states, actions, rng.normal(size=2), None if t % 5 == 4 else following)
    return seen


def test_what_was_seen_is_counted_per_mdp() -> None:
    seen, rng = seen_after(40), np.random.default_rng(0)
    tries, rewards, moves = np.zeros((2, 3, 2)), np.zeros((2, 3, 2)), np.zeros((2, 3, 2, 3))
    for t in range(40):
        states, following, actions = rng.integers(0, 3, 2), rng.integers(0, 3, 2), rng.integers(0, 2, 2)
        paid = rng.normal(size=2)
        for i in range(2):
            tries[i, states[i], actions[i]] += 1
            rewards[i, states[i], actions[i]] += paid[i]
            moves[i, states[i], actions[i], following[i]] += t % 5 != 4
    assert (seen.tries == tries).all()
    assert seen.rewards == pytest.approx(rewards)
    assert (seen.moves == moves).all()


def test_draws_are_those_of_the_posterior() -> None:
    seen, draw = seen_after(40), posterior_sampling(np.array([3, 8]))
    drawn = [draw(seen) for _ in range(4000)]
    rewards, transitions = (np.stack(part) for part in zip(*drawn, strict=True))
    variance = 1 / (1 + seen.tries)  # of a normal mean with prior N(1, 1) after `tries` numbers of variance 1
    assert rewards.mean(0) == pytest.approx(variance * (1 + seen.rewards), abs=0.07)  # 4 standard errors at most
    assert rewards.var(0) == pytest.approx(variance, rel=0.12)
    weights = 1 + seen.moves
    assert transitions.sum(-1) == pytest.approx(np.ones((4000, 2, 3, 2)))
    assert transitions.mean(0) == pytest.approx(weights / weights.sum(-1, keepdims=True), abs=0.02)
    total = weights.sum(-1, keepdims=True)
    assert transitions.var(0) == pytest.approx(weights * (total - weights) / total**2 / (total + 1), rel=0.15)


def test_plans_without_draws_are_the_means_of_draws() -> None:
    seen, draw = seen_after(40), posterior_sampling(np.array([3, 8]))
    rewards, transitions = (np.mean(part, axis=0) for part in zip(*(draw(seen) for _ in range(4000)), strict=True))
    assert greedy(seen)[0] == pytest.approx(rewards, abs=0.07)
    assert greedy(seen)[1] == pytest.approx(transitions, abs=0.02)
    bonus = exploration_bonus(seen)
    assert bonus[0] == pytest.approx(greedy(seen)[0] + BONUS / (1 + seen.tries))
    assert bonus[1] == pytest.approx(greedy(seen)[1])


def test_greed_plans_with_what_an_agent_is_shown() -> None:
    settings = {"n_states": 3, "n_actions": 2, "attempts": 5, "attempt_steps": 4}
    returns = MDPBatch.reference_returns(range(50), **settings)["greedy, by posterior means"]
    for level, expected in enumerate(returns):
        env, total = MDPBatch(1, **settings), 0.0
        obs = env.reset(levels=np.array([level]))
        sums, tries, moves = np.ones((1, 3, 2)), np.ones((1, 3, 2)), np.ones((1, 3, 2, 3))
        for t in range(20):
            if obs[0, -1]:  # an attempt begins
                plan = optimal_action_values(sums / tries, moves / moves.sum(-1, keepdims=True), 4)
            state = obs[0, :3].argmax()
            action = plan[t % 4, 0, state].argmax()
            step = env.step(np.array([action]))
            obs, total = step.obs, total + step.rewards[0]
            sums[0, state, action] += step.rewards[0]
            tries[0, state, action] += 1
            if not obs[0, -1]:  # else it is the next attempt's first state
                moves[0, state, action, obs[0, :3].argmax()] += 1
        assert expected == pytest.approx(total, abs=1e-4)


def test_reference_returns_depend_on_each_level_alone() -> None:
    settings = {"n_states": 4, "n_actions": 3, "attempts": 3, "attempt_steps": 5}
    returns = MDPBatch.reference_returns(range(60), **settings)
    some = MDPBatch.reference_returns([41, 7], **settings)
    assert len(returns) == 4
    for name, of_all in returns.items():
        assert some[name] == pytest.approx(of_all[[41, 7]])
