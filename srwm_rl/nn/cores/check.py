"""`check_core`: does a core keep the promises that trainers, buffers and saved files rely on?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.nn.cores.base import Core

_STEPS, _BATCH, _RESET_STEP, _RESET_ENV = 6, 3, 3, 1
_TOLERANCE = {torch.float64: 1e-9}  # of the largest number; else:
_TOLERANCE_ELSE = 1e-4


def check_core(core: Core) -> None:
    """Check that a core does what `srwm_rl.Core` promises, as Gymnasium's `check_env` does for environments.

    Runs copies of the core on small random unrolls, in the mode (training or evaluation), dtype and device it is in;
    the core itself is left as it was. Checked in this order, by the names that messages give:

    - shapes: zeros `[L, B, S]` for new episodes, `y` `[T, B, O]`, the state's shape kept, dtype and device kept, finite
    - deterministic: the same call gives the same numbers
    - state: a copy of the state (as buffers make it) continues like the state itself
    - inputs: `x`, `state` and `episode_starts` are not written to; `episode_starts` may be bool or number
    - small: one step and one environment work, and give what they give among others
    - batch: no environment sees another
    - stepwise: one step at a time gives what the whole unroll gives; where `carries_over` is False instead that each
      call starts as from zeros
    - reset: an episode start inside the unroll equals a new episode, for that environment alone
    - saving: no tensor lies outside parameters and buffers, and loading the `state_dict` restores the outputs
    - gradients: they reach every parameter and the input, and go through time
    - float64: `core.double()` computes in float64, and `core.float()` brings the old outputs back

    Raises:
        UserError: the first promise that is broken, with the tensor, step, environment and largest difference.
    """
    if not isinstance(core, Core):
        raise UserError(f"check_core takes an instance of srwm_rl.Core, not {core!r:.80}")
    for check in _CHECKS:
        try:
            probe = _Probe(check.__name__.removeprefix("_check_"), deepcopy(core))
            check(probe)
        except UserError:
            raise
        except Exception as error:
            name = check.__name__.removeprefix("_check_")
            raise UserError(f"{_title(core, name)}: it raised {type(error).__name__}: {error}") from error


def _title(core: Core, check: str) -> str:
    return f"core {type(core).__name__} fails the check {check!r}"


class _Run(NamedTuple):
    """What a call gave."""

    y: Tensor  # [T, B, O]
    state: Tensor  # [L, B, S]


class _Probe:
    """A core under one check: its copy, an unroll to feed it, and a state it has reached itself."""

    def __init__(self, check: str, core: Core) -> None:
        self.check, self.core = check, core
        like = next(core.parameters(), None)
        if like is None:
            self.fail("it has no parameters, so nothing says which dtype and device it works in")
        self.dtype, self.device = like.dtype, like.device
        generator = torch.Generator().manual_seed(0)
        self._before, self.x = torch.randn(2, _STEPS, _BATCH, core.input_size, generator=generator).to(like)
        self.starts = torch.zeros(_STEPS, _BATCH, device=self.device)

    @cached_property
    def state(self) -> Tensor:
        """A state that the core has reached, `[L, B, S]`: random numbers might be none."""
        return self.run(self._before, self.core.initial_state(_BATCH), torch.zeros_like(self.starts)).state

    def fail(self, what: str) -> NoReturn:
        raise UserError(f"{_title(self.core, self.check)}: {what}")

    def run(self, x: Tensor, state: Tensor, starts: Tensor) -> _Run:
        """Call the core without gradients."""
        with torch.no_grad():
            return _Run(*self.core(x, state, starts))

    def same(self, ours: Tensor, wanted: Tensor, name: str, what: str) -> None:
        """Fail unless two `[T or L, B, .]` tensors agree but for rounding."""
        if ours.numel() == 0:
            return
        difference = (ours - wanted).abs()
        limit = _TOLERANCE.get(ours.dtype, _TOLERANCE_ELSE) * max(1.0, float(wanted.abs().max()))
        if not float(difference.max()) <= limit:  # written so that it is true of not-a-number
            first, env, _ = torch.unravel_index(difference.argmax().cpu(), difference.shape)
            place = "step" if name == "y" else "layer"
            self.fail(
                f"{what}: {name} differs by up to {float(difference.max()):.2g}, most at {place} {int(first)}, "
                f"environment {int(env)}"
            )


def _check_shapes(probe: _Probe) -> None:
    core = probe.core
    initial = core.initial_state(_BATCH)
    if initial.count_nonzero():
        probe.fail("initial_state must be zeros: trainers and buffers begin an episode with zeros")
    shape = (core.state_layers, _BATCH, core.state_size)
    _check_tensor(probe, f"initial_state({_BATCH})", initial, shape)
    result = core(probe.x, initial, probe.starts)
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(each, Tensor) for each in result)):
        probe.fail(f"forward must return a tuple of two tensors, y and the new state, not {type(result).__name__}")
    _check_tensor(probe, "y", result[0], (_STEPS, _BATCH, core.output_size))
    _check_tensor(probe, "the new state", result[1], shape)


def _check_tensor(probe: _Probe, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        letters = "[T, B, output_size]" if name == "y" else "[state_layers, B, state_size]"
        probe.fail(f"{name} must be {letters} = {list(shape)}, not {list(tensor.shape)}")
    if tensor.dtype != probe.dtype:
        probe.fail(f"{name} is {tensor.dtype}, the core's parameters and input are {probe.dtype}")
    if tensor.device != probe.device:
        probe.fail(f"{name} is on {tensor.device}, the core's parameters and input on {probe.device}")
    if not tensor.isfinite().all():
        probe.fail(f"{name} is not finite")


def _check_deterministic(probe: _Probe) -> None:
    first, again = (probe.run(probe.x, probe.state, probe.starts) for _ in range(2))
    what = "two equal calls give different numbers (does it draw at random, or recur something outside the state?)"
    probe.same(again.y, first.y, "y", what)
    probe.same(again.state, first.state, "the new state", what)


def _check_state(probe: _Probe) -> None:
    copied = torch.from_numpy(probe.state.detach().cpu().numpy().copy()).to(probe.device)
    there = probe.run(probe.x, probe.state, probe.starts)
    here = probe.run(probe.x, copied, probe.starts)
    what = "a copy of the state does not continue like the state (is something remembered beside its numbers?)"
    probe.same(here.y, there.y, "y", what)
    probe.same(here.state, there.state, "the new state", what)


def _check_inputs(probe: _Probe) -> None:
    probe.starts[[0, _RESET_STEP], [0, _RESET_ENV]] = 1
    given = {"x": probe.x, "state": probe.state, "episode_starts": probe.starts}
    before = {name: tensor.clone() for name, tensor in given.items()}
    run = probe.run(probe.x, probe.state, probe.starts)
    for name, tensor in given.items():
        if not torch.equal(tensor, before[name]):
            probe.fail(f"forward writes into its argument {name}; it must leave it as it was")
    probe.same(probe.run(probe.x, probe.state, probe.starts.bool()).y, run.y, "y", "bool episode_starts act otherwise")


def _check_small(probe: _Probe) -> None:
    whole = probe.run(probe.x[:1], probe.state, probe.starts[:1])
    alone = probe.run(probe.x[:1, :1], probe.state[:, :1], probe.starts[:1, :1])
    probe.same(alone.y, whole.y[:, :1], "y", "one step of one environment alone")
    probe.same(alone.state, whole.state[:, :1], "the new state", "one step of one environment alone")


def _check_batch(probe: _Probe) -> None:
    whole = probe.run(probe.x, probe.state, probe.starts)
    x, state = probe.x.clone(), probe.state.clone()
    x[:, 1:] += 1
    state[:, 1:] = 0
    other = probe.run(x, state, probe.starts)
    what = "environment 0 changes with what the other environments see"
    probe.same(other.y[:, :1], whole.y[:, :1], "y", what)
    probe.same(other.state[:, :1], whole.state[:, :1], "the new state", what)


def _check_stepwise(probe: _Probe) -> None:
    whole = probe.run(probe.x, probe.state, probe.starts)
    if not probe.core.carries_over:
        fresh = probe.run(probe.x, probe.core.initial_state(_BATCH) + 1, probe.starts)
        zeros = probe.run(probe.x, probe.core.initial_state(_BATCH), probe.starts)
        probe.same(fresh.y, zeros.y, "y", "carries_over is False, yet a call does not start as from zeros")
        return
    state, ys = probe.state, []
    for x, starts in zip(probe.x.split(1), probe.starts.split(1), strict=True):
        y, state = probe.run(x, state, starts)
        ys.append(y)
    what = "one step at a time is not the whole unroll (set carries_over = False if that is meant)"
    probe.same(torch.cat(ys), whole.y, "y", what)
    probe.same(state, whole.state, "the new state", what)


def _check_reset(probe: _Probe) -> None:
    plain = probe.run(probe.x, probe.state, probe.starts)
    zeros = probe.core.initial_state(_BATCH)
    env = slice(_RESET_ENV, _RESET_ENV + 1)
    for step in (0, _RESET_STEP):
        starts = probe.starts.clone()
        starts[step, _RESET_ENV] = 1
        run = probe.run(probe.x, probe.state, starts)
        fresh = probe.run(probe.x[step:], zeros, probe.starts[step:])
        what = f"an episode start at step {step} of environment {_RESET_ENV} is not a new episode"
        probe.same(run.y[step:, env], fresh.y[:, env], "y", what)
        probe.same(run.state[:, env], fresh.state[:, env], "the new state", what)
        what = f"an episode start in environment {_RESET_ENV} changes another environment"
        probe.same(run.y[:, ::2], plain.y[:, ::2], "y", what)
        probe.same(run.state[:, ::2], plain.state[:, ::2], "the new state", what)


def _check_saving(probe: _Probe) -> None:
    core = probe.core
    known = {id(each) for kind in (core.parameters, core.buffers, core.modules) for each in kind()}
    for path, module in core.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_TORCH and any(id(each) not in known for each in _tensors(value)):
                probe.fail(
                    f"{f'{path}.{name}'.lstrip('.')} holds a tensor or module that is neither saved nor moved with the "
                    "core; use nn.Parameter, register_buffer, nn.ModuleList or nn.ParameterList"
                )
    before = probe.run(probe.x, probe.state, probe.starts)
    saved = {name: value.clone() for name, value in core.state_dict().items()}
    with torch.no_grad():
        for value in (*core.parameters(), *core.state_dict().values()):
            value.zero_()
    core.load_state_dict(saved)
    after = probe.run(probe.x, probe.state, probe.starts)
    probe.same(after.y, before.y, "y", "state_dict and load_state_dict do not restore it")


_OF_TORCH = frozenset(vars(nn.Module()))  # _parameters, _buffers, _modules, ...


def _tensors(value: Any) -> Iterator[Tensor | nn.Module]:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return (each for each in inside if isinstance(each, (Tensor, nn.Module)))


def _check_gradients(probe: _Probe) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a weight that starts at zero may hide another from its gradient
        for parameter in probe.core.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
    x, state = probe.x.clone().requires_grad_(), probe.state.clone().requires_grad_()
    y, _ = probe.core(x, state, probe.starts)
    weights = torch.randn(y.shape, generator=generator).to(y)
    learnt = {name: each for name, each in probe.core.named_parameters() if each.requires_grad}
    wanted = {"the input x": x, **{f"the parameter {name}": each for name, each in learnt.items()}}
    grads = torch.autograd.grad((y * weights).sum(), list(wanted.values()), allow_unused=True, retain_graph=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is None or not grad.count_nonzero():
            probe.fail(f"no gradient of y reaches {name}")
        if not grad.isfinite().all():
            probe.fail(f"the gradient of y is not finite at {name}")
    other = probe.run(probe.x, probe.core.initial_state(_BATCH), probe.starts).y[-1]
    (through,) = torch.autograd.grad((y[-1] * weights[-1]).sum(), state, allow_unused=True)
    if not torch.equal(other, y[-1].detach()) and (through is None or not through.count_nonzero()):
        probe.fail(
            "the last output depends on the first state, yet no gradient goes back through time (a detach?); to cut it "
            "on purpose, train with the setting bptt"
        )


def _check_float64(probe: _Probe) -> None:
    before = probe.run(probe.x, probe.state, probe.starts)
    probe.core.double()
    x, state = probe.x.double(), probe.state.double()
    run = probe.run(x, state, probe.starts)
    for name, dtype in (
        ("initial_state", probe.core.initial_state(1).dtype),
        ("y", run.y.dtype),
        ("the new state", run.state.dtype),
    ):
        if dtype != torch.float64:
            probe.fail(f"after core.double(), {name} is {dtype}")
    probe.core.to(probe.dtype)
    after = probe.run(probe.x, probe.state, probe.starts)
    probe.same(after.y, before.y, "y", f"after core.double() and back to {probe.dtype}")


_CHECKS: tuple[Callable[[_Probe], None], ...] = (
    _check_shapes,
    _check_deterministic,
    _check_state,
    _check_inputs,
    _check_small,
    _check_batch,
    _check_stepwise,
    _check_reset,
    _check_saving,
    _check_gradients,
    _check_float64,
)
