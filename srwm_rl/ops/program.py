"""The row-wise parts of a small network as one call of C, forward and backward: a list of operations, `Program`.

Small networks spend most of a step between their operations, not in them. csrc/srwm_cpu.c defines the operations,
csrc/program_kernel.h computes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.checks import check_float32
from srwm_rl.ops.cpu import Kernel, n_threads

INPUT, OUTPUT, LINEAR, NORM, SOFTMAX, LOG_PROB_AND_ENTROPY, PPO_LOSS, SINES, HEADS, SAMPLE, SHORT_CONV = range(11)
TERMS = 5  # of PPO's loss: policy loss, value loss, entropy, approximate KL divergence, clipped ratios
ACTIVATIONS = ("identity", "relu", "sigmoid", "tanh")
_LANES = 16  # LANES in csrc/srwm_cpu.c
_NUMBERS = ("kind", "activation", "first", "to", "add", "n_in", "n_out", "index")
_INDICES = ("is_leaf", "weight_index", "bias_index")
_COUNTS = ("B", "n_ops", "n_features", "n_scratch", "n_sums", "n_shares", "next", "grain", "state_size")
_POINTERS = ("ops", "inputs", "outputs", "actions", "state", "final", "starts")
_PPO_LOSS = ("clip_range", "clip_range_vf", "vf_coef", "ent_coef", "scale")
_BACK = ("grad_outputs", "grad_inputs", "grad_weights", "sums", "loss_params", "terms")


class Features(NamedTuple):
    """The features `first` to `first + n` of every row."""

    first: int
    n: int


class _Op(ctypes.Structure):
    """`Op` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (*_NUMBERS, *_INDICES)),
        ("number", ctypes.c_float),
        ("sums", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class PPOLossParams(ctypes.Structure):
    """`PPOLossParams` of csrc/srwm_cpu.c: the settings of PPO's loss.

    The gradient is that of `(policy loss + vf_coef * value loss - ent_coef * entropy) * scale`, each summed over rows.

    Attributes:
        clip_range: bounds the probability ratio to `1 +- clip_range`.
        clip_range_vf: bounds the change of a value; below 0: unbounded.
    """

    _fields_ = tuple((name, ctypes.c_float) for name in _PPO_LOSS)


class _Program(ctypes.Structure):
    """`Program` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_BACK)),
        ("level", ctypes.c_int),
        ("failed", ctypes.c_int),
    )


class Program:
    """A list of operations on the features of a row, run for many rows by `run`, or by `step` for an acting step.

    `input`, `linear` and so on append an operation and return its output features. Weights are not copied: they must be
    float32, contiguous and on the CPU.

    Attributes:
        weights: all tensors that the program reads.
        trainable: those of them that get a gradient, in the order of the operations.
        input_needs_grad: for each input, whether it gets a gradient.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.weights: list[Tensor] = []
        self.trainable: list[Tensor] = []
        self._ops: ctypes.Array[_Op] = (_Op * 0)()
        self.input_needs_grad: list[bool] = []
        self._inputs: list[int] = []  # their widths
        self._outputs: list[int] = []
        self._needs_grad: list[bool] = []
        self._n_states = self._state_size = self._n_conv_inputs = self._n_scratch = self._n_sums = 0

    def input(self, width: int, needs_grad: bool = False) -> Features:
        """Append the next input, `[B, width]`; `needs_grad`: with a gradient."""
        self._inputs.append(width)
        self.input_needs_grad.append(needs_grad)
        new = self._new(width, needs_grad)
        return self._append(INPUT, new, n_out=width, index=len(self._inputs) - 1)

    def output(self, x: Features) -> None:
        """Make features the next output, `[B, n]`."""
        self._outputs.append(x.n)
        self._n_scratch = max(self._n_scratch, x.n)
        self._append(OUTPUT, x, first=x.first, n_in=x.n, index=len(self._outputs) - 1)

    def linear(
        self,
        x: Features,
        weight: Tensor,
        bias: Tensor | None,
        activation: str = "identity",
        add: Features | None = None,
    ) -> Features:
        """Append `activation(weight x + bias + add)`; `weight` `[n_out, n_in]`, `bias` `[n_out]`."""
        n_out, n_in = weight.shape
        padded = -(-n_in // _LANES) * _LANES
        self._n_scratch = max(self._n_scratch, padded)
        return self._append(
            LINEAR,
            self._new(n_out, True),
            first=x.first,
            activation=ACTIVATIONS.index(activation),
            add=-1 if add is None else add.first,
            n_in=n_in,
            n_out=n_out,
            is_leaf=not any(self._needs_grad[x.first : x.first + x.n]),
            sums=self._new_sums(n_out * padded + n_out * _LANES),
            **self._trainable((n_out, x.n), weight, bias),
        )

    def layer_norm(self, x: Features, weight: Tensor, bias: Tensor, eps: float) -> Features:
        """Append a layer norm over all the features; `weight` and `bias` `[n]`."""
        new = self._new(x.n, True)
        self._new(2, False)  # mean and inverse deviation
        sums = self._new_sums(2 * x.n * _LANES)
        weights = self._trainable((x.n,), weight, bias)
        return self._append(NORM, new, first=x.first, n_in=x.n, number=eps, sums=sums, **weights)

    def softmax(self, x: Features, group: int) -> Features:
        """Append a softmax within every `group` of the features."""
        return self._append(SOFTMAX, self._new(x.n, True), first=x.first, n_in=x.n, n_out=group)

    def log_prob_and_entropy(self, logits: Features, action: Features) -> Features:
        """Append the log-probability of an action, one feature that counts from 0, and the entropy in nats."""
        new = self._new(2, True)
        self._new(1, False)  # logsumexp
        return self._append(LOG_PROB_AND_ENTROPY, new, first=logits.first, add=action.first, n_in=logits.n)

    def ppo_loss(self, action_stats: Features, value: Features) -> None:
        """End with PPO's loss (Schulman et al., 2017, eq. 7, https://arxiv.org/abs/1707.06347); see `loss_and_grad`.

        Appends four inputs of width 1: the log-probability, advantage, return and value of the rollout.
        """
        log_prob, *_ = [self.input(1) for _ in range(4)]
        self._n_scratch = max(self._n_scratch, TERMS)
        sums = self._new_sums(TERMS * _LANES)
        self._append(PPO_LOSS, log_prob, first=action_stats.first, add=value.first, sums=sums)

    def sines(self, x: Features, periods: Tensor) -> Features:
        """Append the sines, then the cosines, of one feature by its `periods` `[n]`: 2n features, without gradient."""
        n = len(periods)
        return self._append(SINES, self._new(2 * n, False), first=x.first, n_out=n, weight=self._pointer(periods, (n,)))

    def heads(
        self, x: Features, weight: Tensor, retention: Features | None = None, bound: float | None = None
    ) -> Features:
        """Append one step of self-modifying heads, the next layer of the state; `weight` `[H, D, 3D+4]`.

        As `srwm_rl.ops.srwm_scan` for one step; without gradient.
        """
        n_heads, size, columns = weight.shape
        if x.n != n_heads * size:
            raise ValueError(f"weight {list(weight.shape)} does not fit {x.n} features")
        self._n_states += 1
        self._state_size = x.n * columns
        self._n_scratch = max(self._n_scratch, 2 * x.n + n_heads)
        return self._append(
            HEADS,
            self._new(x.n, False),
            first=x.first,
            add=-1 if retention is None else retention.first,
            n_in=x.n,
            n_out=n_heads,
            index=self._n_states - 1,
            number=bound or 0.0,
            weight=self._pointer(weight, (n_heads, size, columns)),
        )

    def short_conv(self, x: Features, weight: Tensor, offset: int) -> Features:
        """Append one step of `srwm_rl.ops.short_conv`; `weight` `[W, n]`, without gradient.

        Its earlier inputs `[W - 1, n]` are numbers `offset` on of the first layer's state, behind that of the heads.
        """
        width, n = weight.shape
        self._n_conv_inputs = (width - 1) * n
        self._n_scratch = max(self._n_scratch, 2 * n)
        pointer = self._pointer(weight, (width, x.n))
        fields = {"first": x.first, "n_in": n, "n_out": width, "index": offset, "weight": pointer}
        return self._append(SHORT_CONV, self._new(n, False), **fields)

    def sample(self, logits: Features, exp_noise: Features) -> None:
        """Sample an action, `argmax(log p - log exp_noise)`; its log-probability is the next output."""
        self._outputs.append(1)
        index = len(self._outputs) - 1
        self._append(SAMPLE, logits, first=logits.first, add=exp_noise.first, n_in=logits.n, index=index)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map inputs `[B, width]` to outputs `[B, n]`, differentiable by weights and inputs, without `heads`."""
        outputs: tuple[Tensor, ...] = _Run.apply(self, len(inputs), *inputs, *self.trainable)
        return outputs

    def step(
        self, inputs: Sequence[Tensor], state: Tensor, episode_starts: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run an acting step for B environments, without gradients.

        `inputs` are `[B, width]`, `state` is `[L, B, S]` of the layers with heads, `episode_starts` `[B]`. Returns the
        outputs `[B, n]`, the actions, int64 `[B]`, and the new state.
        """
        size = self._state_size + self._n_conv_inputs
        check_float32("state", state, (self._n_states, len(inputs[0]), size))
        if episode_starts.shape != inputs[0].shape[:1] or episode_starts.device.type != "cpu":
            raise ValueError(f"episode_starts must be [{len(inputs[0])}] on the CPU, not {list(episode_starts.shape)}")
        state = state.contiguous()
        starts = episode_starts.contiguous() if episode_starts.dtype == torch.bool else episode_starts.ne(0)
        actions, final = state.new_empty(len(starts), dtype=torch.int64), torch.empty_like(state)
        memory = {"actions": actions, "state": state, "final": final, "starts": starts}
        outputs = self.forward(inputs, **{name: tensor.data_ptr() for name, tensor in memory.items()})
        return outputs, actions, final

    def forward(self, inputs: Sequence[Tensor], **pointers: int) -> list[Tensor]:
        """Run the kernel forward; return the outputs, `[B, n]` each."""
        outputs = [inputs[0].new_empty(inputs[0].shape[0], width) for width in self._outputs]
        output_pointers = _pointers(outputs)
        self._call("srwm_cpu_program_forward", inputs, outputs=ctypes.addressof(output_pointers), **pointers)
        return outputs

    def loss_and_grad(
        self, inputs: Sequence[Tensor], params: PPOLossParams, grad_weights: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Run a program that ends with PPO's loss, forward and backward; see `backward`.

        Returns the gradients of the inputs by `input_needs_grad`, and the loss's terms, sums over rows, `[TERMS]`.
        """
        if self._outputs:
            raise ValueError("a program with a loss has no outputs")
        terms = inputs[0].new_zeros(TERMS)
        pointers = {"loss_params": ctypes.addressof(params), "terms": terms.data_ptr()}
        return self.backward(inputs, (), self.input_needs_grad, grad_weights, **pointers), terms

    def backward(
        self,
        inputs: Sequence[Tensor],
        grad_outputs: Sequence[Tensor | None],
        needs_grad: Sequence[bool],
        grad_weights: Sequence[Tensor],
        **pointers: int,
    ) -> list[Tensor | None]:
        """Run the kernel forward and backward; return the gradients of the inputs that need one.

        The gradients of the weights are written to `grad_weights`, contiguous, in the order of `trainable`.
        """
        grads = [None if grad is None else grad.contiguous() for grad in grad_outputs]
        grad_inputs = [x.new_empty(x.shape) if want else None for x, want in zip(inputs, needs_grad, strict=True)]
        lists = {"grad_outputs": grads, "grad_inputs": grad_inputs, "grad_weights": grad_weights}
        arrays = {name: _pointers(tensors) for name, tensors in lists.items()}
        addresses = {name: ctypes.addressof(array) for name, array in arrays.items()}
        self._call("srwm_cpu_program_backward", inputs, **addresses, **pointers)
        return grad_inputs

    def _call(self, function: str, inputs: Sequence[Tensor], **pointers: int) -> None:
        batch = inputs[0].shape[0]
        for x, width in zip(inputs, self._inputs, strict=True):
            check_float32("input", x, (batch, width))
        packed = [x.contiguous() for x in inputs]
        input_pointers = _pointers(packed)
        numbers = (batch, len(self._ops), len(self._needs_grad), self._n_scratch, self._n_sums)
        state_size = self._state_size + self._n_conv_inputs
        program = _Program(
            *numbers,
            state_size=state_size,
            ops=ctypes.addressof(self._ops),
            inputs=ctypes.addressof(input_pointers),
            **pointers,
        )
        kernel = self.kernel
        call = getattr(kernel.library, function)
        if call(ctypes.byref(program), kernel.level, n_threads(), kernel.parallel):
            raise MemoryError("no memory for the C kernel's work space")

    def _new(self, n: int, needs_grad: bool) -> Features:
        new = Features(len(self._needs_grad), n)
        self._needs_grad += [needs_grad] * n
        return new

    def _new_sums(self, n: int) -> int:
        self._n_sums += n
        return self._n_sums - n

    def _pointer(self, weight: Tensor, shape: tuple[int, ...], name: str = "weight") -> int:
        check_float32(name, weight, shape)
        if not weight.is_contiguous():
            raise ValueError(f"{name} {list(shape)} must be contiguous")
        self.weights.append(weight)
        return weight.data_ptr()

    def _trainable(self, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> dict[str, int | None]:
        fields: dict[str, int | None] = {}
        for name, tensor, size in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if tensor is not None:
                fields |= {name: self._pointer(tensor, size, name), f"{name}_index": len(self.trainable)}
                self.trainable.append(tensor)
        return fields

    def _append(self, kind: int, new: Features, **fields: int | float | None) -> Features:
        op = _Op(kind=kind, to=new.first, **{"add": -1, "weight_index": -1, "bias_index": -1, **fields})
        self._ops = (_Op * (len(self._ops) + 1))(*self._ops, op)
        return new


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.program, ctx.n_inputs = program, n_inputs
        ctx.save_for_backward(*tensors)  # the weights too: torch then detects changes before backward
        ctx.set_materialize_grads(False)
        return tuple(program.forward(tensors[:n_inputs]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[: ctx.n_inputs]
        needs_grad = ctx.needs_input_grad[2 : 2 + ctx.n_inputs]
        grad_weights = [torch.empty_like(weight) for weight in ctx.program.trainable]
        grad_inputs = ctx.program.backward(inputs, grad_outputs, needs_grad, grad_weights)
        return None, None, *grad_inputs, *grad_weights


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
