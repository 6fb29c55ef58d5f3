"""V-trace equals the authors' numbers and its definition, written as a sum."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srwm_rl.agents.losses.gae import generalized_advantages
from srwm_rl.agents.losses.vtrace import vtrace

GOLDEN = Path(__file__).parents[2] / "golden" / "vtrace.npz"


def log_probs(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).log_prob(actions)


def test_vtrace_equals_the_authors_numbers() -> None:
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    behavior = log_probs(golden["behavior_policy_logits"], golden["actions"])
    target = log_probs(golden["target_policy_logits"], golden["actions"])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(behavior, golden["out_behavior_action_log_probs"], **close)
    torch.testing.assert_close(target, golden["out_target_action_log_probs"], **close)
    torch.testing.assert_close(target - behavior, golden["out_log_rhos"], **close)
    result = vtrace(
        target - behavior, golden["discounts"], golden["rewards"], golden["values"], golden["bootstrap_value"]
    )
    torch.testing.assert_close(result.vs, golden["out_vs"], **close)
    torch.testing.assert_close(result.pg_advantages, golden["out_pg_advantages"], **close)


def vtrace_by_definition(
    log_rhos: torch.Tensor,
    discounts: torch.Tensor,
    rewards: torch.Tensor,
    values: torch.Tensor,
    bootstrap: torch.Tensor,
    lam: float,
    clips: tuple[float, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets and advantages by the definition of the n-step target, term by term."""
    n_steps, batch = values.shape
    rho_clip, pg_clip, c_clip = clips
    vs, advantages = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(batch):
        ratio = [float(log_rhos[t, b].exp()) for t in range(n_steps)]
        v = [*values[:, b].tolist(), float(bootstrap[b])]
        target = []
        for s in range(n_steps):
            total, weight = v[s], 1.0
            for t in range(s, n_steps):
                delta = float(rewards[t, b]) + float(discounts[t, b]) * v[t + 1] - v[t]
                total += weight * min(rho_clip, ratio[t]) * delta
                weight *= float(discounts[t, b]) * lam * min(c_clip, ratio[t])
            target.append(total)
        target.append(v[-1])
        for s in range(n_steps):
            vs[s, b] = target[s]
            n_step_return = float(rewards[s, b]) + float(discounts[s, b]) * target[s + 1]
            advantages[s, b] = min(pg_clip, ratio[s]) * (n_step_return - v[s])
    return vs, advantages


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_steps=st.integers(1, 9),
    batch=st.integers(1, 3),
    lam=st.floats(0, 1),
    clips=st.tuples(*[st.sampled_from([0.3, 1.0, 2.0, float("inf")])] * 3),
)
def test_vtrace_equals_its_definition(
    seed: int, n_steps: int, batch: int, lam: float, clips: tuple[float, float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_steps, batch)
    log_rhos, rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    discounts = 0.9 * (torch.rand(shape, generator=generator) > 0.3).double()
    bootstrap = torch.randn(batch, generator=generator, dtype=torch.float64)
    rho_clip, pg_rho_clip, c_clip = (None if clip == float("inf") else clip for clip in clips)
    result = vtrace(
        log_rhos, discounts, rewards, values, bootstrap,
        vtrace_lambda=lam, rho_clip=rho_clip, pg_rho_clip=pg_rho_clip, c_clip=c_clip,
    )  # fmt: skip
    vs, advantages = vtrace_by_definition(log_rhos, discounts, rewards, values, bootstrap, lam, clips)
    torch.testing.assert_close(result.vs, vs)
    torch.testing.assert_close(result.pg_advantages, advantages)


def test_on_policy_vtrace_equals_the_lambda_return() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(7, 3), torch.randn(7, 3)
    ends = (torch.rand(7, 3) < 0.3).float()
    last = torch.randn(3)
    for lam in (1.0, 0.8):
        result = vtrace(torch.zeros(7, 3), 0.9 * (1 - ends), rewards, values, last, vtrace_lambda=lam)
        expected = generalized_advantages(rewards, values, ends, last, 0.9, lam)
        torch.testing.assert_close(result.vs, expected.returns)


def test_no_gradient_flows_through_the_targets() -> None:
    inputs = [torch.randn(4, 2, requires_grad=True) for _ in range(4)]
    result = vtrace(inputs[0], inputs[1], inputs[2], inputs[3], torch.randn(2, requires_grad=True))
    assert not result.vs.requires_grad
    assert not result.pg_advantages.requires_grad


@pytest.mark.parametrize("wrong", range(5))
def test_wrong_shapes_are_refused_by_name(wrong: int) -> None:
    names = ("log_rhos", "discounts", "rewards", "values", "bootstrap_value")
    tensors = [torch.zeros(3, 2)] * 4 + [torch.zeros(2)]
    tensors[wrong] = torch.zeros(3, 5) if wrong < 4 else torch.zeros(5)
    with pytest.raises(ValueError, match=names[wrong]):
        vtrace(*tensors)
