"""Trainers on a GPU: frames, options of the recurrence, captures beside a learner, and memory over many updates."""

import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.engine import cuda_graphs
from srwm_rl.agents.engine.streams import SWITCH_INTERVAL
from tests.agents.probe import small_model

pytestmark = pytest.mark.gpu


def assert_captured(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "CUDA graphs" not in caplog.text  # a warning where they are disabled
    gradient = model.engine._graphed_gradient
    assert gradient._graphs
    assert not gradient.disabled


def test_frames_of_64_x_64_are_learned_in_bfloat16_by_graphs(caplog: pytest.LogCaptureFixture) -> None:
    encoder = {"precision": "bfloat16", "cnn": {"channels": [8, 16]}}
    frames = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    model = small_model("ppo", observation_space=frames, device="cuda", policy_kwargs={"encoder_kwargs": encoder})
    model.learn(96)
    assert_captured(model, caplog)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_retention_and_a_bound_are_captured(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    core = {"hidden_size": 16, "n_layers": 1, "retention": True, "shift_bound": 0.5}
    model = small_model(algo, device="cuda", policy_kwargs={"core_kwargs": core})
    model.learn(128)
    assert_captured(model, caplog)


class AddHooks(BaseCallback):
    """Adds a hook to the acting policy before some rollouts, so that its graphs are captured anew."""

    def __init__(self, rollouts: tuple[int, ...]) -> None:
        super().__init__()
        self.rollouts, self.number = rollouts, 0

    def _on_rollout_start(self) -> None:
        self.number += 1
        if self.number in self.rollouts:
            self.model.acting_policy.value_net.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


def test_acting_is_captured_again_beside_a_learner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures: list[bool] = []
    capture = cuda_graphs.capture

    def counted(work: Any, stream: Any, pool: Any = None, draws: bool = True) -> Any:
        captures.append(draws)
        return capture(work, stream, pool, draws)

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    model = small_model("impala", device="cuda", synchronous=False, n_groups=2)
    model.learn(32 * 30, AddHooks((10, 20)))
    assert captures.count(True) == 3 * 2 * 2  # of two groups, for each of the core states that take turns
    assert model._n_updates == 30
    assert_captured(model, caplog)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_memory_does_not_grow_over_a_thousand_updates(algo: str) -> None:
    settings = {"batch_size": 8, "n_epochs": 1} if algo == "ppo" else {}
    model = small_model(algo, device="cuda", n_envs=2, n_steps=4, **settings)
    bytes_after = []
    for n_updates in (100, 900):
        model.learn(8 * n_updates, reset_num_timesteps=False)
        torch.cuda.synchronize()
        bytes_after.append(torch.cuda.memory_allocated())
    assert bytes_after[0] > 0
    assert bytes_after[1] <= bytes_after[0] + 4096


@pytest.mark.parametrize("fails", [False, True])
def test_the_switch_interval_is_short_while_a_learner_runs_beside_the_actors(fails: bool) -> None:
    before, intervals = sys.getswitchinterval(), set()

    def on_step(*_: Any) -> bool:
        intervals.add(sys.getswitchinterval())
        if fails:
            raise KeyError("the callback is gone")
        return True

    for synchronous in (False, True):
        model = small_model("impala", device="cuda", synchronous=synchronous)
        with pytest.raises(KeyError) if fails else nullcontext():
            model.learn(64, on_step)
        assert sys.getswitchinterval() == before
        assert intervals == {before if synchronous else SWITCH_INTERVAL}
        intervals.clear()
