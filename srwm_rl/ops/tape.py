"""One step of a small network as one call of C: a list of operations on rows of features, `Tape`.

Small networks spend most of an acting step between their operations, not in them. What the operations are says
csrc/srwm_cpu.c, how they are computed csrc/tape_kernel.h.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from srwm_rl.ops.cpu import Kernel

TAKE_INPUT, GIVE_OUTPUT, LINEAR, NORM, SOFTMAX, SINES, HEADS, CHOOSE = range(8)
ACTIVATIONS = ("identity", "relu", "sigmoid", "tanh")
_NUMBERS = ("kind", "activation", "first", "to", "add", "n_in", "n_out", "index")


class Rows(NamedTuple):
    """`n` features, from the row `first` on."""

    first: int
    n: int


class _Op(ctypes.Structure):
    """`Op` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("number", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class _Tape(ctypes.Structure):
    """`Tape` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "n_ops", "n_rows", "n_spare", "next", "grain")),
        *((name, ctypes.c_void_p) for name in ("ops", "inputs", "outputs", "choices", "state", "final", "starts")),
        ("level", ctypes.c_int),
        ("failed", ctypes.c_int),
    )


class Tape:
    """Write down what a network does in one step, then do it with `run`.

    Every method but `run` appends an operation and returns the rows it fills. Weights are read where they are each time
    it runs: they must be float32, contiguous and on the CPU, and are kept alive.

    Args:
        kernel: the loaded C library.

    Attributes:
        weights: the tensors that the tape reads.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.weights: list[Tensor] = []
        self._ops: ctypes.Array[_Op] = (_Op * 0)()
        self._inputs: list[int] = []  # their widths
        self._outputs: list[int] = []
        self._n_rows = self._n_spare = self._n_states = self._state_size = 0

    def input(self, width: int) -> Rows:
        """Take the next input, `[B, width]`."""
        self._inputs.append(width)
        return self._append(TAKE_INPUT, self._new(width), n_out=width, index=len(self._inputs) - 1)

    def output(self, rows: Rows) -> None:
        """Give rows away as the next output, `[B, n]`."""
        self._outputs.append(rows.n)
        self._append(GIVE_OUTPUT, rows, first=rows.first, n_in=rows.n, index=len(self._outputs) - 1)

    def linear(
        self, rows: Rows, weight: Tensor, bias: Tensor | None, activation: str = "identity", add: Rows | None = None
    ) -> Rows:
        """Append `activation(weight x + bias) + add`; `weight` `[n_out, n_in]`, `bias` `[n_out]`."""
        n_out, n_in = weight.shape
        assert n_in == rows.n, "the weight does not fit the rows"
        return self._append(
            LINEAR,
            self._new(n_out),
            first=rows.first,
            activation=ACTIVATIONS.index(activation),
            add=-1 if add is None else add.first,
            n_in=n_in,
            n_out=n_out,
            weight=self._pointer(weight),
            bias=None if bias is None else self._pointer(bias),
        )

    def layer_norm(self, rows: Rows, weight: Tensor, bias: Tensor, eps: float) -> Rows:
        """Append a layer norm over all the rows; `weight` and `bias` `[n]`."""
        pointers = {"weight": self._pointer(weight), "bias": self._pointer(bias)}
        return self._append(NORM, self._new(rows.n), first=rows.first, n_in=rows.n, number=eps, **pointers)

    def softmax(self, rows: Rows, group: int) -> Rows:
        """Append a softmax within every `group` of the rows."""
        return self._append(SOFTMAX, self._new(rows.n), first=rows.first, n_in=rows.n, n_out=group)

    def sines(self, rows: Rows, periods: Tensor) -> Rows:
        """Append the sines, then the cosines, of one row by its `periods` `[n]`: 2n rows."""
        n = len(periods)
        new = self._new(2 * n)
        return self._append(SINES, new, first=rows.first, n_out=n, weight=self._pointer(periods))

    def heads(self, rows: Rows, weight: Tensor, retention: Rows | None = None, bound: float | None = None) -> Rows:
        """Append one step of self-modifying heads, the next layer of the state; `weight` `[H, D, 3D+4]`."""
        n_heads, size, columns = weight.shape
        assert rows.n == n_heads * size, "the heads do not fit the rows"
        self._n_states += 1
        self._state_size = rows.n * columns
        self._n_spare = max(self._n_spare, 2 * rows.n + n_heads)
        return self._append(
            HEADS,
            self._new(rows.n),
            first=rows.first,
            add=-1 if retention is None else retention.first,
            n_in=rows.n,
            n_out=n_heads,
            index=self._n_states - 1,
            number=bound or 0.0,
            weight=self._pointer(weight),
        )

    def choose(self, logits: Rows, clocks: Rows) -> None:
        """Choose by logits: of exponential `clocks` run at the choices' rates, the first; log p is the next output."""
        self._outputs.append(1)
        self._append(
            CHOOSE, logits, first=logits.first, add=clocks.first, n_in=logits.n, index=len(self._outputs) - 1
        )

    def run(
        self, inputs: list[Tensor], state: Tensor, episode_starts: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Do it all once.

        Args:
            inputs: `[B, width]` each, float32.
            state: of the layers of heads, `[L, B, S]`.
            episode_starts: `[B]`.

        Returns:
            The outputs, `[B, n]` each; the choices, int64 `[B]`; the new state.

        Raises:
            MemoryError: no room for the tile.
        """
        batch = len(episode_starts)
        given = [each.contiguous() for each in inputs]
        state, starts = state.contiguous(), episode_starts.ne(0)
        assert [each.numel() for each in given] == [width * batch for width in self._inputs], "not the tape's inputs"
        assert state.shape == (self._n_states, batch, self._state_size), "not the tape's state"
        outputs = [torch.empty(batch, width) for width in self._outputs]
        choices, final = torch.empty(batch, dtype=torch.int64), torch.empty_like(state)
        from_, to = _pointers(given), _pointers(outputs)
        tape = _Tape(
            batch,
            len(self._ops),
            self._n_rows,
            self._n_spare,
            ops=ctypes.addressof(self._ops),
            inputs=ctypes.addressof(from_),
            outputs=ctypes.addressof(to),
            choices=choices.data_ptr(),
            state=state.data_ptr(),
            final=final.data_ptr(),
            starts=starts.data_ptr(),
        )
        kernel = self.kernel
        if kernel.library.srwm_cpu_play(ctypes.byref(tape), kernel.level, torch.get_num_threads(), kernel.parallel):
            raise MemoryError("no memory for the C kernel's work space")
        return outputs, choices, final

    def _new(self, n: int) -> Rows:
        rows = Rows(self._n_rows, n)
        self._n_rows += n
        return rows

    def _pointer(self, weight: Tensor) -> int:
        assert weight.is_contiguous() and weight.dtype == torch.float32 and weight.device.type == "cpu"
        self.weights.append(weight)
        return weight.data_ptr()

    def _append(self, kind: int, rows: Rows, **fields: int | float | None) -> Rows:
        op = _Op(kind=kind, to=rows.first, **{"add": -1, **fields})
        self._ops = (_Op * (len(self._ops) + 1))(*self._ops, op)
        return rows


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))
