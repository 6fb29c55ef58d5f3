"""From observations to the features a core reads: a ResNet for images, an MLP for vectors, and the agent's own past."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeGuard

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space, is_image_space_channels_first
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from srwm_rl.errors import UserError, check_settings
from srwm_rl.ops.max_pool import max_pool
from srwm_rl.ops.thread_parallel import parallel_batch

# Keys under which the agent may be handed its own past (see srwm_rl.envs.VecMemoryInputs); they bypass the MLP.
PREVIOUS_ACTION, PREVIOUS_REWARD, EPISODE_STEP = "previous_action", "previous_reward", "episode_step"
MAIN_KEY = "observation"  # the name a lone observation space gets among the keys


MIN_FRAMES_PER_THREAD = 24  # frames; fewer are not worth a thread of their own
PRECISIONS = ("float32", "bfloat16")


def fastest_precision(device: torch.device | str) -> str:
    """Return the precision in which a CNN runs fastest: "bfloat16" where the hardware multiplies it, else "float32"."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # AVX512-BF16 or AMX; without them it is emulated
    return "bfloat16" if supported else "float32"


def micro_batch_for(precision: str) -> int:
    """Return about how many frames one CPU thread takes through the CNN at once (measured: docs/results).

    A pass has its price before the first frame: weights go into the convolutions' own types and layouts, hundreds of
    operations begin. With matrix tiles (AMX) a frame takes so little that this counts for ten of them. Without, larger
    parts outgrow the caches before they pay.
    """
    has_tiles = torch.cpu._is_amx_tile_supported()
    return 128 if precision == "bfloat16" and has_tiles else 64


class Conv(nn.Conv2d):
    """A 3 x 3 convolution that computes in its input's type; the weights stay float32, and so do their gradients."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Map `[N, C_in, h, w]` to `[N, C_out, h, w]`, the input multiplied by `scale`."""
        weight = self.weight if scale == 1.0 else self.weight * scale  # cheaper than a pass over the frames
        assert self.bias is not None
        return F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), padding=1)


class MaxPool(nn.Module):
    """The largest of 3 x 3 pixels at every second one: half the height and width."""

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
    """The IMPALA paper's ResNet (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561, figure 3), uint8 in.

    Frames stay as the environment made them until the first convolution: a permuted view of channels-last uint8 memory
    is converted in one pass, a micro-batch at a time, each by one thread.

    Args:
        shape: the observation space's shape, `(h, w, C)` or `(C, h, w)`.
        channels_first: which of the two.
        channels: width of each stage; each halves height and width.
        features: width of the output.
        micro_batch: about how many frames a thread takes at once on a CPU; None: `micro_batch_for`.
        scale: what a pixel is multiplied by.
        precision: "float32", or "bfloat16" for the arithmetic; weights, gradients and output are float32 either way.

    Raises:
        UserError: another precision.
    """

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
        width, height, depth = (shape[2], shape[1], shape[0]) if channels_first else (shape[1], shape[0], shape[2])
        stages: list[nn.Module] = []
        for out in channels:
            stages += [
                Conv(depth, out),
                MaxPool(),
                ResidualBlock(out),
                ResidualBlock(out),
            ]
            depth, width, height = out, (width + 1) // 2, (height + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(depth * width * height, features)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def describe(self) -> str:
        """Return the stages' widths and the output's, such as "16/32/32-256 in bfloat16"."""
        widths = [str(stage.out_channels) for stage in self.stages if isinstance(stage, nn.Conv2d)]
        return f"{'/'.join(widths)}-{self.head.out_features} in {self.precision}"

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames `[N, *shape]` of any number type to `[N, features]`."""
        # An exported graph must not depend on the batch's size.
        one_part = frames.device.type != "cpu" or torch.compiler.is_exporting()
        n_parts = 1 if one_part else self._n_parts(len(frames))
        if n_parts == 1:
            return self._encode(frames)
        return parallel_batch(self._encode, frames.tensor_split(n_parts), self.parameters())

    def _n_parts(self, n_frames: int) -> int:
        """Return into how many parts to divide frames: as many for each thread, or one for all threads together."""
        threads = torch.get_num_threads()
        if n_frames < threads * min(MIN_FRAMES_PER_THREAD, self.micro_batch):
            threads = 1
        return threads * max(1, round(n_frames / (threads * self.micro_batch)))

    def _encode(self, frames: Tensor) -> Tensor:
        x = frames if self.channels_first else frames.permute(0, 3, 1, 2)  # [N, C, h, w], a view
        # Whole numbers up to 256 are exact in bfloat16, so frames lose nothing.
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self.head.weight.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        first, *others = self.stages
        x = first(x, self.scale)
        for stage, weights in zip(others, self._converted(others, x), strict=True):
            x = functional_call(stage, weights, x) if weights else stage(x)
        x = torch.relu(x).flatten(1)
        head = self.head
        return torch.relu(F.linear(x, head.weight.to(x.dtype), head.bias.to(x.dtype))).to(head.weight.dtype)

    def _converted(self, stages: list[nn.Module], x: Tensor) -> list[dict[str, Tensor]]:
        """Return the weights of stages in the type of `x`, or nothing where each converts its own.

        On a GPU that acts, thirty conversions of a few numbers would be thirty launches, a quarter of all.
        """
        if x.device.type != "cuda" or x.dtype == self.head.weight.dtype or torch.is_grad_enabled():
            return [{}] * len(stages)
        weights = [dict(each.named_parameters()) for each in stages]
        converted = [{k: torch.empty_like(v, dtype=x.dtype) for k, v in each.items()} for each in weights]
        into, given = ([each for part in parts for each in part.values()] for parts in (converted, weights))
        torch._foreach_copy_(into, given)
        return converted


class StepEmbedding(nn.Module):
    """Sines and cosines of the step within the episode, `[N, 1]` to `[N, 2 * n_periods]`.

    With it a key can name *when*. Periods grow geometrically from 3 steps to `longest`.
    """

    periods: Tensor

    def __init__(self, n_periods: int = 6, longest: float = 256.0) -> None:
        super().__init__()
        periods = torch.logspace(math.log10(3.0), math.log10(longest), n_periods)
        self.register_buffer("periods", periods, persistent=False)

    def forward(self, step: Tensor) -> Tensor:
        """Map steps `[N, 1]`, 0 at an episode's first observation, to `[N, 2 * n_periods]`."""
        angle = 2 * math.pi * step / self.periods
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Encoder(BaseFeaturesExtractor):
    """One feature vector from whatever the observation holds; each key's part is concatenated in the keys' order.

    Images go through `ImpalaCNN`; the agent's previous action and reward pass through unchanged and its step within
    the episode as sines; everything else is flattened (discrete values as one-hots), joined and passed through an MLP.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of them.
        mlp: widths of the MLP's layers; empty: the vectors go to the core as they are.
        cnn: settings of `ImpalaCNN`.
        step_periods, step_longest: settings of `StepEmbedding`.
        normalize_images: multiply pixels by 1/255.
        precision: in which the CNN computes, "float32" or "bfloat16"; see `fastest_precision`.

    Raises:
        UserError: an observation space of another kind.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        mlp: tuple[int, ...] = (64,),
        cnn: dict[str, Any] | None = None,
        step_periods: int = 6,
        step_longest: float = 256.0,
        normalize_images: bool = True,
        precision: str = "float32",
    ) -> None:
        parts = flatten_obs_space(observation_space)
        _check_widths("mlp", mlp, may_be_empty=True)
        _check_cnn(cnn or {})
        super().__init__(observation_space, features_dim=1)
        self.images = nn.ModuleDict()
        self.plain: list[str] = []
        self.vectors: list[str] = []
        width = vector_width = 0
        for key, space in parts.items():
            if is_image(space):
                scale = 1 / 255 if normalize_images else 1.0
                settings: dict[str, Any] = {"scale": scale, "precision": precision, **(cnn or {})}
                network = ImpalaCNN(space.shape, is_image_space_channels_first(space), **settings)
                self.images[key] = network
                width += network.head.out_features
            elif key == EPISODE_STEP:
                width += 2 * step_periods
            elif key in (PREVIOUS_ACTION, PREVIOUS_REWARD):
                self.plain.append(key)
                width += get_flattened_obs_dim(space)
            else:
                self.vectors.append(key)
                vector_width += get_flattened_obs_dim(space)
        self.step = StepEmbedding(step_periods, step_longest) if EPISODE_STEP in parts else None
        self.mlp = _mlp(vector_width, mlp) if self.vectors else nn.Identity()
        self._features_dim = width + ((mlp[-1] if mlp else vector_width) if self.vectors else 0)

    def describe(self) -> str:
        """Say in a few words what reads the observation, such as "IMPALA CNN 16/32/32-256 + previous_reward"."""
        words = [f"IMPALA CNN {network.describe()}" for network in self.images.values()]  # type: ignore[operator]
        if self.vectors:
            sizes = [str(layer.out_features) for layer in self.mlp if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
            words.append(f"MLP {'/'.join(sizes)}" if sizes else "vectors as they are")
        return " + ".join([*words, *self.plain, *([EPISODE_STEP] if self.step is not None else [])])

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Map `{key: [N, ...]}`, vectors as floats and frames as they are, to `[N, features_dim]`."""
        features = [cnn(observations[key]) for key, cnn in self.images.items()]
        if self.vectors:
            features.append(self.mlp(torch.cat([observations[key].flatten(1) for key in self.vectors], dim=1)))
        features += [observations[key].flatten(1) for key in self.plain]
        if self.step is not None:
            features.append(self.step(observations[EPISODE_STEP]))
        return torch.cat(features, dim=1) if len(features) > 1 else features[0]


def flatten_obs_space(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """Return an observation space's parts by key; a space that is no Dict is one part, `MAIN_KEY`.

    Raises:
        UserError: a part that the encoder cannot read.
    """
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {MAIN_KEY: space}
    for key, part in parts.items():
        if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise UserError(
                f"observation {key!r} is a {type(part).__name__} space; "
                "wrap the environment to Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them"
            )
    return parts


def is_image(space: spaces.Space[Any]) -> TypeGuard[spaces.Box]:
    """Say whether a space holds uint8 images, `(h, w, C)` or `(C, h, w)`."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and is_image_space(space)


def _check_cnn(settings: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(ImpalaCNN).parameters if name not in ("shape", "channels_first")]
    check_settings("the encoder's cnn", settings, known)
    for name, value in settings.items():
        if name == "channels":
            _check_widths("cnn channels", value)
        elif name not in ("scale", "precision"):
            _check_widths(f"cnn {name}", [value])


def _check_widths(name: str, widths: Any, may_be_empty: bool = False) -> None:
    fits = isinstance(widths, list | tuple) and all(type(each) is int and each >= 1 for each in widths)
    if not fits or not (widths or may_be_empty):
        raise UserError(f"the encoder's {name} must be whole numbers of at least 1, such as [64], not {widths!r}")


def _mlp(width: int, sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers)
