"""Random cases of the delta rule for the fused backends, and their comparison with the reference in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from srwm_rl import delta_scan
from tests.srwm_rl.ops.cases import scattered


class Case(NamedTuple):
    """Arguments of `delta_scan`, and the gradients of what it returns, in float64."""

    inputs: dict[str, Tensor]
    starts: Tensor | None
    upstream: tuple[Tensor, Tensor]


def make_case(
    n_steps: int,
    batch: int,
    heads: int,
    size: int,
    *,
    seed: int = 0,
    resets: float | None = 0.1,
    with_weight: bool = True,
) -> Case:
    """Draw a case; keys and queries are softmaxed as the layer does."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unroll = (n_steps, batch, heads, size)
    key, query = draw(*unroll).softmax(-1), draw(*unroll).softmax(-1)
    inputs = {"key": key, "value": draw(*unroll), "query": query, "rate": draw(*unroll[:3]).sigmoid()}
    if with_weight:
        inputs["weight"] = draw(batch, heads, size, size)
    starts = None if resets is None else torch.rand(n_steps, batch, generator=generator) < resets
    return Case(inputs, starts, (draw(*unroll), draw(batch, heads, size, size)))


def results(case: Case, backend: str, dtype: torch.dtype, contiguous: bool = True) -> dict[str, Tensor]:
    """Run forward and backward; return outputs and gradients by name."""
    lay_out = torch.Tensor.contiguous if contiguous else scattered
    inputs = {name: lay_out(tensor.to(dtype)).requires_grad_() for name, tensor in case.inputs.items()}
    out = delta_scan(**inputs, episode_starts=case.starts, backend=backend)
    grads = torch.autograd.grad(out, list(inputs.values()), [lay_out(tensor.to(dtype)) for tensor in case.upstream])
    return dict(zip(("y", "final", *inputs), (*(tensor.detach() for tensor in out), *grads), strict=True))


def check(case: Case, backend: str, dtype: torch.dtype, contiguous: bool = True) -> None:
    """Assert that `backend` agrees with the reference in float64."""
    truth, ours = results(case, "reference", torch.float64), results(case, backend, dtype, contiguous)
    assert ours.keys() == truth.keys()
    for name, right in truth.items():
        assert ours[name].shape == right.shape
        error = (ours[name].double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
        assert error <= (1e-4 if dtype == torch.float32 else 1e-9), (name, error)
