"""The best_model: the best score keeps the weights it was measured on, whatever is learned meanwhile."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl.agents import IMPALA
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes
from srwm_rl.agents.run.best_model import Best, BestModelTracker
from srwm_rl.agents.run.monitoring import HeldOutEvalCallback
from srwm_rl.envs import make_vec_env
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.seen_levels import SeenLevels


@pytest.fixture
def policy() -> SRWMPolicy:
    env = make_vec_env("recall", 1, "0:9", 0)
    return SRWMPolicy(
        env.observation_space, env.action_space, lambda _: 0.0, core_kwargs={"hidden_size": 8, "n_layers": 1}
    )


def best_model() -> BestModelTracker:
    return BestModelTracker(SeenLevels(0, 50))


def fill(policy: SRWMPolicy, value: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(value)


def weight(book: BestModelTracker, steps: int) -> float:
    scored = book.scored(steps)
    assert scored is not None
    (value,) = {float(each) for array in scored.weights.values() for each in array.flat}
    return value


def test_the_best_is_replaced_by_a_better_one_only(policy: SRWMPolicy) -> None:
    book = best_model()
    scores = [float("nan"), -2.0, float("-inf"), -2.0, -3.0, -1.0, float("nan"), float("inf"), -1.5]
    kept = []
    for steps, score in enumerate(scores):
        fill(policy, steps)
        book.update(score, "return", steps, policy)
        if steps == 4:
            book.to_tree()
        kept.append(None if book.best is None else (book.best.score, book.best.steps))
    first, second = (-2.0, 1), (-1.0, 5)
    assert kept == [None, first, first, first, first, second, second, second, second]
    assert (weight(book, 1), weight(book, 5)) == (1, 5)  # those at that moment, not those there are now
    assert book.scored(4) is None


def test_what_was_told_is_kept_however_often_it_is_surpassed(policy: SRWMPolicy) -> None:
    book = best_model()
    for steps in range(5):
        fill(policy, steps)
        book.update(float(steps), "return", steps, policy)
        if steps == 1:
            assert book.to_tree()["best"]["steps"] == 1
    assert (weight(book, 1), weight(book, 4)) == (1, 4)
    assert book.scored(3) is None
    book.to_tree()
    assert book.scored(1) is None


def test_a_score_of_something_else_begins_anew(policy: SRWMPolicy) -> None:
    book = best_model()
    book.update(5.0, "training return", 10, policy)
    book.update(1.0, "held-out return", 20, policy)
    assert book.best == Best(1.0, "held-out return", 20)
    book.update(0.5, "held-out return", 30, policy)
    assert book.best.steps == 20


def test_the_levels_of_the_moment_stand_with_the_weights(policy: SRWMPolicy) -> None:
    book = best_model()
    book.levels.add("recall", 3)
    book.update(1.0, "return", 10, policy)
    book.levels.add("recall", 4)
    scored = book.scored(10)
    assert scored is not None
    assert SeenLevels.from_tree(scored.levels_played, "it").among("recall", range(50)) == [3]


def test_it_goes_through_a_checkpoint(policy: SRWMPolicy) -> None:
    book, other = best_model(), best_model()
    book.update(1.25, "return", 10, policy)
    book.levels.add("recall", 3)
    other.from_tree(book.to_tree(), "file")
    assert other.best == book.best
    assert other.levels.is_complete("recall")
    assert other.levels.among("recall", range(50)) == [3]


def test_a_checkpoint_that_knows_nothing_of_it_leaves_the_past_unknown() -> None:
    book = best_model()
    book.from_tree({"policy": {}}, "file")
    book.levels.add("recall", 3)
    assert book.best is None
    assert not book.levels.is_complete("recall")


def test_beside_a_learner_the_weights_are_those_that_were_scored() -> None:
    env = make_vec_env("recall", 8, "0:50", 0)
    kwargs = {"core": "srwm", "core_kwargs": {"hidden_size": 16, "n_layers": 1}}
    model = IMPALA("SRWMPolicy", env, n_steps=8, policy_kwargs=kwargs, seed=0, device="cpu", learning_rate=1e-2)
    book, updates = best_model(), [0]
    sums: list[float] = []

    def total(arrays: Any) -> float:
        return float(sum(np.abs(np.asarray(each, np.float64)).sum() for each in arrays))

    def play() -> Episodes:
        """Score the weights by what they are, slowly enough for the learner to change them, if it could."""
        before = total(each.detach().numpy() for each in model.policy.parameters())
        time.sleep(0.02)
        assert any(thread.name == "srwm-learner" for thread in threading.enumerate())
        updates[0] = max(updates[0], model._n_updates)
        sums.append(before)
        return Episodes([Episode("recall", 0, before, 1, None)])

    callback = HeldOutEvalCallback(
        {"test": play}, 64, lambda score: book.update(score, "sum", model.num_timesteps, model.policy)
    )
    model.learn(64 * 40, callback)
    assert updates[0] > 10, "nothing was learned meanwhile"
    assert len(set(sums)) > 10, "the weights were always the same"
    assert book.best is not None
    scored = book.scored(book.best.steps)
    assert scored is not None
    assert total(scored.weights.values()) == book.best.score == max(sums)
    assert sums.index(max(sums)) == book.best.steps // 64 - 1
