"""Random cases for the fused backends, and their comparison with the reference in float64."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from srwm_rl import srwm_scan


class Case(NamedTuple):
    """Arguments of `srwm_scan` and the gradients of what it returns, in float64."""

    x: Tensor
    weight: Tensor
    shift: Tensor | None
    starts: Tensor | None
    grad_y: Tensor
    grad_final: Tensor
    retention: Tensor | None = None
    bound: float | None = None


def make_case(
    n_steps: int,
    batch: int,
    heads: int,
    size: int,
    *,
    seed: int = 0,
    resets: float | None = 0.1,
    with_shift: bool = True,
    scale: float = 1.0,
    read: int | None = None,
    retained: bool = False,
    bound: float | None = None,
) -> Case:
    """Draw a case, `read` being E; inputs are softmaxed as the layer does, which keeps long unrolls from blowing up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = read or size
    fast = (batch, heads, size, width + 2 * size + 4)
    return Case(
        x=draw(n_steps, batch, heads, size).softmax(-1),
        weight=draw(*fast[1:]) * scale / size**0.5,
        shift=0.3 * scale * draw(*fast) / size**0.5 if with_shift else None,
        starts=None if resets is None else torch.rand(n_steps, batch, generator=generator) < resets,
        grad_y=draw(n_steps, batch, heads, width),
        grad_final=draw(*fast),
        retention=torch.rand(n_steps, batch, heads, generator=generator, dtype=torch.float64) if retained else None,
        bound=bound,
    )


def cases(max_steps: int, max_size: int) -> st.SearchStrategy[Case]:
    """Draw cases of any shape, with resets from none over few to every step."""
    return st.builds(
        make_case,
        st.one_of(st.integers(1, min(40, max_steps)), st.integers(1, max_steps)),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, max_size),
        seed=st.integers(0, 2**20),
        resets=st.sampled_from([None, 0.0, 0.02, 0.2, 1.0]),
        with_shift=st.booleans(),
        scale=st.sampled_from([0.3, 1.0, 2.0]),
        read=st.one_of(st.none(), st.integers(1, 3 * max_size + 1)),
        retained=st.booleans(),
        bound=st.sampled_from([None, None, 0.1, 1.0, 4.0]),
    )


def scattered(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose memory has gaps and another order."""
    wide = torch.stack((tensor, torch.full_like(tensor, 7)), dim=-1)  # every second number belongs to another tensor
    return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


def results(case: Case, backend: str, dtype: torch.dtype, *, contiguous: bool = True) -> dict[str, Tensor]:
    """Run forward and backward; return outputs and gradients by name."""
    lay_out = torch.Tensor.contiguous if contiguous else scattered
    inputs = {
        name: lay_out(tensor.to(dtype)).requires_grad_()
        for name, tensor in (
            ("x", case.x),
            ("weight", case.weight),
            ("shift", case.shift),
            ("retention", case.retention),
        )
        if tensor is not None
    }
    starts = case.starts if contiguous or case.starts is None else scattered(case.starts)
    y, final = srwm_scan(**inputs, episode_starts=starts, shift_bound=case.bound, backend=backend)
    upstream = [lay_out(grad.to(dtype)) for grad in (case.grad_y, case.grad_final)]
    grads = torch.autograd.grad((y, final), list(inputs.values()), upstream)
    outputs = {"y": y.detach(), "final": final.detach()}
    return outputs | {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def relative_errors(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Return by name the largest difference over the largest number; the weight's gradient by column group."""
    assert ours.keys() == truth.keys()
    errors = {}
    for name, right in truth.items():
        assert ours[name].shape == right.shape
        parts = {name: (ours[name].double(), right)}
        if name == "grad_weight":
            size, columns = right.shape[-2:]
            widths = (columns - 2 * size - 4, size, size, 4)
            groups = zip("yqkb", ours[name].double().split(widths, -1), strict=True)
            rights = right.split(widths, -1)
            parts = {f"{name}_{g}": (our, rights[i]) for i, (g, our) in enumerate(groups)}
        # A retention's gradient is one sum over a whole matrix, which cancels now and then.
        scale = right.abs().max().clamp(min=0.1 if name == "grad_retention" else 1e-30)
        for part, (our, wanted) in parts.items():
            errors[part] = float((our - wanted).abs().max() / scale)
    return errors


def check(case: Case, backend: str, dtype: torch.dtype, *, contiguous: bool = True) -> float:
    """Assert that `backend` agrees with the reference in float64; return the largest relative error."""
    truth = results(case, "reference", torch.float64)
    errors = relative_errors(results(case, backend, dtype, contiguous=contiguous), truth)
    limit = 1e-4 if dtype == torch.float32 else 1e-9
    assert max(errors.values()) <= limit, errors
    return max(errors.values())
