"""The LSTM as a policy's memory, the usual yardstick."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from srwm_rl.cores.base import Core


class LSTMCore(Core):
    """A stack of LSTM layers; the state holds `h | c` per layer, `S = 2 * hidden_size`.

    Args:
        input_size: I.
        hidden_size: width of each layer and of the output; the published baseline has 256.
        n_layers: L.
    """

    def __init__(self, input_size: int, hidden_size: int = 256, n_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, n_layers, 2 * hidden_size)
        self.lstm = nn.LSTM(input_size, hidden_size, n_layers)

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`. Stretches without a reset run as one fused call."""
        keep = (episode_starts == 0).to(x.dtype)  # [T, B]
        resets = (keep == 0).any(dim=1).nonzero().flatten().tolist()
        bounds = sorted({0, *resets, x.shape[0]})
        h, c = state.chunk(2, dim=-1)  # [L, B, hidden]
        outputs = []
        for start, stop in pairwise(bounds):
            mask = keep[start, :, None]
            y, (h, c) = self.lstm(x[start:stop], ((h * mask).contiguous(), (c * mask).contiguous()))
            outputs.append(y)
        return torch.cat(outputs), torch.cat((h, c), dim=-1)
