"""The encoder: a ResNet for images, an MLP for vectors, and the previous action and reward unchanged."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import ItemsView, Iterator
from typing import Any, TypeGuard
from urllib.parse import unquote

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.nn.few_shot_cnns import Conv4, FewShotCNN, ResNet12
from srwm_rl.ops.max_pool import max_pool
from srwm_rl.ops.thread_parallel import parallel_batch

# Keys of the inputs that srwm_rl.envs.VecMemoryInputs and AttemptsBatch add; they bypass the MLP.
PREVIOUS_ACTION, PREVIOUS_REWARD, EPISODE_STEP = "previous_action", "previous_reward", "episode_step"
ATTEMPT_BEGINS = "attempt_begins"
MAIN_KEY = "observation"  # the key of an observation space that is no Dict
MIN_FRAMES_PER_THREAD = 24  # fewer are not worth a thread
MIN_FRAME_SIZE = 16  # pixels; a smaller Box of three dimensions need not be a frame
PRECISIONS = ("float32", "bfloat16")


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

    Raises:
        UserError: an unknown precision.
    """

    title = "IMPALA CNN"

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
        size, depth = (shape[1:], shape[0]) if channels_first else (shape[:2], shape[2])
        stages, n_outputs = self._make_stages(size[0], size[1], depth, channels)
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

    def describe(self) -> str:
        """Return the kind, the stages' widths and the output's, such as "IMPALA CNN 16/32/32-256 in bfloat16"."""
        widths = [str(stage.out_channels) for stage in self.stages if isinstance(stage, nn.Conv2d)]
        return f"{self.title} {'/'.join(widths)}-{self.head.out_features} in {self.precision}"

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames `[N, *shape]` of any number type to `[N, features]`."""
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
        x = frames if self.channels_first else frames.permute(0, 3, 1, 2)  # [N, C, h, w], a view
        # Integers up to 256 are exact in bfloat16.
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self.head.weight.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        first, *stages = self.stages
        x = first(x, self.scale)
        for stage, weights in zip(stages, self._converted(stages, x), strict=True):
            x = functional_call(stage, weights, x) if weights else stage(x)
        x = torch.relu(x).flatten(1)
        head = self.head
        return torch.relu(F.linear(x, head.weight.to(x.dtype), head.bias.to(x.dtype))).to(head.weight.dtype)

    def _converted(self, stages: list[nn.Module], x: Tensor) -> list[dict[str, Tensor]]:
        """Return the stages' weights in the dtype of `x`, or empty dicts where each stage converts its own.

        When acting on a GPU one conversion per weight would be 30 kernel launches, a quarter of all.
        """
        if x.device.type != "cuda" or x.dtype == self.head.weight.dtype or torch.is_grad_enabled():
            return [{}] * len(stages)
        weights = [dict(stage.named_parameters()) for stage in stages]
        converted = [{name: torch.empty_like(w, dtype=x.dtype) for name, w in part.items()} for part in weights]
        targets, sources = ([w for part in parts for w in part.values()] for parts in (converted, weights))
        torch._foreach_copy_(targets, sources)
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
        if len(channels) != 3 or min(height, width) < 36:
            raise UserError(
                f"the nature CNN has three convolutions, for frames of at least 36 x 36 pixels: give three channels, "
                f"not {len(channels)}, and frames that large, not {height} x {width}"
            )
        stages: list[nn.Module] = []
        for out, kernel, stride in zip(channels, (8, 4, 3), (4, 2, 1), strict=True):
            stages += [*([nn.ReLU()] if stages else []), Conv(depth, out, kernel, stride, padding=0)]
            depth, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return stages, depth * height * width


CNNS: dict[str, type[ImpalaCNN | FewShotCNN]] = {
    "impala": ImpalaCNN,
    "nature": NatureCNN,
    "conv4": Conv4,
    "resnet12": ResNet12,
}


class StepEmbedding(nn.Module):
    """Sines and cosines of the step within the episode, `[N, 1]` to `[N, 2 * n_periods]`.

    Periods grow geometrically from 3 steps to `longest`.
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


class KeyedModules(nn.ModuleDict):
    """A `ModuleDict` with any keys: the name of a module may have no dot and be no attribute of the class."""

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_module_name(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_module_name(key), module)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_module_name(key))

    def __iter__(self) -> Iterator[str]:
        return ("" if name == "%" else unquote(name) for name in super().__iter__())

    def items(self) -> ItemsView[str, nn.Module]:
        """Return the keys and modules."""
        return dict(zip(self, self.values(), strict=True)).items()


def _module_name(key: str) -> str:
    name = key.replace("%", "%25").replace(".", "%2E") or "%"
    if hasattr(nn.ModuleDict, name) or name == "training":
        return f"%{ord(name[0]):02X}{name[1:]}"
    return name


class Encoder(BaseFeaturesExtractor):
    """One feature vector per observation: of images, of vectors, the previous action and reward, the step.

    Images pass through a CNN, the previous action and reward unchanged, the step within the episode through
    `StepEmbedding`; all else is flattened (discrete values as one-hots), concatenated and passed through an MLP.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of them.
        mlp: widths of the MLP's layers; empty: no MLP.
        cnn: settings of `ImpalaCNN`; with `"kind"` "nature", "conv4" or "resnet12" those of `NatureCNN`, `Conv4` or
            `ResNet12`.
        vector_scale: factor on vectors.
        step_periods, step_longest: settings of `StepEmbedding`.
        normalize_images: multiply pixels by 1/255. False: as in SB3, every Box of three dimensions is an image, of
            floats too.
        precision: of the CNN, "float32" or "bfloat16"; see `fastest_precision`.

    Raises:
        UserError: an unsupported observation space or setting.
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
        vector_scale: float = 1.0,
    ) -> None:
        obs_spaces = flatten_obs_space(observation_space)
        check_widths("the encoder's mlp", mlp, may_be_empty=True)
        _check_cnn(cnn or {})
        super().__init__(observation_space, features_dim=1)
        self.vector_scale = vector_scale
        self.images = KeyedModules()
        self.plain: list[str] = []
        self.vectors: list[str] = []
        has_step, width, vector_width = False, 0, 0
        for key, space in obs_spaces.items():
            if is_image(space, normalize_images):
                scale = 1 / 255 if normalize_images else 1.0
                settings: dict[str, Any] = {"scale": scale, "precision": precision, **(cnn or {})}
                kind = CNNS[settings.pop("kind", "impala")]
                network = kind(space.shape, is_image_space_channels_first(space), **settings)
                self.images[key] = network
                width += network.n_features
            elif is_episode_step(key, space):
                has_step = True
                width += 2 * step_periods
            elif key in (PREVIOUS_ACTION, PREVIOUS_REWARD, ATTEMPT_BEGINS) and is_float_vector(space):
                self.plain.append(key)
                width += spaces.flatdim(space)
            else:
                _warn_of_frames(key, space)
                self.vectors.append(key)
                vector_width += spaces.flatdim(space)
        self.step = StepEmbedding(step_periods, step_longest) if has_step else None
        self.mlp = nn.Sequential(*create_mlp(vector_width, -1, list(mlp))) if self.vectors else nn.Identity()
        self._features_dim = width + ((mlp[-1] if mlp else vector_width) if self.vectors else 0)

    def describe(self) -> str:
        """Return a short description, such as "IMPALA CNN 16/32/32-256 in float32 + previous_reward"."""
        networks = [network.describe() for network in self.images.values()]  # type: ignore[operator]
        if self.vectors:
            sizes = [str(layer.out_features) for layer in self.mlp if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
            networks.append(f"MLP {'/'.join(sizes)}" if sizes else "vectors as they are")
        return " + ".join([*networks, *self.plain, *([EPISODE_STEP] if self.step is not None else [])])

    def forward(self, observations: dict[str, Tensor], frame_index: Tensor | None = None) -> Tensor:
        """Map `{key: [N, ...]}`, images as uint8 and all else as floats, to `[N, features_dim]`.

        With `frame_index` `[N]` images are `[M, ...]`, and observation i has number `frame_index[i]`, so that repeated
        ones are encoded once.
        """
        features = [cnn(observations[key]) for key, cnn in self.images.items()]
        if frame_index is not None:
            features = [part[frame_index] for part in features]
        if self.vectors:
            vectors = torch.cat([observations[key].flatten(1) for key in self.vectors], dim=1)
            features.append(self.mlp(vectors * self.vector_scale if self.vector_scale != 1.0 else vectors))
        features += [observations[key].flatten(1) for key in self.plain]
        if self.step is not None:
            features.append(self.step(observations[EPISODE_STEP]))
        return torch.cat(features, dim=1) if len(features) > 1 else features[0]


def flatten_obs_space(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """Return an observation space's entries by key; a space that is no Dict has the key `MAIN_KEY`.

    Raises:
        UserError: a space that the encoder does not support.
    """
    obs_spaces = dict(space.spaces) if isinstance(space, spaces.Dict) else {MAIN_KEY: space}
    if not obs_spaces:
        raise UserError("the observation is an empty Dict: there is nothing to read; give it at least one entry")
    for key, subspace in obs_spaces.items():
        if not isinstance(subspace, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            nested = isinstance(subspace, spaces.Tuple | spaces.Dict | spaces.Text)
            raise UserError(
                f"observation {key!r} is a {type(subspace).__name__} space; wrap the environment "
                f"{'in srwm_rl.envs.FlatDictObservation, or ' if nested else ''}"
                "to Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them"
            )
        if spaces.flatdim(subspace) == 0:
            raise UserError(f"observation {key!r} is empty, of shape {subspace.shape}: leave it out")
    return obs_spaces


def is_image(space: spaces.Space[Any], normalize_images: bool = True) -> TypeGuard[spaces.Box]:
    """Return whether a space is of images, `(h, w, C)` or `(C, h, w)`: uint8, or any Box if not `normalize_images`."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    return not normalize_images or is_image_space(space)


def is_float_vector(space: spaces.Space[Any]) -> TypeGuard[spaces.Box]:
    """Return whether a space is of float vectors, as the inputs that `srwm_rl.envs.VecMemoryInputs` adds."""
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and np.dtype(space.dtype).kind == "f"


def is_episode_step(key: str, space: spaces.Space[Any]) -> bool:
    """Return whether an observation's part is the step within the episode, by its key and its content.

    Raises:
        UserError: it is several steps, from a stack of frames.
    """
    if key != EPISODE_STEP or not is_float_vector(space):
        return False
    is_step = bool((space.low == 0).all() and np.isposinf(space.high).all())
    if is_step and space.shape != (1,):
        raise UserError(
            f"{EPISODE_STEP} has shape {space.shape}, not (1,): wrap in the other order, "
            "VecMemoryInputs(VecFrameStack(venv, n))"
        )
    return is_step


def _warn_of_frames(key: str, space: spaces.Space[Any]) -> None:
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and sorted(space.shape)[1] >= MIN_FRAME_SIZE:
        warnings.warn(
            f"observation {key!r} of shape {space.shape} is flattened to {math.prod(space.shape):,} numbers: images "
            "are uint8, Box(0, 255); for floats give policy_kwargs={'normalize_images': False}",
            stacklevel=2,
        )


def _check_cnn(settings: dict[str, Any]) -> None:
    kind = settings.get("kind", "impala")
    if str(kind) not in CNNS:
        raise UserError(f"the encoder's cnn has no kind {kind!r}{did_you_mean(str(kind), CNNS)}")
    parameters = _cnn_settings(CNNS[kind])
    check_settings(f"the encoder's {kind} cnn", settings, parameters.keys() - {"shape", "channels_first"} | {"kind"})
    for name, value in settings.items():
        if name == "channels":
            check_widths("the encoder's cnn channels", value)
        elif name not in ("kind", "scale", "precision", "dropout", "standardize"):
            check_widths(f"the encoder's cnn {name}", [value])


def _cnn_settings(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the parameters of a CNN's constructor, and of its parent's where it passes them on."""
    parameters = dict(inspect.signature(kind).parameters)
    if "settings" in parameters:
        parameters |= inspect.signature(kind.__mro__[1]).parameters
    return parameters


def check_widths(name: str, widths: Any, may_be_empty: bool = False) -> None:
    """Raise a `UserError` unless `widths` are those of layers."""
    valid = isinstance(widths, list | tuple) and all(type(width) is int and width >= 1 for width in widths)
    if not valid or not (widths or may_be_empty):
        raise UserError(f"{name} must be whole numbers of at least 1, such as [64], not {widths!r}")
