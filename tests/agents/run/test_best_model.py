"""The best model: the weights that were scored are kept while training continues."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl.agents import IMPALA
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes
from srwm_rl.agents.run.best_model import Best, BestModelTracker
from srwm_rl.agents.run.callbacks import HeldOutEvalCallback, mean_and_error
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


def weight(tracker: BestModelTracker, steps: int) -> float:
    scored = tracker.scored(steps)
    assert scored is not None
    (value,) = {float(number) for array in scored.weights.values() for number in array.flat}
    return value


def test_the_best_is_replaced_by_a_better_one_only(policy: SRWMPolicy) -> None:
    tracker = best_model()
    scores = [float("nan"), -2.0, float("-inf"), -2.0, -3.0, -1.0, float("nan"), float("inf"), -1.5]
    kept = []
    for steps, score in enumerate(scores):
        fill(policy, steps)
        tracker.update(score, "return", steps, policy)
        if steps == 4:
            tracker.to_tree()
        kept.append(None if tracker.best is None else (tracker.best.score, tracker.best.steps))
    first, second = (-2.0, 1), (-1.0, 5)
    assert kept == [None, first, first, first, first, second, second, second, second]
    assert (weight(tracker, 1), weight(tracker, 5)) == (1, 5)  # the weights at that moment, not the current ones
    assert tracker.scored(4) is None


def test_a_score_must_exceed_the_best_by_the_standard_error_of_the_difference(policy: SRWMPolicy) -> None:
    tracker = best_model()
    scores = [(1.0, 0.3), (1.49, 0.4), (1.51, 0.4), (2.0, 0.3), (2.02, 0.3), (3.0, float("inf")), (2.0, 0.0)]
    kept = []
    for steps, (score, error) in enumerate(scores):
        tracker.update(score, "return", steps, policy, error)
        assert tracker.best is not None
        kept.append(tracker.best.steps)
    # 0.5 is the error of the first two differences and of the two after them; one episode's score has no error.
    assert kept == [0, 0, 2, 2, 4, 4, 4]
    restored = best_model()
    restored.from_tree(tracker.to_tree(), "file")
    assert restored.best == tracker.best == Best(2.02, "return", 4, 0.3)


def test_on_a_plateau_the_best_model_hardly_ever_changes(policy: SRWMPolicy) -> None:
    """Of equal models a hundred episodes' mean picks no lucky one after another, and a better one is still found."""
    rng, changes = np.random.default_rng(0), []
    for _ in range(20):
        tracker, steps = best_model(), []
        for step in range(40):
            returns = rng.choice([0.0, 10.0], 100, p=(0.4, 0.6) if step < 30 else (0.1, 0.9))
            mean, error = mean_and_error(returns)
            tracker.update(mean, "return", step, policy, error)
            assert tracker.best is not None
            steps.append(tracker.best.steps)
        changes.append(len({*steps[:30]}) - 1)
        assert steps[-1] >= 30
    assert np.mean(changes) < 2


def test_an_older_checkpoints_best_has_no_error(policy: SRWMPolicy) -> None:
    tracker = best_model()
    tracker.from_tree({"best": {"score": 1.0, "of": "return", "steps": 3}}, "file")
    tracker.update(1.05, "return", 9, policy, 0.1)
    assert tracker.best == Best(1.0, "return", 3)
    tracker.update(1.15, "return", 9, policy, 0.1)
    assert tracker.best == Best(1.15, "return", 9, 0.1)


def test_the_error_is_the_standard_error_of_the_mean() -> None:
    returns = [0.0, 1.0, 1.0, 4.0, 2.5]
    deviations = [r - sum(returns) / 5 for r in returns]
    expected = (sum(d * d for d in deviations) / 4 / 5) ** 0.5
    assert mean_and_error(returns) == pytest.approx((1.7, expected))
    assert mean_and_error([3.0]) == (3.0, float("inf"))


def test_the_last_saved_best_is_kept_until_the_next_save(policy: SRWMPolicy) -> None:
    tracker = best_model()
    for steps in range(5):
        fill(policy, steps)
        tracker.update(float(steps), "return", steps, policy)
        if steps == 1:
            assert tracker.to_tree()["best"]["steps"] == 1
    assert (weight(tracker, 1), weight(tracker, 4)) == (1, 4)
    assert tracker.scored(3) is None
    tracker.to_tree()
    assert tracker.scored(1) is None


def test_a_score_of_another_metric_replaces_the_best(policy: SRWMPolicy) -> None:
    tracker = best_model()
    tracker.update(5.0, "training return", 10, policy)
    tracker.update(1.0, "held-out return", 20, policy)
    assert tracker.best == Best(1.0, "held-out return", 20)
    tracker.update(0.5, "held-out return", 30, policy)
    assert tracker.best.steps == 20


def test_the_levels_played_are_copied_with_the_weights(policy: SRWMPolicy) -> None:
    tracker = best_model()
    tracker.levels.add("recall", 3)
    tracker.update(1.0, "return", 10, policy)
    tracker.levels.add("recall", 4)
    scored = tracker.scored(10)
    assert scored is not None
    assert SeenLevels.from_tree(scored.levels_played, "it").among("recall", range(50)) == [3]


def test_the_tracker_is_restored_from_a_checkpoint(policy: SRWMPolicy) -> None:
    tracker, restored = best_model(), best_model()
    tracker.update(1.25, "return", 10, policy)
    tracker.levels.add("recall", 3)
    restored.from_tree(tracker.to_tree(), "file")
    assert restored.best == tracker.best
    assert restored.levels.is_complete("recall")
    assert restored.levels.among("recall", range(50)) == [3]


def test_an_older_checkpoint_leaves_earlier_levels_unknown() -> None:
    tracker = best_model()
    tracker.from_tree({"policy": {}}, "file")
    tracker.levels.add("recall", 3)
    assert tracker.best is None
    assert not tracker.levels.is_complete("recall")


def test_beside_a_learner_the_weights_are_those_that_were_scored() -> None:
    env = make_vec_env("recall", 8, "0:50", 0)
    kwargs = {"core": "srwm", "core_kwargs": {"hidden_size": 16, "n_layers": 1}}
    model = IMPALA("SRWMPolicy", env, n_steps=8, policy_kwargs=kwargs, seed=0, device="cpu", learning_rate=1e-2)
    tracker, updates = best_model(), [0]
    sums: list[float] = []

    def total(arrays: Any) -> float:
        return float(sum(np.abs(np.asarray(array, np.float64)).sum() for array in arrays))

    def play() -> Episodes:
        """Score the weights by their sum, slowly enough for the learner to change them meanwhile."""
        before = total(parameter.detach().numpy() for parameter in model.policy.parameters())
        time.sleep(0.02)
        assert any(thread.name == "srwm-learner" for thread in threading.enumerate())
        updates[0] = max(updates[0], model._n_updates)
        sums.append(before)
        return Episodes([Episode("recall", 0, before, 1, None)])

    callback = HeldOutEvalCallback(
        {"test": play}, 64, lambda score, _: tracker.update(score, "sum", model.num_timesteps, model.policy)
    )
    model.learn(64 * 40, callback)
    assert updates[0] > 10, "nothing was learned meanwhile"
    assert len(set(sums)) > 10, "the weights were always the same"
    assert tracker.best is not None
    scored = tracker.scored(tracker.best.steps)
    assert scored is not None
    assert total(scored.weights.values()) == tracker.best.score == max(sums)
    assert sums.index(max(sums)) == tracker.best.steps // 64 - 1
