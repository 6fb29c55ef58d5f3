"""The CNNs of few-shot learning: Conv-4 and ResNet-12, with batch normalisation, on uint8 frames."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from srwm_rl.errors import UserError


class FewShotCNN(nn.Module):
    """Blocks of convolutions, each followed by pooling; `[N, *shape]` to `[N, n_features]`.

    Batch normalisation uses the statistics of the batch in training mode, and running ones in evaluation mode.

    Args:
        shape: the observation space's shape, `(h, w, C)` or `(C, h, w)`.
        channels_first: whether `shape` is `(C, h, w)`.
        channels: width of each block.
        dropout: probability with which activations are dropped in training.
        scale: factor on the pixels.
        precision: of the convolutions, "float32" or "bfloat16"; weights, gradients and output are float32 either way.
        standardize: batch-normalise the output, without trained factors: features of mean 0 and variance 1. Rectified
            ones have a large mean in common, which a memory would have to learn to subtract.

    Raises:
        UserError: a probability or a precision out of range, or frames too small to be halved by every block.
    """

    title: str
    n_features: int
    blocks: nn.Sequential
    end: nn.Module

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...],
        dropout: float = 0.0,
        scale: float = 1 / 255,
        precision: str = "float32",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"the encoder's precision must be one of float32, bfloat16, not {precision!r}")
        if not 0 <= dropout < 1:
            raise UserError(f"the encoder's dropout must lie in [0, 1), not {dropout!r}")
        self.precision, self.scale, self.channels_first, self.dropout = precision, scale, channels_first, dropout
        self.channels, self.standardize = tuple(channels), standardize
        self.size = shape[1:] if channels_first else shape[:2]
        if min(self.size) < 2 ** len(channels):
            raise UserError(
                f"{self.title} halves frames {len(channels)} times: give frames of at least {2 ** len(channels)} "
                f"pixels a side, not {self.size[0]} x {self.size[1]}"
            )

    def describe(self) -> str:
        """Return the kind, the blocks' widths and the precision, such as "Conv-4 32/32/32/32 in bfloat16"."""
        return f"{self.title} {'/'.join(map(str, self.channels))} in {self.precision}"

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames `[N, *shape]` of any number type to `[N, n_features]`."""
        x = frames if self.channels_first else frames.permute(0, 3, 1, 2)
        weight = next(self.parameters())
        x = x.to(weight.dtype, memory_format=torch.channels_last) * self.scale
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.blocks(x)
        result: Tensor = self.end(features.flatten(1).to(weight.dtype))
        return result

    def _finish(self, n_features: int) -> None:
        """Set the output's width and normalisation, and the memory layout of all weights."""
        self.n_features = n_features
        self.end = nn.BatchNorm1d(n_features, affine=False) if self.standardize else nn.Identity()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Conv4(FewShotCNN):
    """Four blocks of convolution, batch normalisation, pooling and ReLU (Vinyals et al., 2016,
    https://arxiv.org/abs/1606.04080, section 4.1).

    Args:
        shape: see `FewShotCNN`.
        channels_first: see `FewShotCNN`.
        channels: width of each block.
        first_stride: stride of the first convolution; 2: in place of its block's pooling, at a quarter of its time.

    The others are those of `FewShotCNN`.
    """

    title = "Conv-4"

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...] = (64, 64, 64, 64),
        first_stride: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(shape, channels_first, channels, **settings)
        if first_stride not in (1, 2):
            raise UserError(f"the encoder's first_stride must be 1 or 2, not {first_stride!r}")
        self.first_stride = first_stride
        depth, blocks = shape[0] if channels_first else shape[2], []
        for i, out in enumerate(self.channels):
            stride = first_stride if i == 0 else 1
            layers = [
                nn.Conv2d(depth, out, 3, stride, padding=1),
                nn.BatchNorm2d(out),
                nn.MaxPool2d(2) if stride == 1 else nn.Identity(),
                nn.Dropout(self.dropout),
                nn.ReLU(),
            ]
            blocks.append(nn.Sequential(*layers))
            depth = out
        self.blocks = nn.Sequential(*blocks)
        height, width = self.size
        if first_stride == 2:
            height, width = height + height % 2, width + width % 2  # a strided convolution rounds up, pooling down
        self._finish(depth * math.prod(side // 2 ** len(self.channels) for side in (height, width)))


class ResNet12Block(nn.Module):
    """Three convolutions beside a shortcut, then pooling; `[N, C, h, w]` to `[N, out, h // 2, w // 2]`."""

    def __init__(self, channels: int, out: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(out if i else channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
            layers += [nn.LeakyReLU(0.1)] if i < 2 else []
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, h, w]` to `[N, out, h // 2, w // 2]`."""
        y: Tensor = self.end(self.convolutions(x) + self.shortcut(x))
        return y


class ResNet12(FewShotCNN):
    """Four residual blocks of three convolutions, then the mean over all places: `[N, *shape]` to `[N, channels[-1]]`.

    Args:
        shape: see `FewShotCNN`.
        channels_first: see `FewShotCNN`.
        channels: width of each block.

    The others are those of `FewShotCNN`.
    """

    title = "ResNet-12"

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...] = (64, 96, 128, 256),
        **settings: Any,
    ) -> None:
        super().__init__(shape, channels_first, channels, **settings)
        depth, blocks = shape[0] if channels_first else shape[2], list[nn.Module]()
        for out in self.channels:
            blocks.append(ResNet12Block(depth, out, self.dropout))
            depth = out
        self.blocks = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        self._finish(depth)
