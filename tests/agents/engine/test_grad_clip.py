"""Norms and clipping of gradients that are the parts of one tensor, or nearly so, against torch's."""

import pytest
import torch
from torch import Tensor

from srwm_rl.agents.engine.grad_clip import _flat, clip_gradient, gradient_norm


def weights_with(grads: list[Tensor | None]) -> list[Tensor]:
    weights = [torch.zeros(3 if each is None else each.shape) for each in grads]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    return weights


def flatten_obs_space(whole: Tensor, kind: str) -> list[Tensor | None]:
    """Return gradients that are parts of one tensor [12], or nearly so."""
    first, second, third = whole[:4].view(2, 2), whole[4:9], whole[9:]
    return {
        "parts": [first, second, third],
        "in another order": [third, None, first, second],
        "one missing": [first, second],
        "the first missing": [second, third],
        "one twice": [first, second, second[:3]],
        "turned": [first.t(), second, third],
        "every other": [whole[::2], whole[1::2]],
        "of several": [first.clone(), second, third],
        "none": [None, None],
    }[kind]


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize(
    "kind",
    [
        "parts", "in another order", "one missing", "the first missing", "one twice", "turned", "every other",
        "of several", "none",
    ],
)  # fmt: skip
def test_norm_and_clipping_are_torchs(kind: str, max_norm: float) -> None:
    whole = torch.randn(12, generator=torch.Generator().manual_seed(0))
    weights = weights_with(flatten_obs_space(whole.clone(), kind))
    others = weights_with([None if each is None else each.clone() for each in flatten_obs_space(whole, kind)])
    norm = gradient_norm(weights)
    assert (_flat([x.grad for x in weights if x.grad is not None]) is None) == (
        kind not in ("parts", "in another order")
    )
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([x.grad for x in others if x.grad is not None]))
    if kind == "one twice":  # scaled twice, too
        return
    clip_gradient(weights, max_norm, norm)
    torch.nn.utils.clip_grads_with_norm_(others, max_norm, norm)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
