"""Deferred updates give the weights, means and faults of updates that are checked one by one."""

import logging
from typing import Any

import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from srwm_rl.agents import PPO, ppo
from srwm_rl.agents.engine.updates import CheckedUpdates, DeferredUpdates, supports_found_inf
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import SRWMPolicy
from tests.agents.engine.test_nan_guard import poison
from tests.agents.probe import Probe

STEPS = 8


class Keep(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.logged.append({key: each for key, each in key_values.items() if not key.startswith("time/")})


def run(late: bool, on_nan: str, **settings: Any) -> dict[str, Any]:
    """Learn from four rollouts, with deferred updates on the CPU if asked; return weights, messages and means."""
    probe = {key: settings.pop(key) for key in ("action_space",) if key in settings}
    env = DummyVecEnv([lambda: Probe(**probe) for _ in range(4)])
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}, **settings.pop("policy_kwargs", {})}
    shared = {"n_steps": STEPS, "batch_size": 2 * STEPS, "n_epochs": 2, "seed": 0, "device": "cpu", **settings}
    model = PPO("SRWMPolicy", env, on_nan=on_nan, policy_kwargs=kwargs, **shared)  # type: ignore[arg-type]
    keep, said = Keep(), ""
    model.set_logger(Logger(None, [keep]))

    def make_updates(*args: Any, defer: bool) -> CheckedUpdates:
        return (DeferredUpdates if late and defer else CheckedUpdates)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_updates", make_updates)
        try:
            model.learn(4 * 4 * STEPS)
        except FaultError as fault:
            said = str(fault)
    optimizer = [each for state in model.policy.optimizer.state.values() for each in state.values()]
    return {
        "weights": torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach(),
        "optimizer": torch.cat([each.flatten() for each in optimizer]) if optimizer else torch.zeros(0),
        "told": (said, keep.logged, model._n_updates, model.nan_guard.skipped),
    }


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["told"] == other["told"]
    assert torch.equal(one["weights"], other["weights"])
    assert torch.isfinite(one["weights"]).all()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many updates were read, at each reading."""
    found: list[int] = []
    flush = DeferredUpdates.flush

    def counted(self: DeferredUpdates) -> Any:
        found.append(len(self._rows))
        return flush(self)

    monkeypatch.setattr(DeferredUpdates, "flush", counted)
    return found


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.05, float("inf")])
def test_the_same_run_and_one_reading_for_a_rollout(max_grad_norm: float, reads: list[int]) -> None:
    runs = [run(late, "stop", max_grad_norm=max_grad_norm, ent_coef=0.01) for late in (False, True)]
    check_same(*runs)
    assert torch.equal(runs[0]["optimizer"], runs[1]["optimizer"])
    assert len(runs[0]["told"][1]) == 4
    assert "train/grad_norm" in runs[0]["told"][1][-1]
    assert reads == [4] * 4


PLACES = ["values", "log_probs", "entropy", "gradient"]


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("at", [1, 6, 8])
@pytest.mark.parametrize("place", PLACES)
def test_a_sick_update_is_the_same_fault(
    place: str, at: int, on_nan: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs, lines = [], []
    for late in (False, True):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            poison(patch, place, at)
            runs.append(run(late, on_nan))
            lines.append(caplog.messages)
    check_same(*runs)
    assert lines[0] == lines[1]
    said, _, _, skipped = runs[1]["told"]
    assert ("is not finite in update" in said) == (on_nan == "stop")
    assert skipped == len(lines[1]) == (on_nan == "skip")


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("at", [1, 6])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=str)
def test_non_finite_logits_are_the_same_fault(
    action_space: Any, at: int, on_nan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for late in (False, True):
        with monkeypatch.context() as patch:
            heads, calls = SRWMPolicy._heads, [0]

            def non_finite(self: SRWMPolicy, y: Tensor, heads: Any = heads, calls: list[int] = calls) -> Any:
                calls[0] += y.requires_grad
                return heads(self, y * torch.nan if y.requires_grad and calls[0] == at else y)

            patch.setattr(SRWMPolicy, "_heads", non_finite)
            runs.append(run(late, on_nan, action_space=action_space))
    check_same(*runs)
    assert ("is not finite in update" in runs[0]["told"][0] or "are not finite in update" in runs[0]["told"][0]) == (
        on_nan == "stop"
    )
    assert runs[0]["told"][3] == (on_nan == "skip")


def test_a_norm_that_overflows_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for late in (False, True):
        with monkeypatch.context() as patch:
            evaluate, calls = SRWMPolicy.evaluate_sequence, [0]

            def huge(self: SRWMPolicy, *args: Any) -> Any:
                result = evaluate(self, *args)  # noqa: B023
                calls[0] += 1  # noqa: B023
                if calls[0] == 3:  # noqa: B023
                    self.value_net.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
                return result

            patch.setattr(SRWMPolicy, "evaluate_sequence", huge)
            runs.append(run(late, "stop"))
    check_same(*runs)
    assert runs[0]["told"][0] == "the gradient's norm is not finite in update 1"


def test_with_stop_nothing_is_learned_after_the_first_sick_update_and_with_skip_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, list[Tensor]] = {"stop": [], "skip": []}
    step = DeferredUpdates.step
    for on_nan, weights in seen.items():
        with monkeypatch.context() as patch:

            def watched(self: DeferredUpdates, weights: list[Tensor] = weights) -> None:
                step(self)
                weights.append(torch.cat([weight.detach().flatten() for _, weight in self._named]))

            patch.setattr(DeferredUpdates, "step", watched)
            poison(patch, "values", 2)
            run(True, on_nan)
    assert len(seen["stop"]) == 4  # of one rollout
    assert all(torch.equal(each, seen["stop"][0]) for each in seen["stop"])
    first, second, third = seen["skip"][:3]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_a_target_for_the_divergence_is_looked_at_every_time(reads: list[int]) -> None:
    runs = [run(late, "stop", target_kl=1e-6) for late in (False, True)]
    check_same(*runs)
    assert not reads
    assert runs[0]["told"][2] < 8  # epochs were broken off


def test_only_some_optimizers_can_withhold() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert supports_found_inf(torch.optim.Adam(weights, fused=True))
    assert supports_found_inf(torch.optim.AdamW(weights, fused=True))
    assert not supports_found_inf(torch.optim.Adam(weights, fused=False))
    assert not supports_found_inf(torch.optim.RMSprop(weights))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_before_the_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    env = DummyVecEnv([Probe] * 4)
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}}
    model = PPO("SRWMPolicy", env, n_steps=STEPS, batch_size=2 * STEPS, seed=0, device="cuda", policy_kwargs=kwargs)
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
