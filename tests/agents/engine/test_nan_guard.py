"""Numbers that are not finite, injected everywhere: named, kept out of the weights, skipped or stopped at."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from srwm_rl import UserError
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.engine.nan_guard import _finite
from srwm_rl.envs import GroupedVecEnv
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import SRWMPolicy
from tests.agents.probe import Probe

STEPS = 8  # per environment and update
NAN, INF = float("nan"), float("inf")


class Sick(Probe):
    """Gives one number that is not finite, at its `at`-th step."""

    what, value, at, steps = "reward", NAN, 0, 0

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == self.at:
            if self.what == "reward":
                reward = self.value
            else:
                obs = np.array([0, self.value, 0], np.float32)
        return obs, reward, terminated, truncated, info


def model_on(env: VecEnv, algo: str, on_nan: str) -> RecurrentAlgorithm:
    shared: dict[str, Any] = {"n_steps": STEPS, "seed": 0, "device": "cpu", "on_nan": on_nan}
    shared["policy_kwargs"] = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}}
    if algo == "ppo":
        return PPO("SRWMPolicy", env, n_epochs=2, **shared)
    return IMPALA("SRWMPolicy", env, synchronous=algo == "impala", **shared)


def healthy(algo: str, on_nan: str) -> RecurrentAlgorithm:
    return model_on(DummyVecEnv([Probe, Probe]), algo, on_nan)


def weights(model: RecurrentAlgorithm) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


ALGOS = ["ppo", "impala", "overlapped"]


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("at", [1, 4, STEPS, 2 * STEPS + 3])  # none ends an episode
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_sick_environment_is_named_and_reaches_no_weight(
    what: str, value: float, at: int, algo: str, caplog: pytest.LogCaptureFixture
) -> None:
    def sick() -> Sick:
        env = Sick()
        env.what, env.value, env.at = what, value, at
        return env

    for on_nan in ("stop", "skip"):
        model = model_on(DummyVecEnv([Probe, sick]), algo, on_nan)
        named = rf"the {what} of environment 1 is not finite at step"
        if on_nan == "stop":
            with pytest.raises(FaultError, match=named):
                model.learn(4 * 2 * STEPS)
        else:
            with caplog.at_level(logging.WARNING):
                model.learn(4 * 2 * STEPS)
            assert caplog.text.count("is not finite") == 1
            assert model.nan_guard.skipped == 1
            assert model._n_updates >= 3
        assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_sick_last_observation_of_a_truncated_episode(algo: str) -> None:
    class Cut(Probe):
        def step(self, action: Any) -> Any:
            obs, reward, _, truncated, info = super().step(action)
            return obs * NAN if truncated else obs, reward, False, truncated, info

    with pytest.raises(FaultError, match="the last observation of environment 0 is not finite"):
        model_on(DummyVecEnv([lambda: Cut(cut=True)] * 2), algo, "stop").learn(2 * STEPS)
    model = model_on(DummyVecEnv([lambda: Cut(cut=True)] * 2), algo, "skip")
    model.learn(4 * STEPS)
    assert model._n_updates >= 1
    assert torch.isfinite(weights(model)).all()


def poison(monkeypatch: pytest.MonkeyPatch, place: str, at: int) -> None:
    """Make the `at`-th sequence evaluated for learning sick in one place."""
    evaluate, calls = SRWMPolicy.evaluate_sequence, [0]

    def evaluated(self: SRWMPolicy, *args: Any) -> Any:
        result = evaluate(self, *args)
        calls[0] += 1
        if calls[0] != at:
            return result
        if place == "gradient":
            weight = self.core.layers[0].weight  # type: ignore[index,union-attr]
            weight.register_hook(lambda gradient: gradient * NAN if calls[0] == at else gradient)
            return result
        return result._replace(**{place: getattr(result, place) * NAN})

    monkeypatch.setattr(SRWMPolicy, "evaluate_sequence", evaluated)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("values", "value loss|policy loss"),
        ("log_probs", "policy loss"),
        ("entropy", "entropy"),
        ("gradient", r"the gradient of core\.layers\.0\.weight"),
    ],
)
def test_a_sick_update_is_left_out(
    place: str, named: str, at: int, algo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poison(monkeypatch, place, at)
    model = healthy(algo, "stop")
    with pytest.raises(FaultError, match=f"({named}).* is not finite in update"):
        model.learn(4 * 2 * STEPS)
    assert torch.isfinite(weights(model)).all()
    monkeypatch.undo()

    poison(monkeypatch, place, at)
    model = healthy(algo, "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert "the update is skipped" in caplog.text
    assert model.nan_guard.skipped == 1
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("algo", ALGOS)
def test_sick_logits_in_an_update(algo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    heads, calls = SRWMPolicy._heads, [0]

    def sick(self: SRWMPolicy, y: torch.Tensor) -> Any:
        calls[0] += y.requires_grad
        return heads(self, y * NAN if y.requires_grad and calls[0] == 2 else y)

    monkeypatch.setattr(SRWMPolicy, "_heads", sick)
    with pytest.raises(FaultError, match="the policy's logits are not finite in update"):
        healthy(algo, "stop").learn(4 * 2 * STEPS)
    calls[0] = 0
    model = healthy(algo, "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert model.nan_guard.skipped == 1
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_sick_fast_weight_is_emptied_or_stopped_at(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    for on_nan in ("stop", "skip"):
        model = healthy(algo, on_nan)
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
        assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_sick_weights_stop_the_run_and_are_named(algo: str, on_nan: str) -> None:
    model = healthy(algo, on_nan)
    with torch.no_grad():
        model.policy.core.layers[1].out.weight[0, 0] = INF  # type: ignore[index,union-attr]
    with pytest.raises(FaultError, match=r"weight core\.layers\.1\.out\.weight is not finite"):
        model.learn(2 * STEPS)


def test_a_module_whose_output_is_sick_is_named() -> None:
    model = healthy("ppo", "stop")
    model.policy.value_net.register_forward_hook(lambda *_: torch.full((2, 1), NAN))
    with pytest.raises(FaultError, match="first in the output of value_net"):
        model.learn(2 * STEPS)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("what", ["reward", "observation", "last observation", "memory"])
def test_in_groups_an_environment_is_named_by_its_number_among_all(algo: str, what: str) -> None:
    class Cut(Probe):
        def step(self, action: Any) -> Any:
            obs, reward, terminated, truncated, info = super().step(action)
            return obs * NAN if truncated else obs, reward, terminated, truncated, info

    def sick() -> Probe:
        if what == "last observation":
            return Cut(cut=True)
        env = Sick()
        env.what, env.at = what, 0 if what == "memory" else 3
        return env

    groups = [DummyVecEnv([Probe, Probe]), DummyVecEnv([Probe, lambda: Probe(cut=True), sick])]
    model = model_on(GroupedVecEnv(groups), algo, "stop")
    if what == "memory":
        model.learn(5 * STEPS)
        assert model._core_state is not None
        model._core_state[0, 4, 0] = NAN
    with pytest.raises(FaultError, match=r"(the .* of|layer 0,) environment 4\b"):
        model.learn(5 * STEPS, reset_num_timesteps=what != "memory")


def test_large_numbers_are_no_fault() -> None:
    for values in (np.full(3, 1e30, np.float32), np.full((2, 2), 6e4, np.float16), np.array([1e300, -1e300])):
        assert np.isfinite(values).all()
        assert _finite(values)
        for sick in (NAN, INF, -INF):
            values.ravel()[-1] = sick
            assert not _finite(values)
    assert _finite(np.full(3, 255, np.uint8))
    assert not _finite(np.array([INF, -INF]))


def test_many_faults_are_counted_and_not_all_told(caplog: pytest.LogCaptureFixture) -> None:
    class Hopeless(Probe):
        def step(self, action: Any) -> Any:
            obs, _, terminated, truncated, info = super().step(action)
            return obs, NAN, terminated, truncated, info

    model = model_on(DummyVecEnv([Hopeless, Probe]), "ppo", "skip")
    with caplog.at_level(logging.WARNING):
        model.learn(4 * 2 * STEPS)
    assert caplog.text.count("is not finite") == 10
    assert model.nan_guard.skipped == 4 * STEPS


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(UserError, match="on_nan must be one of stop, skip, not 'ignore'"):
        healthy("ppo", "ignore")
