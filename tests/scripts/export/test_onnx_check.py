"""The check of an exported graph passes correct graphs and detects every kind of fault."""

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl import SRWMPolicy
from srwm_rl.onnx_export import ActingStep, to_onnx
from srwm_rl.scripts.export.onnx_check import STEPS, check_onnx

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Forward = Callable[..., Any]
MULTI = spaces.MultiDiscrete([2, 3])
BOX = spaces.Box(-1, 1, (2,))


class Noise(gymnasium.Env):
    """Random observations, episodes of 20 steps, and an assertion that actions are valid."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(3)
        self.left = 20
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.left -= 1
        return self.observation_space.sample(), 0.0, self.left == 0, False, {}


def make(action: spaces.Space = BOX, weights: float = 0.3) -> tuple[SRWMPolicy, DummyVecEnv]:
    torch.manual_seed(0)
    observation = spaces.Dict(vector=spaces.Box(-1, 1, (3,)), number=spaces.Discrete(4))
    settings = {"hidden_size": 8, "n_heads": 2, "n_layers": 1}
    policy = SRWMPolicy(observation, action, lambda _: 0.0, core_kwargs=settings)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(weights * torch.randn_like(parameter))
    return policy, DummyVecEnv([lambda: Noise(observation, action)] * 3)


@pytest.mark.parametrize("action", [BOX, MULTI, spaces.MultiBinary(4)], ids=lambda space: type(space).__name__)
def test_a_correct_graph_passes_on_any_action_space(action: spaces.Space) -> None:
    policy, env = make(action)
    step = ActingStep(policy)
    checked = check_onnx(to_onnx(step, {}), step, policy, env)
    assert checked.passed
    assert list(checked.differences) == [port.name for port in step.outputs]
    assert 0 < max(checked.differences.values()) < 1e-5  # the outputs come from two runtimes
    assert (checked.steps, checked.n_envs) == (STEPS, 3)
    assert checked.episode_starts >= 3 * (1 + 2 + 4)  # the first, ended episodes, forced resets


def _never_reset(right: Forward) -> Forward:
    return lambda parts, state, start: right(parts, state, torch.zeros_like(start))


def _forget(right: Forward) -> Forward:
    return lambda parts, state, start: right(parts, torch.zeros_like(state), start)


def _keep_state(right: Forward) -> Forward:
    return lambda parts, state, start: (*right(parts, state, start)[:-1], state * 1.0)


@pytest.mark.parametrize("spoil", [_never_reset, _forget, _keep_state])
def test_a_graph_that_mishandles_the_memory_is_detected(spoil: Callable[[Forward], Forward]) -> None:
    policy, env = make(weights=0.0)  # as initialised: edits are small, the state about 1e-3
    step = ActingStep(policy)
    step.forward = spoil(step.forward)  # type: ignore[method-assign]
    checked = check_onnx(to_onnx(step, {}), step, policy, env)
    assert not checked.passed
    assert checked.differences["new_state"] > 1e-4


def test_a_changed_number_is_detected_in_its_output() -> None:
    policy, env = make()
    step = ActingStep(policy)
    content = to_onnx(step, {})
    assert check_onnx(content, step, policy, env, 9).passed
    for name, bias, amount in (
        ("value", policy.value_net.bias, 1e-3),
        ("value", policy.value_net.bias, float("nan")),
        ("action_mean", policy.action_net.bias, 1e-3),
        ("action_std", policy.log_std, 1e-3),
    ):
        before = bias.detach().clone()
        with torch.no_grad():
            bias[0] += amount
        checked = check_onnx(content, step, policy, env, 9)
        with torch.no_grad():
            bias.copy_(before)
        assert not checked.passed
        assert [key for key, value in checked.differences.items() if value > 1e-4] == [name]
