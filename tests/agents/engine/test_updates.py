"""Deferred updates give the weights, means and faults of updates that are checked one by one."""

import logging
import re
from typing import Any, NamedTuple

import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from torch import Tensor

from srwm_rl.agents import ppo
from srwm_rl.agents.engine.updates import CheckedUpdates, DeferredUpdates, supports_found_inf
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import SRWMPolicy
from tests.agents.engine.test_nan_guard import make_non_finite
from tests.agents.probe import LogRecorder, small_model, weight_vector

STEPS = 8
QUANTITIES = ["values", "log_probs", "entropy", "gradient"]


class Run(NamedTuple):
    """What training left."""

    weights: Tensor
    optimizer: list[Tensor]
    message: str  # of the fault that ended it
    log: list[dict[str, Any]]
    n_updates: int
    skipped: int


def run(deferred: bool, on_nan: str, **settings: Any) -> Run:
    """Learn from four rollouts on the CPU, with deferred updates or without."""
    model = small_model("ppo", n_layers=2, batch_size=2 * STEPS, n_epochs=2, on_nan=on_nan, **settings)
    log, message = LogRecorder(), ""
    model.set_logger(Logger(None, [log]))

    def make_updates(*args: Any, defer: bool) -> CheckedUpdates:
        return (DeferredUpdates if deferred and defer else CheckedUpdates)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_updates", make_updates)
        try:
            model.learn(4 * 4 * STEPS)
        except FaultError as fault:
            message = str(fault)
    return Run(
        weight_vector(model),
        [tensor for state in model.policy.optimizer.state.values() for tensor in state.values()],
        message,
        log.rows,
        model._n_updates,
        model.nan_guard.skipped,
    )


def assert_same(checked: Run, deferred: Run) -> None:
    """Assert that two runs are the same, apart from the optimizer's state."""
    assert checked[2:] == deferred[2:]
    assert torch.equal(checked.weights, deferred.weights)
    assert torch.isfinite(checked.weights).all()


@pytest.fixture
def flushed_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of updates at each `DeferredUpdates.flush`."""
    counts: list[int] = []
    flush = DeferredUpdates.flush

    def counting_flush(self: DeferredUpdates) -> Any:
        counts.append(len(self._rows))
        return flush(self)

    monkeypatch.setattr(DeferredUpdates, "flush", counting_flush)
    return counts


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.05, float("inf")])
def test_deferred_updates_are_identical_and_flushed_once_per_rollout(
    max_grad_norm: float, flushed_counts: list[int]
) -> None:
    runs = [run(deferred, "stop", max_grad_norm=max_grad_norm, ent_coef=0.01) for deferred in (False, True)]
    assert_same(*runs)
    torch.testing.assert_close(runs[0].optimizer, runs[1].optimizer, rtol=0, atol=0)
    assert len(runs[0].log) == 4
    assert "train/grad_norm" in runs[0].log[-1]
    assert flushed_counts == [4] * 4


@pytest.mark.parametrize("at", [None, 6])
def test_deferred_updates_scale_the_steps_of_edit_columns_identically(
    at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for deferred, factor in ((False, 1.0), (False, 3.0), (True, 3.0)):
        core_kwargs = {"hidden_size": 16, "n_layers": 2, "edit_lr_multiplier": factor}
        with monkeypatch.context() as patch:
            if at is not None:
                make_non_finite(patch, "gradient", at)
            runs.append(run(deferred, "skip", policy_kwargs={"core_kwargs": core_kwargs}))
    plain, checked, deferred_run = runs
    assert_same(checked, deferred_run)
    assert not torch.equal(plain.weights, checked.weights)
    assert checked.skipped == (at is not None)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("at", [1, 6, 8])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_non_finite_update_has_the_same_effect_and_messages(
    quantity: str, at: int, on_nan: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs, warnings = [], []
    for deferred in (False, True):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            make_non_finite(patch, quantity, at)
            runs.append(run(deferred, on_nan))
            warnings.append(caplog.messages)
    assert_same(*runs)
    assert warnings[0] == warnings[1]
    assert ("is not finite in update" in runs[1].message) == (on_nan == "stop")
    assert runs[1].skipped == len(warnings[1]) == (on_nan == "skip")


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("at", [1, 6])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=str)
def test_non_finite_logits_have_the_same_effect_and_message(
    action_space: Any, at: int, on_nan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for deferred in (False, True):
        with monkeypatch.context() as patch:
            heads, calls = SRWMPolicy._heads, [0]

            def non_finite(
                self: SRWMPolicy, y: Tensor, masks: Any = None, heads: Any = heads, calls: list[int] = calls
            ) -> Any:
                calls[0] += y.requires_grad
                return heads(self, y * torch.nan if y.requires_grad and calls[0] == at else y)

            patch.setattr(SRWMPolicy, "_heads", non_finite)
            runs.append(run(deferred, on_nan, action_space=action_space))
    assert_same(*runs)
    assert bool(re.search("(is|are) not finite in update", runs[0].message)) == (on_nan == "stop")
    assert runs[0].skipped == (on_nan == "skip")


def test_an_overflowing_gradient_norm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for deferred in (False, True):
        with monkeypatch.context() as patch:
            evaluate, calls = SRWMPolicy.evaluate_sequence, [0]

            def huge(self: SRWMPolicy, *args: Any) -> Any:
                result = evaluate(self, *args)  # noqa: B023
                calls[0] += 1  # noqa: B023
                if calls[0] == 3:  # noqa: B023
                    self.value_net.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
                return result

            patch.setattr(SRWMPolicy, "evaluate_sequence", huge)
            runs.append(run(deferred, "stop"))
    assert_same(*runs)
    assert runs[0].message == "the gradient's norm is not finite in update 1"


def test_after_a_non_finite_update_stop_skips_all_later_steps_and_skip_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history: dict[str, list[Tensor]] = {"stop": [], "skip": []}
    step = DeferredUpdates.step
    for on_nan, weights in history.items():
        with monkeypatch.context() as patch:

            def recording_step(self: DeferredUpdates, weights: list[Tensor] = weights) -> None:
                step(self)
                weights.append(torch.cat([weight.detach().flatten() for _, weight in self._named]))

            patch.setattr(DeferredUpdates, "step", recording_step)
            make_non_finite(patch, "values", 2)
            run(True, on_nan)
    assert len(history["stop"]) == 4  # of one rollout
    assert all(torch.equal(weights, history["stop"][0]) for weights in history["stop"])
    first, second, third = history["skip"][:3]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_with_target_kl_updates_are_not_deferred(flushed_counts: list[int]) -> None:
    runs = [run(deferred, "stop", target_kl=1e-6) for deferred in (False, True)]
    assert_same(*runs)
    assert not flushed_counts
    assert runs[0].optimizer[0] < run(False, "stop").optimizer[0]  # its steps: epochs ended early


def test_fused_adam_and_adamw_support_found_inf() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert supports_found_inf(torch.optim.Adam(weights, fused=True))
    assert supports_found_inf(torch.optim.AdamW(weights, fused=True))
    assert not supports_found_inf(torch.optim.Adam(weights, fused=False))
    assert not supports_found_inf(torch.optim.RMSprop(weights))


@pytest.mark.gpu
def test_training_does_not_wait_for_the_gpu_before_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("ppo", n_layers=2, batch_size=2 * STEPS, device="cuda")
    model.learn(2 * 4 * STEPS)  # graphs are captured by now
    flush, flushed = DeferredUpdates.flush, []

    def allow_waiting(self: DeferredUpdates) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        flushed.append(self)
        return flush(self)

    monkeypatch.setattr(DeferredUpdates, "flush", allow_waiting)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert flushed
