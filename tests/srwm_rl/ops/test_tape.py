"""The tape's operations against PyTorch's, forward and backward, at every instruction set this machine has."""

import math

import pytest
import torch
from torch import Tensor, nn

from srwm_rl import srwm_scan
from srwm_rl.ops import cpu
from srwm_rl.ops.tape import Tape

KERNEL = cpu.load_kernel()
pytestmark = pytest.mark.skipif(isinstance(KERNEL, str), reason=str(KERNEL))
LEVELS = () if isinstance(KERNEL, str) else range(KERNEL.level + 1)
ROWS = (0, 1, 63, 64, 65, 2100)  # of one tile and of many, whole and not; the last has several shares


@pytest.fixture(params=LEVELS, ids=lambda level: cpu.LEVELS[level])
def kernel(request: pytest.FixtureRequest) -> cpu.Kernel:
    assert not isinstance(KERNEL, str)
    return KERNEL._replace(level=request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(tape: Tape, inputs: list[Tensor], expected: list[Tensor]) -> None:
    """Compare outputs, and the gradients of a random loss, with the float64 ones of `expected`."""
    found = tape.run(inputs)
    grads = [drawn(*each.shape, seed=9 + i) for i, each in enumerate(expected)]
    wrt = [each for each in (*inputs, *tape.learnt) if each.requires_grad]
    one = torch.autograd.grad(sum((a * g).sum() for a, g in zip(found, grads, strict=True)), wrt)
    other = torch.autograd.grad(sum((a * g).sum() for a, g in zip(expected, grads, strict=True)), wrt)
    for a, b in zip((*found, *one), (*expected, *other), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 2e-6 * b.norm() + 2e-7 * math.sqrt(b.numel())


def exact(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module in float64, with gradients that reach its float32 weights."""
    weights = {name: each.double() for name, each in module.named_parameters()}
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (3, 7), (16, 6), (17, 33), (82, 32), (130, 5)])
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "tanh"])
def test_linear(kernel: cpu.Kernel, rows: int, n_in: int, n_out: int, activation: str) -> None:
    torch.manual_seed(n_in)
    layer, tape = nn.Linear(n_in, n_out), Tape(kernel)
    tape.output(tape.linear(tape.input(n_in, wanted=True), layer.weight, layer.bias, activation))
    x = drawn(rows, n_in).requires_grad_()
    functions = {"identity": lambda y: y, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    check(tape, [x], [functions[activation](exact(layer, x.double()))])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [5, 6, 32, 48])
def test_layer_norm(kernel: cpu.Kernel, rows: int, size: int) -> None:
    layer, tape = nn.LayerNorm(size), Tape(kernel)
    with torch.no_grad():
        layer.weight.copy_(drawn(size, seed=3))
        layer.bias.copy_(drawn(size, seed=4))
    tape.output(tape.layer_norm(tape.input(size, wanted=True), layer.weight, layer.bias, layer.eps))
    x = (3 * drawn(rows, size) + 1).requires_grad_()
    check(tape, [x], [exact(layer, x.double())])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("groups", "group"), [(1, 1), (3, 5), (8, 16)])
def test_softmax(kernel: cpu.Kernel, rows: int, groups: int, group: int) -> None:
    tape = Tape(kernel)
    tape.output(tape.softmax(tape.input(groups * group, wanted=True), group))
    x = (5 * drawn(rows, groups * group)).requires_grad_()
    check(tape, [x], [x.double().unflatten(1, (groups, group)).softmax(-1).flatten(1)])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", [1, 2, 5, 15])
def test_judge(kernel: cpu.Kernel, rows: int, n: int) -> None:
    tape = Tape(kernel)
    choice = tape.input(1)
    tape.output(tape.judge(tape.input(n, wanted=True), choice))
    choices = torch.randint(0, n, (rows, 1), generator=torch.Generator().manual_seed(1))
    logits = (4 * drawn(rows, n)).requires_grad_()
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    check(tape, [choices.float(), logits], [torch.cat((log_p.gather(-1, choices), entropy), dim=1)])


@pytest.mark.parametrize("rows", ROWS)
def test_a_network_whose_features_are_used_more_than_once(kernel: cpu.Kernel, rows: int) -> None:
    torch.manual_seed(0)
    first, norm, up, down = nn.Linear(9, 20), nn.LayerNorm(20), nn.Linear(20, 50), nn.Linear(50, 20, bias=False)
    periods = torch.tensor([3.0, 10.0, 256.0])
    tape = Tape(kernel)
    step = tape.input(1)
    seen, other = tape.input(3), tape.input(20, wanted=True)
    waves = tape.sines(step, periods)
    x = tape.linear(seen._replace(n=3), torch.eye(3), None)  # beside them lie others
    assert other.first == seen.first + 3
    assert x.first == waves.first + 6
    joined = waves._replace(n=9)  # sines, cosines and what was seen
    stream = tape.linear(joined, first.weight, first.bias, add=other)
    tape.output(stream)
    inner = tape.linear(tape.layer_norm(stream, norm.weight, norm.bias, norm.eps), up.weight, up.bias, "relu")
    tape.output(tape.linear(inner, down.weight, None, add=stream))
    given = [torch.arange(rows)[:, None].float(), drawn(rows, 3), drawn(rows, 20, seed=1).requires_grad_()]
    angle = (2 * math.pi * given[0] / periods).double()  # rounded as in StepEmbedding: late steps are large angles
    joint = torch.cat((angle.sin(), angle.cos(), given[1].double()), dim=1)
    expected = exact(first, joint) + given[2].double()
    hidden = torch.relu(exact(up, exact(norm, expected)))
    check(tape, given, [expected, exact(down, hidden) + expected])


@pytest.mark.parametrize("rows", [1, 64, 130])
@pytest.mark.parametrize("size", [4, 8, 16, 17])
@pytest.mark.parametrize(("retained", "bound"), [(False, None), (True, 1.5)])
def test_heads_and_choice(kernel: cpu.Kernel, rows: int, size: int, retained: bool, bound: float | None) -> None:
    n_heads, columns = 2, 3 * size + 4
    weight, tape = drawn(n_heads, size, columns, seed=1), Tape(kernel)
    x = tape.input(n_heads * size)
    kept = tape.input(n_heads) if retained else None
    y = tape.heads(x, weight, kept, bound)
    tape.output(y)
    tape.choose(y, tape.input(n_heads * size))
    given, gates = drawn(rows, n_heads * size), drawn(rows, n_heads, seed=2).sigmoid()
    clocks = drawn(rows, n_heads * size, seed=3).exp()
    state, starts = 0.1 * drawn(1, rows, n_heads * size * columns, seed=4), drawn(rows, seed=5) > 0
    inputs = [given, *([gates] if retained else []), clocks]
    (out, log_probs), choices, final = tape.step(inputs, state, starts)
    expected, shift = srwm_scan(
        given.view(1, rows, n_heads, size),
        weight,
        state[0].view(rows, n_heads, size, columns),
        starts[None],
        retention=gates[None] if retained else None,
        shift_bound=bound,
        backend="reference",
    )
    torch.testing.assert_close(out, expected.reshape(rows, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final[0], shift.flatten(1), rtol=1e-4, atol=1e-5)
    log_p = out.log_softmax(-1)
    assert torch.equal(choices, (log_p - clocks.log()).argmax(-1))
    torch.testing.assert_close(log_probs, log_p.gather(-1, choices[:, None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF - 2**32])
def test_no_kind_of_nan_is_lost(kernel: cpu.Kernel, bits: int) -> None:
    tape = Tape(kernel)
    layer = nn.Linear(2, 3)
    tape.output(tape.linear(tape.input(2), layer.weight, layer.bias, "tanh"))
    x = drawn(5, 2)
    x.view(torch.int32)[2, 1] = bits
    (y,) = tape.run([x])
    assert torch.isfinite(y).all(1).tolist() == [True, True, False, True, True]
