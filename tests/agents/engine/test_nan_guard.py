"""NaN and infinity, injected everywhere: reported, kept out of the weights, and skipped or stopped at."""

import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from srwm_rl import UserError
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.engine.nan_guard import _finite
from srwm_rl.envs import GroupedVecEnv
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import SRWMPolicy
from tests.agents.probe import Probe, probe_env, small_model, weight_vector

STEPS = 8  # per environment and update
NAN, INF = float("nan"), float("inf")


class NonFiniteProbe(Probe):
    """A probe whose `at`-th reward or observation is not finite."""

    def __init__(self, quantity: str = "reward", at: int = 0, value: float = NAN) -> None:
        super().__init__()
        self.quantity, self.at, self.value, self.steps = quantity, at, value, 0

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == self.at:
            if self.quantity == "reward":
                reward = self.value
            else:
                obs = np.array([0, self.value, 0], np.float32)
        return obs, reward, terminated, truncated, info


class NonFiniteLastObservation(Probe):
    """A probe with truncated episodes whose last observation is NaN."""

    def __init__(self) -> None:
        super().__init__(cut=True)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs * NAN if truncated else obs, reward, terminated, truncated, info


def model_on(env: VecEnv, algo: str, on_nan: str) -> RecurrentAlgorithm:
    settings = {"n_epochs": 2} if algo == "ppo" else {"synchronous": algo == "impala"}
    model: RecurrentAlgorithm = small_model(algo, env, n_layers=2, n_steps=STEPS, on_nan=on_nan, **settings)
    return model


def model_on_probes(algo: str, on_nan: str) -> RecurrentAlgorithm:
    return model_on(probe_env(2), algo, on_nan)


ALGOS = ["ppo", "impala", "overlapped"]


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("at", [1, 4, STEPS, 2 * STEPS + 3])  # none ends an episode
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_a_non_finite_reward_or_observation_is_reported_and_never_reaches_a_weight(
    quantity: str, value: float, at: int, algo: str, caplog: pytest.LogCaptureFixture
) -> None:
    for on_nan in ("stop", "skip"):
        model = model_on(DummyVecEnv([Probe, partial(NonFiniteProbe, quantity, at, value)]), algo, on_nan)
        if on_nan == "stop":
            with pytest.raises(FaultError, match=f"the {quantity} of environment 1 is not finite at step"):
                model.learn(4 * 2 * STEPS)
        else:
            with caplog.at_level(logging.WARNING):
                model.learn(4 * 2 * STEPS)
            assert caplog.text.count("is not finite") == 1
            assert model.nan_guard.skipped == 1
            assert model._n_updates >= 3
        assert torch.isfinite(weight_vector(model)).all()


class NonFiniteFirstObservation(Probe):
    """A probe whose first observation of all is NaN."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = super().reset(seed=seed)
        self.resets += 1
        return obs * NAN if self.resets == 1 else obs, info


@pytest.mark.parametrize("algo", ALGOS)
def test_a_non_finite_first_observation_is_reported_or_skipped(algo: str) -> None:
    with pytest.raises(FaultError, match="the observation of environment 1 is not finite at step 0"):
        model_on(DummyVecEnv([Probe, NonFiniteFirstObservation]), algo, "stop").learn(2 * STEPS)
    model = model_on(DummyVecEnv([Probe, NonFiniteFirstObservation]), algo, "skip")
    model.learn(4 * 2 * STEPS)
    assert (model.nan_guard.skipped, model._n_updates >= 3) == (1, True)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_non_finite_last_observation_of_a_truncated_episode_is_reported_or_skipped(algo: str) -> None:
    with pytest.raises(FaultError, match="the last observation of environment 0 is not finite"):
        model_on(DummyVecEnv([NonFiniteLastObservation] * 2), algo, "stop").learn(2 * STEPS)
    model = model_on(DummyVecEnv([NonFiniteLastObservation] * 2), algo, "skip")
    model.learn(4 * STEPS)
    assert model._n_updates >= 1
    assert torch.isfinite(weight_vector(model)).all()


def make_non_finite(monkeypatch: pytest.MonkeyPatch, quantity: str, at: int) -> None:
    """Multiply one output of the `at`-th evaluation of sequences, or a gradient through it, by NaN.

    Args:
        monkeypatch: undoes it.
        quantity: a field of `SequenceEvaluation`, or "gradient".
        at: counted from 1, over all policies.
    """
    evaluate, calls = SRWMPolicy.evaluate_sequence, [0]

    def evaluated(self: SRWMPolicy, *args: Any) -> Any:
        result = evaluate(self, *args)
        calls[0] += 1
        if calls[0] != at:
            return result
        if quantity == "gradient":
            weight = self.core.layers[0].weight  # type: ignore[index,union-attr]
            weight.register_hook(lambda gradient: gradient * NAN if calls[0] == at else gradient)
            return result
        return result._replace(**{quantity: getattr(result, quantity) * NAN})

    monkeypatch.setattr(SRWMPolicy, "evaluate_sequence", evaluated)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("quantity", "name"),
    [
        ("values", "value loss|policy loss"),
        ("log_probs", "policy loss"),
        ("entropy", "entropy"),
        ("gradient", r"the gradient of core\.layers\.0\.weight"),
    ],
)
def test_a_non_finite_update_is_skipped(
    quantity: str, name: str, at: int, algo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_non_finite(monkeypatch, quantity, at)
    model = model_on_probes(algo, "stop")
    with pytest.raises(FaultError, match=f"({name}).* is not finite in update"):
        model.learn(4 * 2 * STEPS)
    assert torch.isfinite(weight_vector(model)).all()
    monkeypatch.undo()

    make_non_finite(monkeypatch, quantity, at)
    model = model_on_probes(algo, "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert "the update is skipped" in caplog.text
    assert model.nan_guard.skipped == 1
    assert torch.isfinite(weight_vector(model)).all()


@pytest.mark.parametrize("algo", ALGOS)
def test_an_update_with_non_finite_logits_is_skipped(
    algo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heads, calls = SRWMPolicy._heads, [0]

    def non_finite_heads(self: SRWMPolicy, y: torch.Tensor, masks: Any = None) -> Any:
        calls[0] += y.requires_grad
        return heads(self, y * NAN if y.requires_grad and calls[0] == 2 else y)

    monkeypatch.setattr(SRWMPolicy, "_heads", non_finite_heads)
    with pytest.raises(FaultError, match="the policy's logits are not finite in update"):
        model_on_probes(algo, "stop").learn(4 * 2 * STEPS)
    calls[0] = 0
    model = model_on_probes(algo, "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert model.nan_guard.skipped == 1
    assert torch.isfinite(weight_vector(model)).all()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_non_finite_core_state_is_reported_or_reset(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    for on_nan in ("stop", "skip"):
        model = model_on_probes(algo, on_nan)
        model.learn(2 * STEPS)
        assert model._core_state is not None
        model._core_state[1, 1, 7] = NAN
        model._last_episode_starts = np.zeros(2, bool)
        if on_nan == "stop":
            with pytest.raises(FaultError, match=r"fast weights are not finite.*layer 1, environment 1"):
                model.learn(2 * STEPS, reset_num_timesteps=False)
        else:
            with caplog.at_level(logging.WARNING):
                model.learn(2 * STEPS, reset_num_timesteps=False)
            assert "that core state is reset" in caplog.text
            assert torch.isfinite(model._core_state).all()
        assert torch.isfinite(weight_vector(model)).all()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_non_finite_weights_stop_the_run_and_are_named(algo: str, on_nan: str) -> None:
    model = model_on_probes(algo, on_nan)
    with torch.no_grad():
        model.policy.core.layers[1].out.weight[0, 0] = INF  # type: ignore[index,union-attr]
    with pytest.raises(FaultError, match=r"weight core\.layers\.1\.out\.weight is not finite"):
        model.learn(2 * STEPS)


def test_a_module_with_non_finite_output_is_named() -> None:
    model = model_on_probes("ppo", "stop")
    model.policy.value_net.register_forward_hook(lambda *_: torch.full((2, 1), NAN))
    with pytest.raises(FaultError, match="first in the output of value_net"):
        model.learn(2 * STEPS)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("quantity", ["reward", "observation", "last observation", "core state"])
def test_messages_number_an_environment_among_those_of_all_groups(algo: str, quantity: str) -> None:
    non_finite_env: Any = {"last observation": NonFiniteLastObservation, "core state": Probe}.get(
        quantity, partial(NonFiniteProbe, quantity, 3)
    )
    groups = [DummyVecEnv([Probe, Probe]), DummyVecEnv([Probe, partial(Probe, cut=True), non_finite_env])]
    model = model_on(GroupedVecEnv(groups), algo, "stop")
    if quantity == "core state":
        model.learn(5 * STEPS)
        assert model._core_state is not None
        model._core_state[0, 4, 0] = NAN
    with pytest.raises(FaultError, match=r"(the .* of|layer 0,) environment 4\b"):
        model.learn(5 * STEPS, reset_num_timesteps=quantity != "core state")


def test_large_numbers_are_finite() -> None:
    for values in (np.full(3, 1e30, np.float32), np.full((2, 2), 6e4, np.float16), np.array([1e300, -1e300])):
        assert np.isfinite(values).all()
        assert _finite(values)
        for non_finite in (NAN, INF, -INF):
            values.ravel()[-1] = non_finite
            assert not _finite(values)
    assert _finite(np.full(3, 255, np.uint8))
    assert not _finite(np.array([INF, -INF]))


def test_ten_faults_are_logged_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    class NanRewards(Probe):
        def step(self, action: Any) -> Any:
            obs, _, terminated, truncated, info = super().step(action)
            return obs, NAN, terminated, truncated, info

    model = model_on(DummyVecEnv([NanRewards, Probe]), "ppo", "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert caplog.text.count("is not finite") == 10
    assert model.nan_guard.skipped == 4 * STEPS


def test_an_invalid_on_nan_is_refused() -> None:
    with pytest.raises(UserError, match="on_nan must be one of stop, skip, not 'ignore'"):
        model_on_probes("ppo", "ignore")
