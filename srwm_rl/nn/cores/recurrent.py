"""Baselines: torch's LSTM and GRU as a policy's memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from srwm_rl.nn.cores.base import Core
from srwm_rl.ops.checks import has_memory, is_autocast, refuse_tracing


def saturated(dtype: torch.dtype) -> float:
    """Return a gate's input of which the sigmoid is 1, or 0 if it is negative, whatever is added to it."""
    return min(1e30, torch.finfo(dtype).max / 4)  # float16 ends at 65504


class RecurrentCore(Core):
    """A core around a torch module that knows no resets.

    On a CPU an unroll is one fused call per layer: before an episode that begins inside it, a step is inserted that
    sets the state to 0. Where all environments' episodes begin together, each segment between two resets is a call;
    on a GPU, where reading the resets would wait for the device, and in recorded graphs, each step is.
    """

    @abstractmethod
    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run over `x` `[T, B, I]` from `state` `[L, B, S]`; no episode starts inside."""

    @abstractmethod
    def forward_layer(self, layer: int, x: Tensor, flags: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one layer over `x` `[T, B, I]` from `state` `[1, B, S]`.

        Args:
            layer: its index.
            x: its input; 0 in steps that are inserted.
            flags: `[T, B, 2]`: 1 in steps that set the state to 0, and in steps behind the unroll's end.
            state: before the first step.

        Returns:
            The output `[T, B, hidden_size]`, and `[1, B, S - hidden_size]`: what else the state holds after the last
            step that is not behind the unroll's end.
        """

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`. Under `torch.autocast` it computes in float32."""
        refuse_tracing("a recurrent core")
        if is_autocast(x):  # torch's LSTM in half precision needs a processor that has it
            with torch.autocast(x.device.type, enabled=False):
                return self(x.float(), state, episode_starts)  # type: ignore[no-any-return]
        starts = episode_starts != 0  # [T, B]
        state = state.masked_fill(starts[0, :, None], 0)
        compiling, exporting = torch.compiler.is_compiling(), torch.compiler.is_exporting()
        if starts.device.type != "cpu" or exporting or not (compiling or has_memory(starts)):
            return self._by_segments(x, state, starts, range(1, len(x)))
        later = starts[1:]
        resets = [t + 1 for t in later.any(dim=1).nonzero().flatten().tolist()]
        if resets and len(resets) > int(later.sum(dim=0).max()):
            y, final = self._with_inserted_steps(x, state, later)
            if final.isfinite().all():  # else a NaN may have passed a closed gate, which multiplies it by 0
                return y, final
        return self._by_segments(x, state, starts, resets)

    def _by_segments(self, x: Tensor, state: Tensor, starts: Tensor, resets: Iterable[int]) -> tuple[Tensor, Tensor]:
        outputs = []
        for begin, end in pairwise([0, *resets, len(x)]):
            if begin:
                state = state.masked_fill(starts[begin, :, None], 0)
            y, state = self.forward_segment(x[begin:end], state)
            outputs.append(y)
        return torch.cat(outputs), state

    def _with_inserted_steps(self, x: Tensor, state: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Run over `x` `[T, B, I]`; `later` `[T - 1, B]`: whether an episode starts at steps 1 to T - 1."""
        n_steps, batch, width = x.shape
        columns = torch.arange(batch)
        position = torch.arange(n_steps)[:, None].repeat(1, batch)  # [T, B], of the unroll's steps among all
        position[1:] += later.cumsum(dim=0)
        ends = position[-1] + 1
        total = int(ends.max())
        source = torch.full((total, batch), n_steps * batch)  # [total, B], rows of `x`; behind its end: zeros
        source[position, columns] = torch.arange(n_steps * batch).view(n_steps, batch)
        behind = torch.arange(total)[:, None] >= ends
        flags = torch.stack(((source == n_steps * batch) & ~behind, behind), dim=-1).to(x.dtype)
        y = torch.cat((x.flatten(0, 1), x.new_zeros(1, width))).index_select(0, source.flatten())
        y = y.view(total, batch, width)
        states = []
        for layer in range(self.state_layers):
            y, memory = self.forward_layer(layer, y, flags, state[layer : layer + 1])
            states.append(torch.cat((y[ends - 1, columns][None], memory), dim=-1))
        rows = (position * batch + columns).flatten()
        return y.flatten(0, 1).index_select(0, rows).view(n_steps, batch, -1), torch.cat(states)


class LSTMCore(RecurrentCore):
    """A stack of LSTM layers; the state holds `h | c` per layer, `S = 2 * hidden_size`. Default sizes: as published."""

    def __init__(self, input_size: int, hidden_size: int = 256, n_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, n_layers, 2 * hidden_size)
        self.lstm = nn.LSTM(input_size, hidden_size, n_layers)

    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentCore.forward_segment`."""
        h, c = state.chunk(2, dim=-1)  # [L, B, hidden]
        y, (h, c) = self.lstm(x, (h.contiguous(), c.contiguous()))
        return y, torch.cat((h, c), dim=-1)

    def forward_layer(self, layer: int, x: Tensor, flags: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentCore.forward_layer`."""
        weight, *others = self.lstm.all_weights[layer]
        # Of the input, forget, cell and output gates, in torch's order: a reset closes three, a hold keeps the cell.
        gates = weight.new_tensor([[-1, -1, 0, -1], [-1, 1, 0, 0]]) * saturated(weight.dtype)
        weights = [torch.cat((weight, gates.t().repeat_interleave(self.output_size, dim=0)), dim=1), *others]
        h, c = state.chunk(2, dim=-1)
        initial = (h.contiguous(), c.contiguous())
        y, _, c = torch.lstm(torch.cat((x, flags), dim=-1), initial, weights, True, 1, 0.0, self.training, False, False)
        return y, c


class GRUCore(RecurrentCore):
    """A stack of GRU layers; the state holds `h` per layer, `S = hidden_size`."""

    def __init__(self, input_size: int, hidden_size: int = 256, n_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, n_layers, hidden_size)
        self.gru = nn.GRU(input_size, hidden_size, n_layers)

    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentCore.forward_segment`."""
        y, state = self.gru(x, state)
        return y, state

    def forward_layer(self, layer: int, x: Tensor, flags: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentCore.forward_layer`; the output is the whole state."""
        weight, recurrent, bias, recurrent_bias = self.gru.all_weights[layer]
        # Closed reset and update gates, and a new state of tanh(0): the input's bias is subtracted again.
        closed = bias.new_full((2 * self.output_size,), -saturated(bias.dtype))
        reset = torch.cat((closed, -bias[2 * self.output_size :]))
        weights = [torch.cat((weight, reset[:, None]), dim=1), recurrent, bias, recurrent_bias]
        x = torch.cat((x, flags[..., :1]), dim=-1)
        y, _ = torch.gru(x, state, weights, True, 1, 0.0, self.training, False, False)
        return y, state[..., :0]
