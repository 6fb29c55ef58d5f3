"""Associative recall: pairs, overwrites, queries, and the newest value as the one right answer."""

from typing import Any

import numpy as np
import pytest

from srwm_rl.envs.tasks import AssociativeRecallBatch
from srwm_rl.errors import UserError


def play_remembering(env: AssociativeRecallBatch, n_wrong: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Play with a dict per environment as memory, the first `n_wrong` answers wrong; return frames and returns."""
    obs, frames, total = env.reset(), [], np.zeros(env.n_envs)
    memories: list[dict[int, int]] = [{} for _ in range(env.n_envs)]
    answered = np.zeros(env.n_envs, int)
    for t in range(env.length):
        frames.append(obs)
        actions = np.zeros(env.n_envs, int)
        for i, row in enumerate(obs):
            key, value = int(row[: env.n_pairs].argmax()), row[env.n_pairs : -1]
            if row[-1]:
                actions[i] = (memories[i][key] + (answered[i] < n_wrong)) % env.n_values
                answered[i] += 1
                assert value.sum() == 0
            else:
                assert memories[i].get(key) != value.argmax()  # an overwrite changes the value
                memories[i][key] = int(value.argmax())
        step = env.step(actions)
        assert (step.rewards[obs[:, -1] == 0] == 0).all()
        total += step.rewards
        assert (step.terminated == (t == env.length - 1)).all()
        obs = step.obs
    assert step.final_obs is not None
    assert (step.final_obs == 0).all()
    return np.array(frames), total


@pytest.mark.parametrize("settings", [{}, {"n_pairs": 1}, {"n_pairs": 20, "n_values": 2, "n_overwrites": 40}])
def test_the_newest_value_is_the_right_answer(settings: dict[str, int]) -> None:
    env = AssociativeRecallBatch(30, **settings)
    frames, total = play_remembering(env)
    assert total == pytest.approx(np.ones(30), abs=1e-5)
    assert (frames[:, :, : env.n_pairs].sum(-1) == 1).all()
    assert (frames[: env.n_pairs, :, : env.n_pairs].sum(0) == 1).all()  # every key once
    assert (frames[..., -1].sum(0) == env.n_queries).all()
    assert (frames[-1, :, -1] == 1).all()
    _, total = play_remembering(env, n_wrong=1)
    assert total == pytest.approx(np.full(30, 1 - 1 / env.n_queries), abs=1e-5)


def test_everything_shown_is_even() -> None:
    env = AssociativeRecallBatch(4000, n_pairs=4, n_values=3, n_overwrites=2, n_queries=2)
    frames, _ = play_remembering(env)
    assert np.abs(frames[0, :, :4].mean(0) - 0.25).max() < 0.035
    values = frames[:4, :, 4:7].mean((0, 1))
    assert np.abs(values - 1 / 3).max() < 0.02
    asked = frames[4:, :, -1].mean(1)
    assert np.abs(asked - [1 / 3, 1 / 3, 1 / 3, 1]).max() < 0.035  # the last of the four is a query
    assert np.abs(frames[4:, :, :4].mean((0, 1)) - 0.25).max() < 0.02


def test_random_answers_are_right_once_in_n_values() -> None:
    env, rng = AssociativeRecallBatch(2000), np.random.default_rng(0)
    env.reset()
    total = sum(env.step(rng.integers(0, 8, 2000)).rewards.sum() for _ in range(20)) / 2000
    assert total == pytest.approx(AssociativeRecallBatch.score_range()[0], abs=0.012)  # standard error 0.0026
    assert AssociativeRecallBatch.score_range(n_values=4) == (0.25, 1.0)
    assert AssociativeRecallBatch.reference_returns(range(3)) == {}


def test_previous_actions_are_not_inputs_by_default() -> None:
    assert AssociativeRecallBatch.memory_inputs == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"n_pairs": 0},
        {"n_values": 1},
        {"n_overwrites": -1},
        {"n_overwrites": 1.5},
        {"n_overwrites": False},
        {"n_queries": 0},
    ],
)
def test_invalid_arguments_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        AssociativeRecallBatch(2, **settings)
