"""The CNNs of frames: the IMPALA paper's ResNet and DQN's three convolutions, in float32 or bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from srwm_rl.errors import UserError
from srwm_rl.ops import cnn, cpu_cnn
from srwm_rl.ops.max_pool import max_pool
from srwm_rl.ops.thread_parallel import parallel_batch

MIN_FRAMES_PER_THREAD = 24  # fewer are not worth a thread
PRECISIONS = ("float32", "bfloat16")
# How a CNN runs on a GPU: operation by operation, or with fused ones (`srwm_rl.ops.cnn`), frames being padded with
# channels of zeros to a multiple of this number.
KERNELS = {"plain": 1, "fused": 1, "fused4": 4, "fused8": 8}
# On a CPU the whole CNN in C (`srwm_rl.ops.cpu_cnn`): on matrix tiles, or on the processor's vectors.
IN_C = {"bfloat16": "tiles", "float32": "vectors"}


def fastest_precision(device: torch.device | str) -> str:
    """Return the precision in which a CNN runs fastest: "bfloat16" where the hardware multiplies it, else "float32"."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # AVX512-BF16 or AMX; without them it is emulated
    return "bfloat16" if supported else "float32"


def micro_batch_for(precision: str) -> int:
    """Return about how many frames one CPU thread computes at once (measured: docs/results).

    A pass has a fixed cost, for converting weights and starting operations. With matrix tiles (AMX) it equals that of
    ten frames; without, larger micro-batches outgrow the caches before they save time.
    """
    return 128 if precision == "bfloat16" and torch.cpu._is_amx_tile_supported() else 64


class Conv(nn.Conv2d):
    """A convolution that computes in its input's type; the weights stay float32, and so do their gradients."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Map `[N, C_in, h, w]` to `[N, C_out, h', w']`, the input multiplied by `scale`."""
        weight = self.weight if scale == 1.0 else self.weight * scale  # cheaper than scaling the frames
        assert self.bias is not None
        return F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)

    def fused(
        self,
        weight: Tensor,
        x: Tensor,
        skip: Tensor | None = None,
        total: bool = False,
        relu: bool = True,
        pool: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return `cnn.epilogue` of the convolution of `x` with `weight`, max-pooled if `pool`."""
        y = F.conv2d(x, weight, None, self.stride, self.padding)
        assert self.bias is not None
        # A bias is the same for all of a window: adding it after pooling is four times less work.
        return cnn.epilogue(cnn.max_pool(y) if pool else y, self.bias, skip, total, relu)


FusedConv = Callable[..., tuple[Tensor, Tensor]]


class MaxPool(nn.Module):
    """Max pooling, 3 x 3 with stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, h, w]` to `[N, C, ceil(h / 2), ceil(w / 2)]`."""
        return max_pool(x)


class ResidualBlock(nn.Module):
    """`x + conv(relu(conv(relu(x))))` at constant width; `[N, C, h, w]` to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = Conv(channels, channels), Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, h, w]` to `[N, C, h, w]`."""
        inner: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + inner


class ImpalaCNN(nn.Module):
    """The IMPALA paper's ResNet (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561, figure 3) on uint8 frames.

    On a CPU each thread converts and encodes one micro-batch at a time.

    Args:
        shape: the observation space's shape, `(h, w, C)` or `(C, h, w)`.
        channels_first: whether `shape` is `(C, h, w)`.
        channels: width of each stage; each halves height and width.
        features: width of the output.
        micro_batch: about how many frames a CPU thread computes at once; None: `micro_batch_for`.
        scale: factor on the pixels.
        precision: of the arithmetic, "float32" or "bfloat16"; weights, gradients and output are float32 either way.

    Attributes:
        shape, depth: of a frame, and its number of channels.
        kernels: how it runs: "plain", on a GPU another key of `KERNELS`, on a CPU `IN_C` of its precision, or "auto":
            on a CPU in C where that is faster (`cpu_cnn.is_faster`), else plain. The results are the same up to
            rounding. Where the hardware does not have them, operation by operation.

    Raises:
        UserError: an unknown precision.
    """

    title = "IMPALA CNN"
    kernels: str = "auto"

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...] = (16, 32, 32),
        features: int = 256,
        micro_batch: int | None = None,
        scale: float = 1 / 255,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(f"the encoder's precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.precision = precision
        self.channels_first, self.scale = channels_first, scale
        self.micro_batch = micro_batch or micro_batch_for(precision)
        size, self.depth = (shape[1:], shape[0]) if channels_first else (shape[:2], shape[2])
        self.shape = tuple(shape)
        stages, n_outputs = self._make_stages(size[0], size[1], self.depth, channels)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(n_outputs, features)
        self.n_features = features
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _make_stages(
        self, height: int, width: int, depth: int, channels: tuple[int, ...]
    ) -> tuple[list[nn.Module], int]:
        """Return the layers before the linear one, and the number of their outputs for a frame."""
        stages: list[nn.Module] = []
        for out in channels:
            stages += [Conv(depth, out), MaxPool(), ResidualBlock(out), ResidualBlock(out)]
            depth, width, height = out, (width + 1) // 2, (height + 1) // 2
        return stages, depth * width * height

    @property
    def activation_bytes(self) -> int:
        """About the bytes that a frame's activations take in training: 1 MiB for the published CNN in bfloat16.

        By the numbers of the first convolution: 64 x 64 x 16 in the published CNN.
        """
        first = self.stages[0]
        assert isinstance(first, Conv)
        numbers = math.prod(self.shape) // self.depth // math.prod(first.stride) * first.out_channels
        return int(numbers * 16 * (1 if self.precision == "bfloat16" else 2))

    def describe(self) -> str:
        """Return the kind, the stages' widths and the output's, such as "IMPALA CNN 16/32/32-256 in bfloat16"."""
        widths = [str(stage.out_channels) for stage in self.stages if isinstance(stage, nn.Conv2d)]
        return f"{self.title} {'/'.join(widths)}-{self.head.out_features} in {self.precision}"

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames `[N, *shape]` of any number type to `[N, features]`."""
        if self._prefers_c() and self._fits(frames) and self.can_run_in_c() and self._is_unchanged():
            return self._encode_in_c(frames)
        # An exported graph must not depend on the batch's size.
        one_part = frames.device.type != "cpu" or torch.compiler.is_exporting()
        n_parts = 1 if one_part else self._n_parts(len(frames))
        if n_parts == 1:
            return self._encode(frames)
        return parallel_batch(self._encode, frames.tensor_split(n_parts), self.parameters())

    def _n_parts(self, n_frames: int) -> int:
        """Return the number of micro-batches: a multiple of the number of threads, or fewer without multithreading."""
        threads = torch.get_num_threads()
        if n_frames < threads * min(MIN_FRAMES_PER_THREAD, self.micro_batch):
            threads = 1
        return threads * max(1, round(n_frames / (threads * self.micro_batch)))

    def _encode(self, frames: Tensor) -> Tensor:
        if self.kernels in KERNELS.keys() - {"plain"} and frames.is_cuda and self._is_unchanged():
            return self._encode_fused(frames)
        x = frames if self.channels_first else frames.permute(0, 3, 1, 2)  # [N, C, h, w], a view
        # Integers up to 256 are exact in bfloat16.
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self.head.weight.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        first, *stages = self.stages
        x = first(x, self.scale)
        for stage, weights in zip(stages, self._converted(stages, x), strict=True):
            x = functional_call(stage, weights, x) if weights else stage(x)
        return self._end(torch.relu(x))

    def _end(self, x: Tensor) -> Tensor:
        """Map the last stage's rectified output to the features."""
        x, head = x.flatten(1), self.head
        return torch.relu(F.linear(x, head.weight.to(x.dtype), head.bias.to(x.dtype))).to(head.weight.dtype)

    def _converted(self, stages: list[nn.Module], x: Tensor) -> list[dict[str, Tensor]]:
        """Return the stages' weights in the dtype of `x`, or empty dicts where each stage converts its own."""
        if not x.is_cuda or x.dtype == self.head.weight.dtype or torch.is_grad_enabled():
            return [{}] * len(stages)
        weights = [dict(stage.named_parameters()) for stage in stages]
        converted = iter(_convert_together([w for part in weights for w in part.values()], x.dtype))
        return [{name: next(converted) for name in part} for part in weights]

    def _is_unchanged(self) -> bool:
        """Return whether the stages' modules are the class's own, without hooks: fused operations call no modules."""
        return all(
            type(m) in (nn.Sequential, nn.ReLU, Conv, MaxPool, ResidualBlock)
            and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
            for m in self.stages.modules()
        )

    def can_run_in_c(self) -> bool:
        """Return whether the whole CNN can run in C on this processor: see `cpu_cnn.can_run`."""
        return cpu_cnn.are_float32(self.stages.parameters()) and cpu_cnn.can_run(self._layers(), self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _prefers_c(self) -> bool:
        if torch.compiler.is_compiling():  # or exporting: a graph must not depend on the batch's size
            return False
        by_choice = self.kernels == IN_C[self.precision]
        return by_choice or (self.kernels == "auto" and cpu_cnn.is_faster(self.precision))

    def _fits(self, frames: Tensor) -> bool:
        return cpu_cnn.can_encode(frames) and tuple(frames.shape[1:]) == self.shape

    def _layers(self) -> list[cpu_cnn.Layer]:
        """Return the stages as the layers of `srwm_rl.ops.cpu_cnn`, or an empty list where there are others."""
        h, w, c = (*self.shape[1:], self.depth) if self.channels_first else self.shape
        modules, layers = list(self.stages), list[cpu_cnn.Layer]()
        for module, after in zip_longest(modules, modules[1:]):
            if isinstance(module, ResidualBlock):
                layers.append(cpu_cnn.Layer("block", 3, h, w, c, h, w, c))
            elif isinstance(module, Conv) and isinstance(after, MaxPool) and module.kernel_size == (3, 3):
                layers.append(
                    cpu_cnn.Layer("conv and pool", 3, h, w, c, (h + 1) // 2, (w + 1) // 2, module.out_channels)
                )
            elif isinstance(module, Conv) and module.kernel_size == module.stride:
                k = module.stride[0]
                layers.append(cpu_cnn.Layer("patches", k, h, w, c, h // k, w // k, module.out_channels))
            elif not isinstance(module, MaxPool):
                return []
            *_, h, w, c = layers[-1]
        return layers

    def _encode_in_c(self, frames: Tensor) -> Tensor:
        convs = [module for module in self.stages.modules() if isinstance(module, Conv)]
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs if conv.bias is not None]
        x = frames.permute(0, 2, 3, 1) if self.channels_first else frames
        return self._end(cpu_cnn.encode(x, self._layers(), self.scale, weights, biases, self._dtype))

    def _encode_fused(self, frames: Tensor) -> Tensor:
        """Encode frames with biases, skip connections and ReLUs in one pass over memory after each convolution."""
        x = frames if self.channels_first else frames.permute(0, 3, 1, 2)  # [N, C, h, w], a view
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self.head.weight.dtype
        padding = (0, 0, 0, 0, 0, -x.shape[1] % KERNELS[self.kernels])  # of channels
        x = F.pad(x, padding).to(dtype, memory_format=torch.channels_last)
        convs = [module for module in self.stages.modules() if isinstance(module, Conv)]
        weights = [F.pad(convs[0].weight, padding) * self.scale, *(conv.weight for conv in convs[1:])]
        if torch.is_grad_enabled() or dtype == self.head.weight.dtype:
            weights = [weight.to(dtype) for weight in weights]
        else:
            weights = _convert_together(weights, dtype)
        fused = (partial(conv.fused, weight) for conv, weight in zip(convs, weights, strict=True))
        return self._end(self._fused_stages(x, fused))

    def _fused_stages(self, x: Tensor, convs: Iterator[FusedConv]) -> Tensor:
        """Return the last stage's rectified output, by convolutions in the order of their use."""
        rectified, modules = x, list(self.stages)
        for module, after in zip_longest(modules, modules[1:]):
            if isinstance(module, Conv):
                x, rectified = next(convs)(x, pool=isinstance(after, MaxPool), total=True)
            elif isinstance(module, ResidualBlock):
                _, inner = next(convs)(rectified)
                ends = not isinstance(after, ResidualBlock)  # then what follows takes the total, or nothing follows
                x, rectified = next(convs)(inner, skip=x, total=after is not None, relu=after is None or not ends)
        return rectified


def _convert_together(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return weights in another dtype. One conversion for each, when acting, would be a quarter of all launches."""
    converted = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(converted, weights)
    return converted


class NatureCNN(ImpalaCNN):
    """DQN's three convolutions (Mnih et al., 2015, https://doi.org/10.1038/nature14236), each followed by a ReLU.

    On a CPU a frame takes a third to a seventh of the time of an `ImpalaCNN` of half the published widths.

    Args:
        channels: widths of the convolutions of 8 x 8 pixels with stride 4, 4 x 4 with stride 2, and 3 x 3.

    The others are those of `ImpalaCNN`.

    Raises:
        UserError: an unknown precision, other than three widths, or frames of fewer than 36 pixels a side.
    """

    title = "Nature CNN"

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...] = (32, 64, 64),
        **settings: Any,
    ) -> None:
        super().__init__(shape, channels_first, channels, **settings)

    def _make_stages(
        self, height: int, width: int, depth: int, channels: tuple[int, ...]
    ) -> tuple[list[nn.Module], int]:
        if len(channels) != 3:
            raise UserError(
                f"the nature CNN has three convolutions: channels must be three widths, not {len(channels)}"
            )
        if min(height, width) < 36:
            raise UserError(
                f"the nature CNN reads frames of at least 36 x 36 pixels, not {height} x {width}: give the kind impala"
            )
        stages: list[nn.Module] = []
        for out, kernel, stride in zip(channels, (8, 4, 3), (4, 2, 1), strict=True):
            stages += [*([nn.ReLU()] if stages else []), Conv(depth, out, kernel, stride, padding=0)]
            depth, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return stages, depth * height * width

    def _fused_stages(self, x: Tensor, convs: Iterator[FusedConv]) -> Tensor:
        for conv in convs:
            _, x = conv(x)
        return x


class PatchCNN(ImpalaCNN):
    """An IMPALA CNN that begins with a convolution of patches: a third of the published one's multiplications.

    Most of those are at full and half resolution. Here patches that do not overlap are mapped to the first stage's
    channels, as in vision transformers (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929), and each stage has
    one residual block instead of two. docs/procgen.md compares what agents learn with either per CPU second.

    Args:
        channels: width of each stage; each but the first halves height and width.
        patch: height and width of a patch.

    The others are those of `ImpalaCNN`.

    Raises:
        UserError: an unknown precision, or frames smaller than a patch.
    """

    title = "Patch CNN"

    def __init__(
        self,
        shape: tuple[int, ...],
        channels_first: bool,
        channels: tuple[int, ...] = (32, 32, 32),
        patch: int = 4,
        **settings: Any,
    ) -> None:
        self._patch = patch
        super().__init__(shape, channels_first, channels, **settings)

    def _make_stages(
        self, height: int, width: int, depth: int, channels: tuple[int, ...]
    ) -> tuple[list[nn.Module], int]:
        if self._patch > min(height, width):
            raise UserError(f"the encoder's cnn patch must be at most {min(height, width)}, the frame's size")
        first, *others = channels
        stages: list[nn.Module] = [Conv(depth, first, self._patch, self._patch, padding=0), ResidualBlock(first)]
        depth, height, width = first, height // self._patch, width // self._patch
        for out in others:
            stages += [Conv(depth, out), MaxPool(), ResidualBlock(out)]
            depth, height, width = out, (height + 1) // 2, (width + 1) // 2
        return stages, depth * height * width
