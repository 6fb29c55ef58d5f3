"""The hidden-controls room: moves, attempts, controls drawn per level, changes of controls, scores."""

import itertools
from typing import Any

import numpy as np
import pytest

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.tasks import HiddenControlsBatch
from srwm_rl.envs.tasks.hidden_controls import MOVES
from srwm_rl.errors import UserError


class Room:
    """A slow plain twin: one room, written as the class describes it, from the level's own draws."""

    def __init__(self, env: HiddenControlsBatch, level: int) -> None:
        self.env, self.level = env, np.array([level])
        self.attempt = self.clock = self.moved = 0
        self.turned = False
        self.begin()

    def begin(self) -> None:
        start, goal = self.env._places(self.level, np.array([self.attempt]))
        self.agent, self.goal = divmod(int(start[0]), self.env.size), divmod(int(goal[0]), self.env.size)
        self.moved = 0

    def step(self, move: np.ndarray) -> tuple[float, bool]:
        """Make a move; return the reward and whether the attempt ended."""
        row, column = (min(max(int(a + d), 0), self.env.size - 1) for a, d in zip(self.agent, move, strict=True))
        self.agent = (row, column)
        self.moved += 1
        reached = self.agent == self.goal
        ended = reached or self.moved == self.env.attempt_steps
        if ended:
            self.attempt += 1
            if self.attempt < self.env.attempts:
                self.begin()
        return reached - 1 / self.env.attempt_steps, ended


def offsets(obs: np.ndarray, size: int) -> np.ndarray:
    """Return rows and columns from the agent to the goal, `[n, 2]`."""
    width = 2 * size - 1
    assert (obs[:, :width].sum(1) == 1).all()
    assert (obs[:, width : 2 * width].sum(1) == 1).all()
    return np.stack((obs[:, :width].argmax(1), obs[:, width : 2 * width].argmax(1)), 1) - (size - 1)


def effects(obs: np.ndarray, size: int) -> np.ndarray:
    first = 4 * size - 1
    return np.stack((obs[:, first : first + 3].argmax(1), obs[:, first + 3 : first + 6].argmax(1)), 1) - 1


@pytest.mark.parametrize("settings", [{}, {"size": 3, "n_moves": 8, "attempts": 3, "attempt_steps": 4}])
def test_steps_equal_a_plain_room(settings: dict[str, Any]) -> None:
    env, rng = HiddenControlsBatch(1, **settings), np.random.default_rng(0)
    attempts_seen = set()
    for level in range(40):
        obs, room, done, total = env.reset(levels=[level]), Room(env, level), False, 0.0
        assert obs[0, 4 * env.size - 2] == 1
        while not done:
            before = np.array(room.agent)
            assert offsets(obs, env.size)[0].tolist() == (np.array(room.goal) - before).tolist()
            action, attempt = int(rng.integers(env.n_moves)), room.attempt
            move = MOVES[env._controls[0, action]]
            reward, ended = room.step(move)
            step = env.step(np.array([action]))
            total += reward
            assert step.rewards[0] == pytest.approx(reward)
            assert (step.info["attempt"][0], step.info["attempt_ended"][0]) == (attempt, ended)
            assert step.info["attempt_return"][0] == pytest.approx(total, abs=1e-6)
            assert step.info["attempt"].dtype == np.int64
            assert step.info["attempt_return"].dtype == np.float32
            obs, done = step.obs, bool(step.terminated[0])
            assert done == (ended and attempt == env.attempts - 1)
            if not done:
                assert obs[0, 4 * env.size - 2] == ended
            if ended:
                attempts_seen.add(attempt)
                total = 0.0
            elif not done:
                assert effects(obs, env.size)[0].tolist() == (np.array(room.agent) - before).tolist()
    assert attempts_seen == set(range(env.attempts))


def test_the_last_moves_effect_is_observed_over_the_end_of_an_attempt_and_not_at_the_first_step() -> None:
    env = HiddenControlsBatch(200, attempt_steps=1, attempts=3)
    obs = env.reset()
    assert (obs[:, 19:] == 0).all()
    step = env.step(np.zeros(200, int))
    assert step.info["attempt_ended"].all()
    moves = MOVES[env._controls[:, 0]]
    effect = effects(step.obs, 5)
    stayed = (effect == 0).all(1)
    assert (effect[~stayed] == moves[~stayed]).all()
    assert 0.1 < stayed.mean() < 0.35  # a fifth of the moves run into a wall
    without = HiddenControlsBatch(200, effect=False)
    assert np.array_equal(without.reset(levels=np.arange(200)), env.reset(levels=np.arange(200))[:, :19])


def test_controls_are_permutations_drawn_evenly_and_kept_over_attempts() -> None:
    env = HiddenControlsBatch(4800, attempt_steps=2, attempts=3)
    env.reset()
    controls = env._controls.copy()
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for row in controls.tolist():
        counts[tuple(row)] += 1
    assert min(counts.values()) > 130  # 200 expected, standard deviation 14
    assert max(counts.values()) < 270
    for _ in range(2):
        env.step(np.zeros(4800, int))
    assert (env._attempt > 0).all()
    assert (env._controls == controls).all()


def test_controls_change_at_an_attempt_unannounced() -> None:
    changing, constant = (HiddenControlsBatch(500, attempt_steps=1, change_at=at) for at in (2, 0))
    first, second = changing.reset(levels=np.arange(500)), constant.reset(levels=np.arange(500))
    for attempt in range(6):
        assert np.array_equal(first[:, :19], second[:, :19])
        same = (changing._controls == constant._controls).all(1)
        assert same.all() if attempt < 2 else 0.005 < same.mean() < 0.1  # 1 of 24
        first, second = (env.step(np.full(500, 1)).obs for env in (changing, constant))


def test_a_flash_turns_the_controls_round_until_the_next() -> None:
    env = HiddenControlsBatch(300, "0:300", flash=5, size=9, attempts=2, attempt_steps=20)
    obs, turned, flashes = env.reset(levels=np.arange(300)), np.zeros(300, bool), []
    assert (obs[:, -1] == 0).all()
    for _ in range(20):
        turned ^= obs[:, -1] == 1
        before, attempt = env._agent.copy(), env._attempt.copy()
        moves = MOVES[env._controls[:, 2]] * np.where(turned, -1, 1)[:, None]
        step = env.step(np.full(300, 2))
        went_on = ~step.info["attempt_ended"]
        assert (env._agent[went_on] == np.clip(before + moves, 0, 8)[went_on]).all()
        running = ~step.terminated & (attempt == env._attempt)
        flashes += step.obs[running, -1].tolist()
        obs = step.obs
        turned[step.terminated] = False
    assert np.mean(flashes) == pytest.approx(0.2, abs=0.03)


def test_starts_and_goals_differ_and_are_even() -> None:
    env = HiddenControlsBatch(1)
    starts, goals = env._places(np.arange(20_000)[:, None], np.arange(3))
    assert (starts != goals).all()
    pairs = np.bincount((starts * 25 + goals).ravel(), minlength=625).reshape(25, 25)
    assert (pairs.diagonal() == 0).all()
    off_diagonal = pairs[~np.eye(25, dtype=bool)]
    assert 60 < off_diagonal.min() <= off_diagonal.max() < 145  # 100 expected, standard deviation 10


def knowing_actions(env: HiddenControlsBatch) -> np.ndarray:
    """Return actions that bring the agent nearest to the goal."""
    moves = MOVES[env._controls]  # [n, actions, 2]
    if env.flash:
        moves = np.where(env._flashes()[1][:, None, None], -moves, moves)
    to = np.clip(env._agent[:, None] + moves, 0, env.size - 1)
    ways = np.abs(to - env._goal[:, None])
    return (ways.sum(-1) if env.n_moves == 4 else ways.max(-1)).argmin(1)


@pytest.mark.parametrize(
    "settings", [{}, {"n_moves": 8, "size": 7}, {"change_at": 2, "flash": 4}, {"size": 6, "attempt_steps": 4}]
)
def test_the_reference_is_what_an_agent_that_knows_the_controls_earns(settings: dict[str, Any]) -> None:
    env = HiddenControlsBatch(300, **settings)
    levels = np.arange(100, 400)
    env.reset(levels=levels)
    total, running = np.zeros(300), np.ones(300, bool)
    while running.any():
        step = env.step(knowing_actions(env))
        total += step.rewards * running
        running &= ~step.terminated
    returns = HiddenControlsBatch.reference_returns(LevelRange(100, 400), **settings)["knows the controls"]
    assert returns.dtype == np.float32
    assert returns == pytest.approx(total, abs=1e-4)
    best = HiddenControlsBatch.score_range(**settings)[1]
    assert returns.mean() == pytest.approx(best, abs=float(4 * returns.std() / 300**0.5))


def test_the_score_range_is_that_of_random_and_optimal_play() -> None:
    assert HiddenControlsBatch.score_range()[1] == pytest.approx(6 * (1 - 10 / 3 / 12))
    for settings in ({}, {"n_moves": 8, "size": 3, "attempt_steps": 5}):
        env, rng = HiddenControlsBatch(4000, attempts=1, **settings), np.random.default_rng(0)
        env.reset()
        returns, first = np.zeros(4000), np.ones(4000, bool)  # of each environment's first episode
        while first.any():
            step = env.step(rng.integers(0, env.n_moves, 4000))
            returns += step.rewards * first
            first &= ~step.terminated
        expected = HiddenControlsBatch.score_range(attempts=1, **settings)[0]
        assert np.mean(returns) == pytest.approx(expected, abs=4.5 * np.std(returns) / len(returns) ** 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 1},
        {"n_moves": 5},
        {"attempts": 0},
        {"attempt_steps": 0},
        {"effect": 1},
        {"change_at": 6},
        {"change_at": -1},
        {"flash": -1},
        {"flash": 0.5},
        {"change_at": None},
        {"flash": None},
    ],
)
def test_invalid_arguments_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        HiddenControlsBatch(2, **settings)
