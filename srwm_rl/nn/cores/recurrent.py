"""Baselines: torch's LSTM and GRU as a policy's memory."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn

from srwm_rl.nn.cores.base import Core
from srwm_rl.ops.checks import is_autocast, refuse_tracing


class SegmentedCore(Core):
    """A core around a torch module without resets: each segment between two resets runs as one fused call.

    On a GPU, where reading the resets would wait for the device, and in captured or exported graphs, every step is a
    segment.
    """

    @abstractmethod
    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run over `x` `[T, B, I]` from `state` `[L, B, S]`; no episode starts inside."""

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`. Under `torch.autocast` it computes in float32."""
        refuse_tracing("a recurrent core")
        if is_autocast(x):  # torch's LSTM in half precision needs a processor that has it
            with torch.autocast(x.device.type, enabled=False):
                return self(x.float(), state, episode_starts)  # type: ignore[no-any-return]
        starts = episode_starts != 0  # [T, B]
        readable = starts.device.type == "cpu" and not torch.compiler.is_exporting()
        resets = starts.any(dim=1).nonzero().flatten().tolist() if readable else range(x.shape[0])
        outputs = []
        for begin, end in pairwise(sorted({0, *resets, x.shape[0]})):
            y, state = self.forward_segment(x[begin:end], state.masked_fill(starts[begin, :, None], 0))
            outputs.append(y)
        return torch.cat(outputs), state


class LSTMCore(SegmentedCore):
    """A stack of LSTM layers; the state holds `h | c` per layer, `S = 2 * hidden_size`. Default sizes: as published."""

    def __init__(self, input_size: int, hidden_size: int = 256, n_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, n_layers, 2 * hidden_size)
        self.lstm = nn.LSTM(input_size, hidden_size, n_layers)

    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentedCore.forward_segment`."""
        h, c = state.chunk(2, dim=-1)  # [L, B, hidden]
        y, (h, c) = self.lstm(x, (h.contiguous(), c.contiguous()))
        return y, torch.cat((h, c), dim=-1)


class GRUCore(SegmentedCore):
    """A stack of GRU layers; the state holds `h` per layer, `S = hidden_size`."""

    def __init__(self, input_size: int, hidden_size: int = 256, n_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, n_layers, hidden_size)
        self.gru = nn.GRU(input_size, hidden_size, n_layers)

    def forward_segment(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentedCore.forward_segment`."""
        y, state = self.gru(x, state)
        return y, state
