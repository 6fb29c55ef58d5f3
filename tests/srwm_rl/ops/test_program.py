"""The program's operations against PyTorch's, forward and backward, at every instruction set this machine has."""

import math

import pytest
import torch
from torch import Tensor, nn

from srwm_rl import srwm_scan
from srwm_rl.agents.losses.ppo_loss import ppo_loss
from srwm_rl.ops import cpu
from srwm_rl.ops.program import PPOLossParams, Program
from tests.srwm_rl.ops.defaults import other_default, other_defaults

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


def check(program: Program, inputs: list[Tensor], expected: list[Tensor]) -> None:
    """Compare outputs, and the gradients of a random loss, with the float64 ones of `expected`."""
    outputs = program.run(inputs)
    grads = [drawn(*tensor.shape, seed=9 + i) for i, tensor in enumerate(expected)]
    wrt = [tensor for tensor in (*inputs, *program.trainable) if tensor.requires_grad]
    our_grads = torch.autograd.grad(sum((a * g).sum() for a, g in zip(outputs, grads, strict=True)), wrt)
    expected_grads = torch.autograd.grad(sum((a * g).sum() for a, g in zip(expected, grads, strict=True)), wrt)
    for a, b in zip((*outputs, *our_grads), (*expected, *expected_grads), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 2e-6 * b.norm() + 2e-7 * math.sqrt(b.numel())


def exact(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module in float64, with gradients that reach its float32 weights."""
    weights = {name: parameter.double() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (3, 7), (16, 6), (17, 33), (82, 32), (130, 5)])
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "tanh"])
def test_linear(kernel: cpu.Kernel, rows: int, n_in: int, n_out: int, activation: str) -> None:
    torch.manual_seed(n_in)
    layer, program = nn.Linear(n_in, n_out), Program(kernel)
    program.output(program.linear(program.input(n_in, needs_grad=True), layer.weight, layer.bias, activation))
    x = drawn(rows, n_in).requires_grad_()
    functions = {"identity": lambda y: y, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    check(program, [x], [functions[activation](exact(layer, x.double()))])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [5, 6, 32, 48])
def test_layer_norm(kernel: cpu.Kernel, rows: int, size: int) -> None:
    layer, program = nn.LayerNorm(size), Program(kernel)
    with torch.no_grad():
        layer.weight.copy_(drawn(size, seed=3))
        layer.bias.copy_(drawn(size, seed=4))
    program.output(program.layer_norm(program.input(size, needs_grad=True), layer.weight, layer.bias, layer.eps))
    x = (3 * drawn(rows, size) + 1).requires_grad_()
    check(program, [x], [exact(layer, x.double())])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("groups", "group"), [(1, 1), (3, 5), (8, 16)])
def test_softmax(kernel: cpu.Kernel, rows: int, groups: int, group: int) -> None:
    program = Program(kernel)
    program.output(program.softmax(program.input(groups * group, needs_grad=True), group))
    x = (5 * drawn(rows, groups * group)).requires_grad_()
    check(program, [x], [x.double().unflatten(1, (groups, group)).softmax(-1).flatten(1)])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", [1, 2, 5, 15])
def test_log_prob_and_entropy(kernel: cpu.Kernel, rows: int, n: int) -> None:
    program = Program(kernel)
    action = program.input(1)
    program.output(program.log_prob_and_entropy(program.input(n, needs_grad=True), action))
    actions = torch.randint(0, n, (rows, 1), generator=torch.Generator().manual_seed(1))
    logits = (4 * drawn(rows, n)).requires_grad_()
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    check(program, [actions.float(), logits], [torch.cat((log_p.gather(-1, actions), entropy), dim=1)])


def loss_params(clip_range_vf: float) -> PPOLossParams:
    return PPOLossParams(clip_range=0.2, clip_range_vf=clip_range_vf, vf_coef=0.7, ent_coef=0.02, scale=0.01)


def loss_program(kernel: cpu.Kernel, n: int) -> Program:
    """Return a program of logits, an action and a value that ends in PPO's loss."""
    program = Program(kernel)
    action_stats = program.log_prob_and_entropy(program.input(n, needs_grad=True), program.input(1))
    program.ppo_loss(action_stats, program.input(1, needs_grad=True))
    return program


def expected_terms(params: PPOLossParams, inputs: list[Tensor]) -> Tensor:
    """Return the summed terms of PPO's loss and its diagnostics, in float64."""
    logits, actions, value, old_log_p, advantage, returns, old_value = (tensor.double() for tensor in inputs)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    clip_range_vf = params.clip_range_vf if params.clip_range_vf >= 0 else None
    new_log_p = log_p.gather(-1, actions.long())
    sums = ppo_loss(
        value, new_log_p, entropy, old_value, old_log_p, advantage, returns, params.clip_range, clip_range_vf
    )
    return torch.stack([*sums])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("clip_range_vf", [-1.0, 0.0, 0.4])
def test_ppo_loss(kernel: cpu.Kernel, rows: int, n: int, clip_range_vf: float) -> None:
    params, program = loss_params(clip_range_vf), loss_program(kernel, n)
    actions = torch.randint(0, n, (rows, 1), generator=torch.Generator().manual_seed(1))
    logits, value = 2 * drawn(rows, n), drawn(rows, 1, seed=2)
    log_p = logits.log_softmax(-1).gather(-1, actions)
    # Near enough to the policy that some ratios are clipped and some are not, on both sides.
    old_log_p, old_value = log_p + 0.3 * drawn(rows, 1, seed=3), value + 0.5 * drawn(rows, 1, seed=6)
    inputs = [logits, actions.float(), value, old_log_p, drawn(rows, 1, seed=4), drawn(rows, 1, seed=5), old_value]
    (grad_logits, none, grad_value, *other_grads), terms = program.loss_and_grad(inputs, params, [])
    assert none is None
    assert other_grads == [None] * 4
    inputs[0].requires_grad_()
    inputs[2].requires_grad_()
    expected = expected_terms(params, inputs)
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=2e-5)
    policy_loss, value_loss, entropy, *_ = expected
    loss = (policy_loss + params.vf_coef * value_loss - params.ent_coef * entropy) * params.scale
    for grad, exact_grad in zip(
        (grad_logits, grad_value), torch.autograd.grad(loss, (inputs[0], inputs[2])), strict=True
    ):
        assert grad is not None
        assert (grad - exact_grad).norm() <= 2e-6 * exact_grad.norm() + 1e-9 * math.sqrt(rows)
    if rows > 100 and n > 1:
        assert 0.2 < expected[4].item() / rows < 0.8


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 2, 3, 4, 5, 6])
def test_non_finite_inputs_reach_the_loss_terms(kernel: cpu.Kernel, number: float, index: int) -> None:
    program = loss_program(kernel, 3)
    inputs = [drawn(70, 3), torch.zeros(70, 1), *(drawn(70, 1, seed=i) for i in range(5))]
    inputs[index][66] = number
    _, terms = program.loss_and_grad(inputs, loss_params(0.4), [])
    expected = expected_terms(loss_params(0.4), inputs)
    assert torch.equal(terms[:4].isfinite(), expected[:4].isfinite())
    assert not terms[:4].isfinite().all() or math.isinf(number)  # an infinite value is clipped to its former one


@pytest.mark.parametrize("log_ratio", [87.9, 88.5, 200.0, -90.0, -300.0])
def test_ratios_beyond_the_range_of_exp(kernel: cpu.Kernel, log_ratio: float) -> None:
    program = loss_program(kernel, 2)
    inputs = [torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(2, 1), torch.full((2, 1), -log_ratio - math.log(2))]
    inputs += [torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1), torch.zeros(2, 1)]
    (grad, *_), terms = program.loss_and_grad(inputs, loss_params(-1.0), [])
    assert grad is not None
    if log_ratio < 0:  # the action's probability is near 0: the loss stays finite
        assert torch.isfinite(terms).all()
        assert torch.isfinite(grad).all()
        assert terms[3].item() == pytest.approx(2 * (-1 - log_ratio), rel=1e-5)
    else:
        assert terms[3].item() > 1e37


@pytest.mark.parametrize("rows", ROWS)
def test_sines_of_late_steps(kernel: cpu.Kernel, rows: int) -> None:
    periods = torch.tensor([2.0, 3.7, 1e6])
    program = Program(kernel)
    program.output(program.sines(program.input(1), periods))
    steps = (drawn(rows, 1).abs() * torch.logspace(-3, 6, max(rows, 1))[:rows, None]).float()
    steps[: rows // 2].neg_()
    (sines,) = program.run([steps])
    angle = (2 * math.pi * steps / periods).double()
    expected = torch.cat((angle.sin(), angle.cos()), dim=1)
    assert (sines - expected).abs().amax().item() < 3e-7 if rows else not sines.numel()


@pytest.mark.parametrize("step", [1e9, 1e15, 1e20, 3e37])
def test_sines_of_very_late_steps(kernel: cpu.Kernel, step: float) -> None:
    program = Program(kernel)
    program.output(program.sines(program.input(1), torch.tensor([2.0])))
    (sines,) = program.run([torch.tensor([[step], [1.0]])])
    angle = 2 * math.pi * torch.tensor([[step], [1.0]]) / 2.0
    torch.testing.assert_close(sines, torch.cat((angle.sin(), angle.cos()), dim=1), rtol=0, atol=1e-6)


def test_sines_of_non_finite_steps_are_nan(kernel: cpu.Kernel) -> None:
    program = Program(kernel)
    program.output(program.sines(program.input(1), torch.tensor([2.0])))
    (sines,) = program.run([torch.tensor([[math.inf], [-math.inf], [math.nan], [0.0]])])
    assert sines[:3].isnan().all()
    assert sines[3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("rows", ROWS)
def test_a_network_whose_features_are_used_more_than_once(kernel: cpu.Kernel, rows: int) -> None:
    torch.manual_seed(0)
    first, norm, up, down = nn.Linear(9, 20), nn.LayerNorm(20), nn.Linear(20, 50), nn.Linear(50, 20, bias=False)
    periods = torch.tensor([3.0, 10.0, 256.0])
    program = Program(kernel)
    step = program.input(1)
    seen, residual = program.input(3), program.input(20, needs_grad=True)
    waves = program.sines(step, periods)
    x = program.linear(seen._replace(n=3), torch.eye(3), None)  # a part of the features
    assert residual.first == seen.first + 3
    assert x.first == waves.first + 6
    joined = waves._replace(n=9)  # sines, cosines and the 3 observed numbers
    stream = program.linear(joined, first.weight, first.bias, add=residual)
    program.output(stream)
    inner = program.linear(program.layer_norm(stream, norm.weight, norm.bias, norm.eps), up.weight, up.bias, "relu")
    program.output(program.linear(inner, down.weight, None, add=stream))
    inputs = [torch.arange(rows)[:, None].float(), drawn(rows, 3), drawn(rows, 20, seed=1).requires_grad_()]
    angle = (2 * math.pi * inputs[0] / periods).double()  # rounded as in StepEmbedding: late steps are large angles
    joint = torch.cat((angle.sin(), angle.cos(), inputs[1].double()), dim=1)
    expected = exact(first, joint) + inputs[2].double()
    hidden = torch.relu(exact(up, exact(norm, expected)))
    check(program, inputs, [expected, exact(down, hidden) + expected])


@pytest.mark.parametrize("rows", [1, 64, 130])
@pytest.mark.parametrize("size", [4, 8, 16, 17])
@pytest.mark.parametrize(("retained", "bound"), [(False, None), (True, 1.5)])
def test_heads_and_sample(kernel: cpu.Kernel, rows: int, size: int, retained: bool, bound: float | None) -> None:
    n_heads, columns = 2, 3 * size + 4
    weight, program = drawn(n_heads, size, columns, seed=1), Program(kernel)
    x = program.input(n_heads * size)
    kept = program.input(n_heads) if retained else None
    y = program.heads(x, weight, kept, bound)
    program.output(y)
    program.sample(y, program.input(n_heads * size))
    scan_output, gates = drawn(rows, n_heads * size), drawn(rows, n_heads, seed=2).sigmoid()
    exp_noise = drawn(rows, n_heads * size, seed=3).exp()
    state, starts = 0.1 * drawn(1, rows, n_heads * size * columns, seed=4), drawn(rows, seed=5) > 0
    inputs = [scan_output, *([gates] if retained else []), exp_noise]
    (out, log_probs), actions, final = program.step(inputs, state, starts)
    expected, shift = srwm_scan(
        scan_output.view(1, rows, n_heads, size),
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
    assert torch.equal(actions, (log_p - exp_noise.log()).argmax(-1))
    torch.testing.assert_close(log_probs, log_p.gather(-1, actions[:, None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF - 2**32])
def test_every_nan_bit_pattern_stays_nan(kernel: cpu.Kernel, bits: int) -> None:
    program = Program(kernel)
    layer = nn.Linear(2, 3)
    program.output(program.linear(program.input(2), layer.weight, layer.bias, "tanh"))
    x = drawn(5, 2)
    x.view(torch.int32)[2, 1] = bits
    (y,) = program.run([x])
    assert torch.isfinite(y).all(1).tolist() == [True, True, False, True, True]


def acting_program() -> tuple[Program, list[Tensor], Tensor, Tensor]:
    """Return a program of one head, its inputs, state and episode starts for 3 environments."""
    assert not isinstance(KERNEL, str)
    program = Program(KERNEL)
    y = program.heads(program.input(4), drawn(1, 4, 16))
    program.output(y)
    program.sample(y, program.input(4))
    return program, [drawn(3, 4), drawn(3, 4).exp()], drawn(1, 3, 64), torch.zeros(3)


@other_defaults
def test_defaults_of_torch_do_not_matter(kind: str) -> None:
    assert not isinstance(KERNEL, str)
    layer, linear = nn.Linear(4, 2), Program(KERNEL)
    linear.output(linear.linear(linear.input(4, needs_grad=True), layer.weight, layer.bias))
    loss, loss_inputs = loss_program(KERNEL, 3), [drawn(5, 3), torch.zeros(5, 1), *(drawn(5, 1) for _ in range(5))]
    acting, inputs, state, starts = acting_program()
    x = drawn(3, 4).requires_grad_()

    def results() -> list[Tensor]:
        (y,) = linear.run([x])
        grads = torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])
        outputs, actions, final = acting.step(inputs, state, starts)
        (grad_logits, *_), terms = loss.loss_and_grad(loss_inputs, loss_params(0.4), [])
        assert grad_logits is not None
        return [y, *grads, *outputs, actions, final, grad_logits, terms]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))


def test_what_does_not_fit_is_named_and_not_read() -> None:
    program, inputs, state, starts = acting_program()
    program.step(inputs, state, starts)
    with pytest.raises(ValueError, match=r"state must be torch.float32 \[1, 3, 64\] on the CPU, not .* \[1, 2,"):
        program.step(inputs, state[:, :2], starts)
    with pytest.raises(ValueError, match=r"state must be torch.float32 .*, not torch.float64"):
        program.step(inputs, state.double(), starts)
    with pytest.raises(ValueError, match=r"episode_starts must be \[3\] on the CPU, not \[2\]"):
        program.step(inputs, state, starts[:2])
    for wrong in (drawn(2, 4), drawn(3, 3), drawn(3, 4).double(), drawn(3, 4).to("meta")):
        with pytest.raises(ValueError, match=r"input must be torch.float32 \[3, 4\] on the CPU, not"):
            program.step([inputs[0], wrong], state, starts)
    x = program.input(4)
    for weight in (drawn(2, 3), drawn(2, 4).double()):
        with pytest.raises(ValueError, match=r"weight must be torch.float32 \[2, 4\] on the CPU, not"):
            program.linear(x, weight, None)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[2\] on the CPU, not"):
        program.linear(x, drawn(2, 4), drawn(1))
    with pytest.raises(ValueError, match=r"weight \[2, 4\] must be contiguous"):
        program.linear(x, drawn(4, 2).t(), None)
    with pytest.raises(ValueError, match=r"weight \[2, 4, 16\] does not fit 4 features"):
        program.heads(x, drawn(2, 4, 16))
