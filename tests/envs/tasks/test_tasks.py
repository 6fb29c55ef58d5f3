"""The built-in tasks: levels, seeds, saved states and rewards."""

import copy
import time

import numpy as np
import pytest

from srwm_rl.envs.tasks import (
    TASKS,
    AssociativeRecallBatch,
    BanditBatch,
    HiddenControlsBatch,
    MDPBatch,
    ParityBatch,
    RecallBatch,
    RepeatPreviousBatch,
)
from srwm_rl.envs.tasks.bandit import bayes_optimal_return
from srwm_rl.errors import UserError
from tests.envs.steps import steps_equal


def play(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(0, env.action_space.n, env.n_envs)) for _ in range(steps)]


VECTOR_TASKS = {name: task for name, task in TASKS.items() if name != "fewshot"}  # see tests/envs/fewshot
tasks = pytest.mark.parametrize("task", VECTOR_TASKS.values(), ids=VECTOR_TASKS)
# A setting of each task that changes what a level contains.
OTHER = {
    RecallBatch: "delay",
    BanditBatch: "n_pulls",
    ParityBatch: "length",
    RepeatPreviousBatch: "k",
    AssociativeRecallBatch: "n_queries",
    HiddenControlsBatch: "flash",
    MDPBatch: "attempt_steps",
}


@tasks
def test_the_seed_determines_the_steps(task):
    steps = []
    for seed in (1, 1, 2):
        env = task(8, "0:1000", seed)
        env.reset()
        steps.append(play(env, 60))
    assert steps_equal(steps[0], steps[1])
    assert not steps_equal(steps[0], steps[2])


@tasks
def test_a_restored_state_continues_bit_exactly_in_an_instance_with_another_seed(task):
    env = task(8, "0:1000", 1)
    env.reset()
    play(env, 25)
    env.reset(np.arange(8) < 2, np.full(8, 5000))
    play(env, 7)
    state = copy.deepcopy(env.get_state())
    steps = play(env, 60, seed=3)
    restored = task(8, "0:1000", 99)
    restored.set_state(state)
    assert steps_equal(steps, play(restored, 60, seed=3))
    assert np.array_equal(env.reset(), restored.reset())
    assert env.level_seed().tolist() == restored.level_seed().tolist()


@tasks
def test_states_of_other_environments_are_refused(task):
    env = task(4, "0:10", 1)
    settings = {OTHER[task]: 7}
    for other in (task(5, "0:10", 1), task(4, "0:11", 1), task(4, "0:10", 1, **settings)):
        with pytest.raises(UserError):
            env.set_state(other.get_state())
    other = BanditBatch(4, "0:10") if task is RecallBatch else RecallBatch(4, "0:10")
    with pytest.raises(UserError):
        env.set_state(other.get_state())


@tasks
def test_a_masked_reset_leaves_other_environments_bit_identical(task):
    masked, unmasked = task(6, "0:1000", 1), task(6, "0:1000", 1)
    for env in (masked, unmasked):
        env.reset()
        play(env, 4)
    mask = np.arange(6) % 2 == 0
    masked.reset(mask)
    masked_steps, unmasked_steps = play(masked, 60, seed=3), play(unmasked, 60, seed=3)
    assert steps_equal(masked_steps, unmasked_steps, ~mask)
    assert not steps_equal(masked_steps, unmasked_steps, mask)


@tasks
def test_level_and_actions_determine_the_episode(task):
    first, second = task(2, "0:1000", 1), task(2, "0:9", 2)
    play(first, 5)
    assert np.array_equal(first.reset(levels=[77, 78]), second.reset(levels=[77, 78]))
    assert steps_equal(play(first, 40), play(second, 40))
    assert first.level_seed().tolist() == [77, 78]
    first.reset()
    assert all(level < 1000 for level in first.level_seed())
    assert first.level_seed().tolist() != [77, 78]


@tasks
def test_the_levels_played_are_those_of_the_range(task):
    env = task(16, "20:24", 1)
    env.reset()
    assert {int(level) for step in play(env, 200) for level in step.info["level_seed"]} == {20, 21, 22, 23}


@tasks
def test_later_steps_do_not_overwrite_returned_arrays(task):
    env = task(4, "0:100", 1)
    env.reset()
    step = play(env, 1)[0]
    before = copy.deepcopy(step)
    play(env, 30)
    assert steps_equal([step], [before])


@tasks
def test_1024_environments_make_50_000_steps_per_second(task):
    env = task(1024)
    env.reset()
    play(env, 5)
    start = time.perf_counter()
    play(env, 50)
    assert time.perf_counter() - start < 1.0  # 50,000 steps per second; measured: over a million


def recall_answers(env):
    """Answer every query with the cue; return the cues and the lengths of the first episodes, `[n]` each."""
    obs = env.reset()
    n = env.n_symbols
    cues, clocks, clock = obs[:, :n].argmax(1), np.zeros(env.n_envs, int), 0
    assert (obs[:, :n].sum(1) == 1).all()
    while (clocks == 0).any():
        clock += 1
        step = env.step(cues)
        clocks[(clocks == 0) & step.terminated] = clock
    return cues, clocks


def test_recall_shows_cue_then_distractors_then_query():
    env = RecallBatch(1, "0:100", n_symbols=3, delay=6)
    for level in range(30):
        obs, rows = env.reset(levels=[level]), []
        while True:
            rows.append(obs[0])
            step = env.step(np.array([0]))
            if step.terminated[0]:
                break
            obs = step.obs
        frames = np.array(rows)
        assert frames.shape[1] == 7
        assert frames[0, :3].sum() == 1
        assert frames[0, 3:].sum() == 0
        assert (frames[1:, :3] == 0).all()
        assert (frames[1:-1, 3:6].sum(1) == 1).all()
        assert frames[-1].tolist() == [0, 0, 0, 0, 0, 0, 1]
        assert 3 <= len(frames) - 2 <= 6
        assert step.rewards[0] == (frames[0, 0] == 1)
        assert step.final_obs.sum() == 0


def test_recall_rewards_the_right_answer_only():
    env = RecallBatch(64, "0:1000", seed=5)
    obs = env.reset()
    cue = obs[:, :4].argmax(1)
    guess = np.where(np.arange(64) < 32, cue, (cue + 1) % 4)
    finished = np.zeros(64, bool)
    while not finished.all():
        step = env.step(guess)
        ended = step.terminated & ~finished
        right = np.arange(64) < 32
        assert (step.rewards[ended] == right[ended]).all()
        assert (step.info["is_success"][ended] == right[ended]).all()
        assert (step.rewards[~step.terminated] == 0).all()
        finished |= ended


def test_recall_cues_and_delays_are_uniform_and_independent():
    env = RecallBatch(6000, seed=2)
    cues, clocks = recall_answers(env)
    assert np.all(np.abs(np.bincount(cues, minlength=4) / 6000 - 0.25) < 0.03)
    delays = clocks - 2  # the cue and the query are no distractors
    assert set(delays) == set(range(5, 11))
    assert np.all(np.abs(np.bincount(delays)[5:] / 6000 - 1 / 6) < 0.03)
    assert abs(np.corrcoef(cues, delays)[0, 1]) < 0.06


def test_recall_random_answers_succeed_in_a_quarter_of_episodes():
    env = RecallBatch(500, seed=2)
    env.reset()
    steps = play(env, 100)
    ends = sum(int(step.terminated.sum()) for step in steps)
    solved = sum(int((step.info["is_success"] & step.terminated).sum()) for step in steps)
    assert ends > 3000
    assert abs(solved / ends - 0.25) < 0.035


def test_bandit_reward_of_an_arm_does_not_depend_on_earlier_choices():
    first, second = BanditBatch(400, "0:400", n_pulls=6), BanditBatch(400, "0:400", n_pulls=6)
    levels = np.arange(400)
    first.reset(levels=levels)
    second.reset(levels=levels)
    rng = np.random.default_rng(0)
    for _ in range(6):
        a, b = rng.integers(0, 5, (2, 400))
        rewards_a, rewards_b = first.step(a).rewards, second.step(b).rewards
        assert (rewards_a[a == b] == rewards_b[a == b]).all()
        assert (rewards_a[a != b] != rewards_b[a != b]).any()


def test_bandit_arms_have_independent_rewards():
    first, second = BanditBatch(8000, "0:8000"), BanditBatch(8000, "0:8000")
    first.reset(levels=np.arange(8000))
    second.reset(levels=np.arange(8000))
    products = first.step(np.full(8000, 1)).rewards * second.step(np.full(8000, 3)).rewards
    assert abs(products.mean() - 0.25) < 0.025  # fully correlated arms would give 1/3; the standard error is 0.005


def test_bandit_arms_have_fixed_uniform_reward_probabilities():
    env = BanditBatch(2000, "0:2000", n_pulls=40)
    env.reset(levels=np.arange(2000))
    total = np.zeros(2000)
    for k in range(40):
        step = env.step(np.zeros(2000, int))
        total += step.rewards
        assert step.terminated.all() == (k == 39)
    # Beta-binomial with a uniform prior: uniform on 0 .. 40, unlike 40 independent fair coins (variance 10).
    assert abs(total.mean() - 20) < 1.2
    assert 120 < total.var() < 160


def test_bandit_random_play_returns_half_of_the_pulls():
    env = BanditBatch(1000)
    env.reset()
    steps = play(env, 50)
    mean = sum(step.rewards.sum() for step in steps) / 5000
    assert abs(mean - BanditBatch.score_range()[0]) < 0.2


def test_bandit_bayes_optimal_returns_are_exact():
    start = time.perf_counter()
    assert round(bayes_optimal_return(5, 10), 3) == 6.660
    assert round(bayes_optimal_return(10, 10), 3) == 6.714
    assert round(bayes_optimal_return(5, 15), 3) == 10.432
    assert time.perf_counter() - start < 10
    assert bayes_optimal_return(1, 8) == pytest.approx(4)
    assert bayes_optimal_return(2, 1) == pytest.approx(0.5)


def test_bandit_greedy_posterior_play_is_near_the_optimum_and_below_it():
    env = BanditBatch(4000, seed=1)
    env.reset()
    wins, tries = np.zeros((2, 4000, 5))
    total = 0.0
    for _ in range(10):
        arm = ((wins + 1) / (tries + 2)).argmax(1)
        rewards = env.step(arm).rewards
        total += rewards.sum()
        wins[np.arange(4000), arm] += rewards
        tries[np.arange(4000), arm] += 1
    assert 6.45 < total / 4000 < 6.72  # published: 6.6; the standard error is 0.035


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [
        (RecallBatch, {"n_envs": 0}),
        (RecallBatch, {"n_symbols": 1}),
        (RecallBatch, {"delay": 0}),
        (BanditBatch, {"n_arms": 0}),
        (BanditBatch, {"n_pulls": True}),
        (BanditBatch, {"levels": "5:5"}),
        (BanditBatch, {"seed": -3}),
    ],
)
def test_invalid_arguments_are_refused(task, kwargs):
    with pytest.raises(UserError):
        task(**{"n_envs": 2, **kwargs})


@tasks
@pytest.mark.parametrize("invalid", [[9, 0], [-1, 0], [0], [0.5, 0.5]])
def test_invalid_actions_are_refused(task, invalid):
    with pytest.raises(UserError):
        task(2).step(np.array(invalid))


def test_score_ranges_depend_on_the_settings():
    assert RecallBatch.score_range(n_symbols=2, delay=3) == (0.5, 1.0)
    assert BanditBatch.score_range() == (5.0, bayes_optimal_return(5, 10))
    assert BanditBatch.score_range(n_pulls=100) is None


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        *((name, {}) for name in VECTOR_TASKS),
        ("recall", {"n_symbols": 7}),
        ("bandit", {"n_arms": 10, "n_pulls": 3}),
        ("associative_recall", {"n_pairs": 3, "n_values": 5}),
        ("mdp", {"n_states": 4, "n_actions": 2}),
    ],
)
def test_features_have_one_name_each(task: str, settings: dict[str, int]) -> None:
    names = TASKS[task].feature_names(**settings)
    env = TASKS[task](1, **settings)
    assert len(set(names)) == len(names) == (env.observation_space.shape or ())[0]
    actions = TASKS[task].action_names(**settings)
    assert len(set(actions)) == len(actions)
    assert len(actions) in (0, env.action_space.n)
