"""Autograd, C and captured graphs give the same loss sums and the same gradient."""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.engine import engine as engine_module
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from srwm_rl.ops import cpu
from srwm_rl.ops.backends import prefer
from tests.agents.probe import capturing, collect_rollout, eager_graph, gradient_of, small_model, unroll_gradient
from tests.srwm_rl.ops.defaults import other_default, other_defaults

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
FRAMES = spaces.Dict({"frame": spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": VECTOR})
CASES: dict[str, dict[str, Any]] = {
    "vectors, Discrete": {"observation_space": VECTOR, "action_space": spaces.Discrete(3)},
    "vectors, Box": {"observation_space": VECTOR, "action_space": spaces.Box(-1, 1, (2,), np.float32)},
    "frames in micro-batches, Discrete": {"observation_space": FRAMES, "frames_at_once": 16},
    "vectors, truncated gradient": {"observation_space": VECTOR, "bptt": 2},
    "vectors, LSTM": {"observation_space": VECTOR, "policy_kwargs": {"core": "lstm"}},
}


def build(algo: str, **settings: Any) -> Any:
    return small_model(algo, n_envs=3, n_layers=2, ent_coef=0.01, **settings)


def loss_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Return the loss sums and the gradient of one rollout, both flat; the second of two calls, where graphs replay."""
    batch = collect_rollout(model)
    if isinstance(model, IMPALA):
        torch.manual_seed(0)
        batch.log_probs.add_(0.3 * torch.randn_like(batch.log_probs))  # as if another policy had acted
        sums, _ = [unroll_gradient(model, batch) for _ in range(2)][-1]
    else:
        sums, _ = [gradient_of(model, np.arange(3)) for _ in range(2)][-1]
    grads = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.policy.parameters()]
    return torch.stack([*sums]).detach(), torch.cat(grads)


def use_pytorch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute everything in PyTorch; the caller prefers the reference recurrence."""
    monkeypatch.setattr(type(model), "native_gradient", lambda *_: None)
    monkeypatch.setattr(model.engine, "fused", lambda policy: policy)


def use_c(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change nothing: the default on a CPU."""


def use_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a GPU, with a stand-in for the graph."""
    monkeypatch.setattr(type(model), "native_gradient", lambda *_: None)
    engine = model.engine
    graphed = GraphedGradient(engine.add_gradient, engine.parameters, model.policy, model.weights_lock)
    capturing(graphed, eager_graph)
    monkeypatch.setattr(model.engine, "_graphed", lambda: graphed)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("use_backend", [use_c, use_graphs])
def test_every_backend_gives_the_loss_and_gradient_of_plain_pytorch(
    use_backend: Callable[..., None], case: str, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for use, scan_backend in ((use_backend, "auto"), (use_pytorch, "reference")):
        with monkeypatch.context() as patch, prefer(scan_backend):
            model = build(algo, **CASES[case])
            use(model, patch)
            results.append(loss_and_gradient(model))
    (sums, gradient), (expected_sums, expected_gradient) = results
    assert expected_gradient.norm() > 1e-3
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason="no C kernel")
@pytest.mark.parametrize(("case", "native"), [("vectors, Discrete", True), ("vectors, LSTM", False)])
def test_ppos_gradient_on_vectors_is_computed_without_autograd(
    case: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, autograd_calls = build("ppo", **CASES[case]), []
    monkeypatch.setattr(model, "loss", lambda *args: autograd_calls.append(args) or PPO.loss(model, *args))
    loss_and_gradient(model)
    assert bool(autograd_calls) != native


def test_compiled_policies_are_cached_per_policy_until_released(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("ppo")
    engine, second_policy = model.engine, build("ppo").policy
    fused = engine.fused(model.policy)
    assert engine.fused(second_policy).policy is second_policy
    assert engine.fused(model.policy) is fused
    engine.release()
    assert engine.fused(model.policy) is not fused
    assert engine_module.Engine(model).fused(model.policy) is not fused


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(cloudpickle.dumps(model))])
def test_a_trained_model_can_be_copied(copy: Callable[[Any], Any]) -> None:
    model = build("ppo", observation_space=VECTOR)
    model.learn(24)
    again, obs = copy(model), np.ones((3, 3), np.float32)
    torch.testing.assert_close(again.predict(obs, deterministic=True), model.predict(obs, deterministic=True))
    again.learn(24, reset_num_timesteps=False)
    assert again.engine._trainer is again
    assert again.engine.fused is not model.engine.fused
    assert again.engine.fused(again.policy).policy is again.policy


@other_defaults
@pytest.mark.parametrize("case", ["conv", "frames"])
def test_defaults_of_torch_do_not_matter_to_a_model(case: str, kind: str) -> None:
    def train(default: AbstractContextManager[None]) -> tuple[np.ndarray, Tensor]:
        settings: dict[str, Any] = {"policy_kwargs": {"core_kwargs": {"hidden_size": 16, "short_conv": 4}}}
        if case == "frames":
            model = build("ppo", **CASES["frames in micro-batches, Discrete"], n_epochs=1)
        else:
            model = small_model("ppo", make_vec_env("CartPole-v1", seed=0), n_epochs=1, **settings)
        obs = model.env.reset()
        with default:
            actions, _ = model.predict(obs, deterministic=True)
            model.learn(24)
        return actions, torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])

    (actions, weights), (expected_actions, expected) = train(other_default(kind)), train(nullcontext())
    assert (actions == expected_actions).all()
    assert torch.equal(weights, expected)
