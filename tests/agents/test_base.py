"""What PPO and IMPALA share: whole rollouts, and schedules that end at 0."""

from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import Logger

from srwm_rl.agents import IMPALA
from srwm_rl.agents.run.checkpoint_state import capture_state, restore_state
from tests.agents.probe import LogRecorder, small_model, weight_vector

ROLLOUT = 32  # steps: 4 environments x 8


class Decay:
    """The linear decay of a setting; records its argument."""

    def __init__(self, initial: float) -> None:
        self.initial = initial
        self.remaining: list[float] = []

    def __call__(self, remaining: float) -> float:
        self.remaining.append(remaining)
        return self.initial * remaining


@pytest.mark.parametrize("algo", ["ppo", "synchronous impala", "impala"])
@pytest.mark.parametrize("total", [2 * ROLLOUT + 1, 3 * ROLLOUT - 1, 3 * ROLLOUT])
def test_schedules_end_at_0_where_the_last_rollout_exceeds_the_total(algo: str, total: int) -> None:
    rate, clip_range, clip_range_vf = Decay(1e-3), Decay(0.2), Decay(0.3)
    settings: dict[str, Any] = {"synchronous": algo != "impala"}
    if algo == "ppo":
        settings = {"clip_range": clip_range, "clip_range_vf": clip_range_vf}
    model = small_model(algo, learning_rate=rate, **settings)
    model.learn(total)
    wanted = [1 - ROLLOUT / total, 1 - 2 * ROLLOUT / total, 0.0]
    if algo == "impala":  # an update beside playing may have the value of the rollout before
        assert min(rate.remaining) >= 0
        assert model._current_progress_remaining == 0.0
    else:
        assert sorted({*rate.remaining[1:]}, reverse=True) == pytest.approx(wanted)  # the first built the optimizer
        assert model.policy.optimizer.param_groups[0]["lr"] == 0.0
    if algo == "ppo":
        assert clip_range.remaining == clip_range_vf.remaining == pytest.approx(wanted)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_the_last_update_does_not_learn_backwards(algo: str) -> None:
    model = small_model(algo, learning_rate=Decay(1e-3))
    log = LogRecorder()
    train, weights = model.train, [weight_vector(model)]

    def recorded() -> None:
        train()
        weights.append(weight_vector(model))

    model.train = recorded
    model.set_logger(Logger(None, [log]))
    model.learn(ROLLOUT + 1)
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    model.dump_logs()
    assert log.column("train/learning_rate") == pytest.approx([1e-3 * (1 - ROLLOUT / (ROLLOUT + 1)), 0.0])


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_planned_steps_are_those_that_learn_makes(algo: str) -> None:
    model = small_model(algo)
    for n in (ROLLOUT, 1, 2 * ROLLOUT + 5):
        total = model.num_timesteps + n
        planned = model.planned_steps(total)
        assert 0 <= planned - total < ROLLOUT
        model.learn(n, reset_num_timesteps=False)
        assert model.num_timesteps == planned


def test_a_checkpoint_with_a_remaining_progress_below_0_is_restored_with_0() -> None:
    model: IMPALA = small_model("impala")
    model.learn(ROLLOUT)
    state = capture_state(model)
    state["counters"]["_current_progress_remaining"] = -0.25
    restore_state(model, state, "checkpoint")
    assert model._current_progress_remaining == 0.0
