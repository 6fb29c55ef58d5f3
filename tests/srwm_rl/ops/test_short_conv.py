"""The short convolution, in PyTorch and in C, against a loop over steps and environments."""

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from srwm_rl import srwm_scan
from srwm_rl.ops import cpu
from srwm_rl.ops import short_conv as module
from srwm_rl.ops.backends import prefer
from srwm_rl.ops.program import Program
from srwm_rl.ops.short_conv import short_conv, short_conv_reference
from tests.srwm_rl.ops.defaults import other_default, other_defaults

KERNEL = cpu.load_kernel()
LEVELS = [] if isinstance(KERNEL, str) else [*range(KERNEL.level + 1)]
SHAPES = [(1, 1, 1, 2), (1, 3, 5, 4), (2, 3, 17, 4), (9, 2, 16, 2), (13, 3, 33, 5)]  # T, B, C, W


def by_steps(x: Tensor, weight: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Run `short_conv` with a list of each environment's last inputs."""
    width, zeros = len(weight), torch.zeros_like(x[0, 0])
    ys, finals = [], []
    for b in range(x.shape[1]):
        last = deque(state[b].unbind(0), maxlen=width)
        outputs = []
        for t in range(len(x)):
            if episode_starts[t, b]:
                last = deque([zeros] * (width - 1), maxlen=width)
            last.appendleft(x[t, b])
            outputs.append(sum((tap * step for tap, step in zip(weight, last, strict=True)), zeros))
        ys.append(torch.stack(outputs))
        finals.append(torch.stack([*last][: width - 1]))
    return torch.stack(ys, dim=1), torch.stack(finals)


def drawn(shape: tuple[int, int, int, int], starts: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    n_steps, batch, channels, width = shape
    torch.manual_seed(0)
    x, weight = torch.randn(n_steps, batch, channels), torch.randn(width, channels)
    tensors = [x, weight, torch.randn(batch, width - 1, channels)]
    return *(t.to(dtype).requires_grad_() for t in tensors), torch.rand(n_steps, batch) < starts


def check(shape: tuple[int, int, int, int], starts: float, dtype: torch.dtype) -> None:
    """Compare results and the gradients of a random loss with those of the loop, in float64."""
    *inputs, episode_starts = drawn(shape, starts, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    results = []
    for run, given in ((short_conv, inputs), (by_steps, exact)):
        outputs = run(*given, episode_starts)
        torch.manual_seed(1)
        loss = sum((out * torch.randn(out.shape).to(out)).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, given, materialize_grads=True)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs.to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
def test_reference(shape: tuple[int, int, int, int], starts: float) -> None:
    check(shape, starts, torch.float64)
    with prefer("reference"):
        check(shape, starts, torch.float32)


@pytest.mark.skipif(not LEVELS, reason=str(KERNEL))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_c(shape: tuple[int, int, int, int], starts: float, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(KERNEL, str)
    monkeypatch.setattr(module, "load_kernel", lambda: KERNEL._replace(level=level))
    monkeypatch.setattr(module, "short_conv_reference", None)  # not called
    check(shape, starts, torch.float32)


def test_bits_without_gradient_are_those_with_it() -> None:
    *inputs, starts = drawn((9, 3, 17, 4), 0.3, torch.float32)
    with torch.no_grad():
        plain = short_conv(*inputs, starts)
    for ours, theirs in zip(plain, short_conv(*inputs, starts.float()), strict=True):
        assert torch.equal(ours, theirs)


def test_views_and_one_gradient_alone() -> None:
    *inputs, starts = drawn((9, 3, 17, 4), 0.3, torch.float32)
    views = [torch.stack((t, t), -1)[..., 0] for t in inputs]
    for index in (0, 1):
        ours, theirs = (
            torch.autograd.grad(run(*given, starts)[index].square().sum(), inputs, materialize_grads=True)
            for run, given in ((short_conv, views), (short_conv_reference, inputs))
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_chunks_equal_the_whole() -> None:
    *tensors, starts = drawn((13, 3, 8, 4), 0.2, torch.float32)
    x, weight, state = tensors
    whole, final = short_conv(x, weight, state, starts)
    outputs = []
    for steps, flags in zip(x.split((1, 2, 1, 9)), starts.split((1, 2, 1, 9)), strict=True):
        y, state = short_conv(steps, weight, state, flags)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, final)


def test_not_finite_inputs_end_with_their_episode() -> None:
    *tensors, starts = drawn((6, 1, 4, 3), 0.0, torch.float32)
    x, weight, state = (tensor.detach() for tensor in tensors)
    state[:] = torch.nan
    x[1] = torch.nan
    starts[2] = True
    for backend in ("auto", "reference"):
        with prefer(backend):
            y, final = short_conv(x, weight, state, starts)
        assert y[:2].isnan().all()
        assert y[2:].isfinite().all()
        assert final.isfinite().all()


@pytest.mark.skipif(not LEVELS, reason=str(KERNEL))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 64, 70])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_step_of_a_program(level: int, rows: int, size: int) -> None:
    """A convolution before two layers of heads: the state is theirs, with the earlier inputs behind the first's."""
    assert not isinstance(KERNEL, str)
    torch.manual_seed(0)
    n, width, n_heads = 2 * size, 4, 2
    weight, slow = 0.5 * torch.randn(width, n), 0.3 * torch.randn(2, n_heads, size, 3 * size + 4)
    own, extra = n * (3 * size + 4), (width - 1) * n
    program = Program(KERNEL._replace(level=level))
    y = program.short_conv(program.input(n), weight, own)
    for layer in slow:
        y = program.heads(y, layer)
    program.output(y)
    program.sample(y, program.input(n))
    x, state, starts = torch.randn(rows, n), torch.randn(2, rows, own + extra), torch.rand(rows) < 0.3
    state[1, :, own:] = 0
    (outputs, _), _, final = program.step([x, torch.ones(rows, n)], state, starts)
    earlier = state[0, :, own:].unflatten(-1, (width - 1, n))
    expected, inputs = short_conv_reference(x[None], weight, earlier, starts[None])
    finals = []
    for layer, row in zip(slow, state, strict=True):
        shift = row[:, :own].unflatten(-1, layer.shape)
        read, after = srwm_scan(expected.unflatten(-1, (n_heads, size)), layer, shift, starts[None])
        expected = read.flatten(2)
        finals.append(after.flatten(1))
    torch.testing.assert_close(outputs, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final[:, :, :own], torch.stack(finals), rtol=1e-4, atol=1e-5)
    assert torch.equal(final[0, :, own:], inputs.flatten(1))
    assert not final[1, :, own:].any()


@other_defaults
def test_defaults_of_torch_do_not_matter(kind: str) -> None:
    *inputs, starts = drawn((9, 3, 17, 4), 0.3, torch.float32)

    def results() -> list[Tensor]:
        y, final = short_conv(*inputs, starts)
        return [y, final, *torch.autograd.grad(y.square().sum() + final.sum(), inputs)]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.skipif(not LEVELS, reason=str(KERNEL))
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state", lambda t: t.double(), r"state is torch.float64 on cpu, x is torch.float32"),
        ("weight", lambda t: t.bfloat16(), r"weight is torch.bfloat16 on cpu, x is torch.float32"),
        ("state", lambda t: t[:1], r"state must be \[3, 3, 17\] for x \[9, 3, 17\], not \[1, 3, 17\]"),
        ("weight", lambda t: t[:, :16], r"weight must be \[4, 17\] for x \[9, 3, 17\], not \[4, 16\]"),
        ("starts", lambda t: t[:8], r"episode_starts must be \[T, B\] = \[9, 3\], not \[8, 3\]"),
    ],
)
def test_what_does_not_fit_is_named_and_not_read(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = dict(zip(("x", "weight", "state", "starts"), drawn((9, 3, 17, 4), 0.3, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        short_conv(*(arguments | {name: change(arguments[name])}).values())


def test_forward_derivatives_are_those_of_the_reference() -> None:
    *inputs, starts = (tensor.detach() for tensor in drawn((9, 3, 17, 4), 0.3, torch.float32))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in inputs]
        tangents = [
            forward_ad.unpack_dual(run(*duals, starts)[0]).tangent for run in (short_conv, short_conv_reference)
        ]
    assert torch.equal(*tangents)
