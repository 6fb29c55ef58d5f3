"""`check_core`: does a core fulfil the interface that trainers, buffers and saved files rely on?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    for method in [name for name in vars(_Probe) if name.startswith("check_")]:
        title = f"core {type(core).__name__} fails the check {method.removeprefix('check_')!r}"
        try:
            getattr(_Probe(title, deepcopy(core)), method)()
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
    """A copy of the core for one check, with an unroll to run it on; the methods `check_*` are the checks, in order."""

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

    def check_shapes(self) -> None:
        core = self.core
        initial = core.initial_state(_BATCH)
        if initial.count_nonzero():
            self.fail("initial_state must be zeros: trainers and buffers begin an episode with zeros")
        shape = (core.state_layers, _BATCH, core.state_size)
        self._check_tensor(f"initial_state({_BATCH})", initial, shape)
        result = core(self.x, initial, self.starts)
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(item, Tensor) for item in result)):
            self.fail(f"forward must return a tuple of two tensors, y and the new state, not {type(result).__name__}")
        self._check_tensor("y", result[0], (_STEPS, _BATCH, core.output_size))
        self._check_tensor("the new state", result[1], shape)

    def _check_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            letters = "[T, B, output_size]" if name == "y" else "[state_layers, B, state_size]"
            self.fail(f"{name} must be {letters} = {list(shape)}, not {list(tensor.shape)}")
        if tensor.dtype != self.dtype:
            self.fail(f"{name} is {tensor.dtype}, the core's parameters and input are {self.dtype}")
        if tensor.device != self.device:
            self.fail(f"{name} is on {tensor.device}, the core's parameters and input on {self.device}")
        if not tensor.isfinite().all():
            self.fail(f"{name} is not finite")

    def check_deterministic(self) -> None:
        problem = "two equal calls give different numbers"
        hint = "(does it draw at random, or keep something outside the state?)"
        self.same(self.run(), self.run(), f"{problem} {hint}")

    def check_state(self) -> None:
        copied = torch.from_numpy(self.state.detach().cpu().numpy().copy()).to(self.device)
        original = self.run()
        problem = "a copy of the state does not continue like the state (is something remembered beside its numbers?)"
        self.same(self.run(state=copied), original, problem)

    def check_inputs(self) -> None:
        self.starts[[0, _RESET_STEP], [0, _RESET_ENV]] = 1
        arguments = {"x": self.x, "state": self.state, "episode_starts": self.starts}
        before = {name: tensor.clone() for name, tensor in arguments.items()}
        run = self.run()
        for name, tensor in arguments.items():
            if not torch.equal(tensor, before[name]):
                self.fail(f"forward writes into its argument {name}; it must not change it")
        self.same(self.run(starts=self.starts.bool()), run, "bool episode_starts act otherwise")

    def check_small(self) -> None:
        batch = self.run(self.x[:1], self.state, self.starts[:1])
        alone = self.run(self.x[:1, :1], self.state[:, :1], self.starts[:1, :1])
        self.same(alone, batch.of(slice(1)), "one step of one environment alone differs from that step in a batch")

    def check_batch(self) -> None:
        x, state = self.x.clone(), self.state.clone()
        x[:, 1:] += 1
        state[:, 1:] = 0
        problem = "environment 0 changes with the inputs of the other environments"
        self.same(self.run(x, state).of(slice(1)), self.run().of(slice(1)), problem)

    def check_stepwise(self) -> None:
        if not self.core.carries_over:
            zeros = self.run(state=self.core.initial_state(_BATCH))
            ones = self.run(state=self.core.initial_state(_BATCH) + 1)
            self.same(
                _Run(ones.y, zeros.state), zeros, "carries_over is False, yet a call does not start as from zeros"
            )
            return
        state, ys = self.state, []
        for x, starts in zip(self.x.split(1), self.starts.split(1), strict=True):
            y, state = self.run(x, state, starts)
            ys.append(y)
        problem = "one step at a time is not the whole unroll (set carries_over = False if that is meant)"
        self.same(_Run(torch.cat(ys), state), self.run(), problem)

    def check_reset(self) -> None:
        plain, zeros = self.run(), self.core.initial_state(_BATCH)
        env, others = slice(_RESET_ENV, _RESET_ENV + 1), slice(None, None, 2)
        for step in (0, _RESET_STEP):
            starts = self.starts.clone()
            starts[step, _RESET_ENV] = 1
            run = self.run(starts=starts)
            fresh = self.run(self.x[step:], zeros, self.starts[step:])
            problem = f"an episode start at step {step} of environment {_RESET_ENV} is not a new episode"
            self.same(run.of(env, slice(step, None)), fresh.of(env), problem)
            problem = f"an episode start in environment {_RESET_ENV} changes another environment"
            self.same(run.of(others), plain.of(others), problem)

    def check_saving(self) -> None:
        core = self.core
        saved_or_moved = {id(item) for kind in (core.parameters, core.buffers, core.modules) for item in kind()}
        for path, module in core.named_modules():
            for name, value in vars(module).items():
                if name not in _MODULE_ATTRIBUTES and any(id(item) not in saved_or_moved for item in _tensors(value)):
                    self.fail(
                        f"{f'{path}.{name}'.lstrip('.')} holds a tensor or module that is neither saved nor moved with "
                        "the core; use nn.Parameter, register_buffer, nn.ModuleList or nn.ParameterList"
                    )
        before = self.run()
        saved = {name: value.clone() for name, value in core.state_dict().items()}
        with torch.no_grad():
            for value in (*core.parameters(), *core.state_dict().values()):
                value.zero_()
        core.load_state_dict(saved)
        self.same(self.run(), before, "state_dict and load_state_dict do not restore it")

    def check_gradients(self) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # a weight that starts at zero may hide another from its gradient
            for parameter in self.core.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
        x, state = self.x.clone().requires_grad_(), self.state.clone().requires_grad_()
        y, _ = self.core(x, state, self.starts)
        weights = torch.randn(y.shape, generator=generator).to(y)
        leaves = {"the input x": x} | {
            f"the parameter {name}": parameter
            for name, parameter in self.core.named_parameters()
            if parameter.requires_grad
        }
        grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is None or not grad.count_nonzero():
                self.fail(f"no gradient of y reaches {name}")
            if not grad.isfinite().all():
                self.fail(f"the gradient of y is not finite at {name}")
        fresh = self.run(state=self.core.initial_state(_BATCH)).y[-1]
        (grad_state,) = torch.autograd.grad((y[-1] * weights[-1]).sum(), state, allow_unused=True)
        if not torch.equal(fresh, y[-1].detach()) and (grad_state is None or not grad_state.count_nonzero()):
            self.fail(
                "the last output depends on the first state, yet no gradient flows back through time (a detach?); to "
                "cut it on purpose, train with the setting bptt"
            )

    def check_float64(self) -> None:
        before = self.run()
        self.core.double()
        run = self.run(self.x.double(), self.state.double())
        tensors = {"initial_state": self.core.initial_state(1), "y": run.y, "the new state": run.state}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64:
                self.fail(f"after core.double(), {name} is {tensor.dtype}")
        self.core.to(self.dtype)
        self.same(self.run(), before, f"after core.double() and back to {self.dtype}")


def _tensors(value: Any) -> Iterator[Tensor | nn.Module]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return (item for item in items if isinstance(item, (Tensor, nn.Module)))
