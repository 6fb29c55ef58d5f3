"""`check_core`: does a core fulfil the interface that trainers, buffers and saved files rely on?"""

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
_TOLERANCE = {True: 1e-9, False: 1e-4}  # by whether it is float64; relative to the largest number
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # _parameters, _buffers, _modules, ...


def check_core(core: Core) -> None:
    """Check that a core fulfils the interface of `srwm_rl.Core`, as Gymnasium's `check_env` does for environments.

    Runs copies of the core on small random unrolls, in its mode (training or evaluation), dtype and device; the core
    itself is not changed. The checks, in order, by the names in messages:

    - shapes: `initial_state` is zeros `[L, B, S]`; `y` is `[T, B, O]`; the state keeps its shape; all are finite and
      keep the core's dtype and device
    - deterministic: two equal calls give equal numbers
    - state: a copy of the state (as buffers make it) continues like the state itself
    - inputs: `x`, `state` and `episode_starts` are not written to; `episode_starts` may be bool or number
    - small: one step of one environment works, and gives what it gives within a batch
    - batch: environments do not influence each other
    - stepwise: one step at a time gives what the whole unroll gives; with `carries_over` False, each call starts as
      from zeros
    - reset: an episode start inside the unroll equals a new episode, for that environment alone
    - saving: every tensor is a parameter or buffer, and loading the `state_dict` restores the outputs
    - gradients: they reach every parameter and the input, and flow through time
    - float64: `core.double()` computes in float64, and `core.float()` restores the old outputs

    Raises:
        UserError: the first check that fails, with the tensor, step, environment and largest difference.
    """
    if not isinstance(core, Core):
        raise UserError(f"check_core takes an instance of srwm_rl.Core, not {core!r:.80}")
    for name, check in _CHECKS.items():
        title = f"core {type(core).__name__} fails the check {name!r}"
        try:
            check(_Probe(title, deepcopy(core)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{title}: it raised {type(error).__name__}: {error}") from error


class _Run(NamedTuple):
    """The result of a call."""

    y: Tensor  # [T, B, O]
    state: Tensor  # [L, B, S]

    def of(self, envs: slice, steps: slice = slice(None)) -> _Run:
        """Select environments, and steps of `y`."""
        return _Run(self.y[steps, envs], self.state[:, envs])


class _Probe:
    """A copy of the core for one check, with an unroll to run it on."""

    def __init__(self, title: str, core: Core) -> None:
        self.title, self.core = title, core
        like = next(core.parameters(), None)
        if like is None:
            self.fail("it has no parameters, so its dtype and device are unknown")
        self.dtype, self.device = like.dtype, like.device
        generator = torch.Generator().manual_seed(0)
        self._warm_up, self.x = torch.randn(2, _STEPS, _BATCH, core.input_size, generator=generator).to(like)
        self.starts = torch.zeros(_STEPS, _BATCH, device=self.device)

    @cached_property
    def state(self) -> Tensor:
        """A state that the core has reached, `[L, B, S]`: random numbers may be no valid one."""
        return self.run(self._warm_up, self.core.initial_state(_BATCH), torch.zeros_like(self.starts)).state

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.title}: {problem}")

    def run(self, x: Tensor | None = None, state: Tensor | None = None, starts: Tensor | None = None) -> _Run:
        """Call the core without gradients; an argument that is None is the probe's own."""
        x = self.x if x is None else x
        state = self.state if state is None else state
        starts = self.starts if starts is None else starts
        with torch.no_grad():
            return _Run(*self.core(x, state, starts))

    def same(self, actual: _Run, expected: _Run, problem: str) -> None:
        """Fail unless two results agree up to rounding."""
        for name, axis, ours, theirs in zip(("y", "the new state"), ("step", "layer"), actual, expected, strict=True):
            if ours.numel() == 0:
                continue
            difference = (ours - theirs).abs()
            limit = _TOLERANCE[ours.dtype == torch.float64] * max(1.0, float(theirs.abs().max()))
            if not float(difference.max()) <= limit:  # also true of NaN
                first, env, _ = torch.unravel_index(difference.argmax().cpu(), difference.shape)
                self.fail(
                    f"{problem}: {name} differs by up to {float(difference.max()):.2g}, most at {axis} {int(first)}, "
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
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(item, Tensor) for item in result)):
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
    problem = "two equal calls give different numbers (does it draw at random, or keep something outside the state?)"
    first = probe.run()
    probe.same(probe.run(), first, problem)


def _check_state(probe: _Probe) -> None:
    copied = torch.from_numpy(probe.state.detach().cpu().numpy().copy()).to(probe.device)
    original = probe.run()
    problem = "a copy of the state does not continue like the state (is something remembered beside its numbers?)"
    probe.same(probe.run(state=copied), original, problem)


def _check_inputs(probe: _Probe) -> None:
    probe.starts[[0, _RESET_STEP], [0, _RESET_ENV]] = 1
    arguments = {"x": probe.x, "state": probe.state, "episode_starts": probe.starts}
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    run = probe.run()
    for name, tensor in arguments.items():
        if not torch.equal(tensor, before[name]):
            probe.fail(f"forward writes into its argument {name}; it must not change it")
    probe.same(probe.run(starts=probe.starts.bool()), run, "bool episode_starts act otherwise")


def _check_small(probe: _Probe) -> None:
    batch = probe.run(probe.x[:1], probe.state, probe.starts[:1])
    alone = probe.run(probe.x[:1, :1], probe.state[:, :1], probe.starts[:1, :1])
    probe.same(alone, batch.of(slice(1)), "one step of one environment alone differs from that step in a batch")


def _check_batch(probe: _Probe) -> None:
    x, state = probe.x.clone(), probe.state.clone()
    x[:, 1:] += 1
    state[:, 1:] = 0
    problem = "environment 0 changes with the inputs of the other environments"
    probe.same(probe.run(x, state).of(slice(1)), probe.run().of(slice(1)), problem)


def _check_stepwise(probe: _Probe) -> None:
    if not probe.core.carries_over:
        zeros = probe.run(state=probe.core.initial_state(_BATCH))
        ones = probe.run(state=probe.core.initial_state(_BATCH) + 1)
        probe.same(_Run(ones.y, zeros.state), zeros, "carries_over is False, yet a call does not start as from zeros")
        return
    state, ys = probe.state, []
    for x, starts in zip(probe.x.split(1), probe.starts.split(1), strict=True):
        y, state = probe.run(x, state, starts)
        ys.append(y)
    problem = "one step at a time is not the whole unroll (set carries_over = False if that is meant)"
    probe.same(_Run(torch.cat(ys), state), probe.run(), problem)


def _check_reset(probe: _Probe) -> None:
    plain, zeros = probe.run(), probe.core.initial_state(_BATCH)
    env, others = slice(_RESET_ENV, _RESET_ENV + 1), slice(None, None, 2)
    for step in (0, _RESET_STEP):
        starts = probe.starts.clone()
        starts[step, _RESET_ENV] = 1
        run = probe.run(starts=starts)
        fresh = probe.run(probe.x[step:], zeros, probe.starts[step:])
        problem = f"an episode start at step {step} of environment {_RESET_ENV} is not a new episode"
        probe.same(run.of(env, slice(step, None)), fresh.of(env), problem)
        problem = f"an episode start in environment {_RESET_ENV} changes another environment"
        probe.same(run.of(others), plain.of(others), problem)


def _check_saving(probe: _Probe) -> None:
    core = probe.core
    saved_or_moved = {id(item) for kind in (core.parameters, core.buffers, core.modules) for item in kind()}
    for path, module in core.named_modules():
        for name, value in vars(module).items():
            if name not in _MODULE_ATTRIBUTES and any(id(item) not in saved_or_moved for item in _tensors(value)):
                probe.fail(
                    f"{f'{path}.{name}'.lstrip('.')} holds a tensor or module that is neither saved nor moved with the "
                    "core; use nn.Parameter, register_buffer, nn.ModuleList or nn.ParameterList"
                )
    before = probe.run()
    saved = {name: value.clone() for name, value in core.state_dict().items()}
    with torch.no_grad():
        for value in (*core.parameters(), *core.state_dict().values()):
            value.zero_()
    core.load_state_dict(saved)
    probe.same(probe.run(), before, "state_dict and load_state_dict do not restore it")


def _tensors(value: Any) -> Iterator[Tensor | nn.Module]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return (item for item in items if isinstance(item, (Tensor, nn.Module)))


def _check_gradients(probe: _Probe) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a weight that starts at zero may hide another from its gradient
        for parameter in probe.core.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
    x, state = probe.x.clone().requires_grad_(), probe.state.clone().requires_grad_()
    y, _ = probe.core(x, state, probe.starts)
    weights = torch.randn(y.shape, generator=generator).to(y)
    leaves = {"the input x": x} | {
        f"the parameter {name}": parameter
        for name, parameter in probe.core.named_parameters()
        if parameter.requires_grad
    }
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is None or not grad.count_nonzero():
            probe.fail(f"no gradient of y reaches {name}")
        if not grad.isfinite().all():
            probe.fail(f"the gradient of y is not finite at {name}")
    fresh = probe.run(state=probe.core.initial_state(_BATCH)).y[-1]
    (grad_state,) = torch.autograd.grad((y[-1] * weights[-1]).sum(), state, allow_unused=True)
    if not torch.equal(fresh, y[-1].detach()) and (grad_state is None or not grad_state.count_nonzero()):
        probe.fail(
            "the last output depends on the first state, yet no gradient flows back through time (a detach?); to cut "
            "it on purpose, train with the setting bptt"
        )


def _check_float64(probe: _Probe) -> None:
    before = probe.run()
    probe.core.double()
    run = probe.run(probe.x.double(), probe.state.double())
    tensors = {"initial_state": probe.core.initial_state(1), "y": run.y, "the new state": run.state}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64:
            probe.fail(f"after core.double(), {name} is {tensor.dtype}")
    probe.core.to(probe.dtype)
    probe.same(probe.run(), before, f"after core.double() and back to {probe.dtype}")


_CHECKS: dict[str, Callable[[_Probe], None]] = {
    "shapes": _check_shapes,
    "deterministic": _check_deterministic,
    "state": _check_state,
    "inputs": _check_inputs,
    "small": _check_small,
    "batch": _check_batch,
    "stepwise": _check_stepwise,
    "reset": _check_reset,
    "saving": _check_saving,
    "gradients": _check_gradients,
    "float64": _check_float64,
}
