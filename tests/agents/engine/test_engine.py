"""Autograd, C and captured graphs give the same loss sums and the same gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.engine import engine as engine_module
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from srwm_rl.ops import cpu
from srwm_rl.ops.backends import prefer
from tests.agents.engine.test_graphed_gradient import again
from tests.agents.probe import Probe, gradient_of, unroll_gradient

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
FRAMES = spaces.Dict({"frame": spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": VECTOR})
CASES: dict[str, dict[str, Any]] = {
    "vectors, Discrete": {"observation_space": VECTOR, "action_space": spaces.Discrete(3)},
    "vectors, Box": {"observation_space": VECTOR, "action_space": spaces.Box(-1, 1, (2,), np.float32)},
    "frames in parts, Discrete": {"observation_space": FRAMES, "frames_at_once": 16},
    "vectors, cut gradient": {"observation_space": VECTOR, "bptt": 2},
    "vectors, LSTM": {"observation_space": VECTOR, "core": "lstm"},
}


def build(algo: str, core: str = "srwm", observation_space: Any = None, action_space: Any = None, **kwargs: Any) -> Any:
    env = DummyVecEnv([lambda: Probe(observation_space, action_space) for _ in range(3)])
    core_kwargs = {"hidden_size": 16, "n_layers": 2}
    policy_kwargs = {"core": core, "core_kwargs": core_kwargs, "encoder_kwargs": {"cnn": {"channels": [4]}}}
    shared: dict[str, Any] = {"n_steps": 8, "seed": 0, "ent_coef": 0.01, "device": "cpu", **kwargs}
    if algo == "impala":
        return IMPALA("SRWMPolicy", env, synchronous=True, policy_kwargs=policy_kwargs, **shared)
    return PPO("SRWMPolicy", env, policy_kwargs=policy_kwargs, **shared)


def measure(model: Any) -> tuple[Tensor, Tensor]:
    """Return the loss sums and the gradient of one rollout, both flat; the second of two calls, where graphs replay."""
    _, callback = model._setup_learn(10**6)
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    if isinstance(model, IMPALA):
        batch = model.rollout_buffer.take(model.n_envs)
        torch.manual_seed(0)
        assert batch is not None
        batch.log_probs.add_(0.3 * torch.randn_like(batch.log_probs))  # as if another policy had acted
        sums, _ = [unroll_gradient(model, batch) for _ in range(2)][-1]
    else:
        sums, _ = [gradient_of(model, np.arange(3)) for _ in range(2)][-1]
    grads = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.policy.parameters()]
    return torch.stack([*sums]).detach(), torch.cat(grads)


def plain(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything in PyTorch, the recurrence by its reference."""
    monkeypatch.setattr(type(model), "native_gradient", lambda *_: None)
    monkeypatch.setattr(model.engine, "fused", lambda policy: policy)


def in_c(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a CPU."""


def by_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a GPU, with a stand-in for the graph: the same work on the same memory."""
    monkeypatch.setattr(type(model), "native_gradient", lambda *_: None)
    graphed = GraphedGradient(model.engine.add_gradient, model.engine.parameters, again)
    monkeypatch.setattr(model.engine, "_graphed", lambda: graphed)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [in_c, by_graph])
def test_every_engine_gives_the_numbers_of_plain_pytorch(
    way: Callable[..., None], case: str, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for prepare, backend in ((plain, "reference"), (way, "auto")):
        with monkeypatch.context() as patch, prefer(backend):
            model = build(algo, **CASES[case])
            prepare(model, patch)
            results.append(measure(model))
    (sums, gradient), (other_sums, other_gradient) = results
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(other_sums, sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason="no C kernel")
@pytest.mark.parametrize(("case", "native"), [("vectors, Discrete", True), ("vectors, LSTM", False)])
def test_ppo_on_vectors_needs_no_autograd(case: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backward = build("ppo", **CASES[case]), []
    monkeypatch.setattr(model, "loss", lambda *args: backward.append(args) or PPO.loss(model, *args))
    measure(model)
    assert bool(backward) != native


def test_compiled_forms_are_kept_per_policy_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("ppo")
    engine, other = model.engine, build("ppo").policy
    fused = engine.fused(model.policy)
    assert engine.fused(other).policy is other
    assert engine.fused(model.policy) is fused
    engine.release()
    assert engine.fused(model.policy) is not fused
    assert engine_module.Engine(model).fused(model.policy) is not fused
