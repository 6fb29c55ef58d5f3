"""The encoder: a CNN for images, an MLP for vectors, and the previous action and reward unchanged."""

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
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.image_layout import is_channels_first
from srwm_rl.nn.cnns import ImpalaCNN, NatureCNN, PatchCNN, fastest_precision
from srwm_rl.nn.few_shot_cnns import Conv4, FewShotCNN, ResNet12

# Keys of the inputs that srwm_rl.envs.VecMemoryInputs and AttemptsBatch add; they bypass the MLP.
PREVIOUS_ACTION, PREVIOUS_REWARD, EPISODE_STEP = "previous_action", "previous_reward", "episode_step"
ATTEMPT_BEGINS = "attempt_begins"
MAIN_KEY = "observation"  # the key of an observation space that is no Dict
MIN_FRAME_SIZE = 16  # pixels; a smaller Box of three dimensions need not be a frame


CNNS: dict[str, type[ImpalaCNN | FewShotCNN]] = {
    "impala": ImpalaCNN,
    "nature": NatureCNN,
    "patch": PatchCNN,
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
        cnn: settings of `ImpalaCNN`; with `"kind"` "nature", "patch", "conv4" or "resnet12" those of `NatureCNN`,
            `PatchCNN`, `Conv4` or `ResNet12`.
        vector_scale: factor on vectors.
        step_periods: number of periods of `StepEmbedding`.
        step_longest: the longest of them, in steps.
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
                network = kind(space.shape, is_channels_first(space.shape), **settings)
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

    def avoid_emulation(self, device: torch.device | str) -> None:
        """Let CNNs in bfloat16 compute in float32 where the device emulates bfloat16: faster, and not less exact."""
        if fastest_precision(device) == "float32":
            for cnn in self.images.values():
                cnn.precision = "float32"  # type: ignore[assignment]

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


def _check_cnn(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise UserError(
            f'the encoder\'s cnn takes settings, such as \'cnn:{{"kind":"nature"}}\' in quotes, not {settings!r}'
        )
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
