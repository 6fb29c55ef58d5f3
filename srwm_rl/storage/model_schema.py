"""The description in a model file, checked against the file's weights before any network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from msgspec import UNSET, Meta, Struct, UnsetType
from torch.overrides import TorchFunctionMode

from srwm_rl.errors import UserError
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.card import Card
from srwm_rl.storage.space_json import space_from_json
from srwm_rl.storage.strict_json import convert

Arrays = dict[str, np.ndarray]
LARGEST = 1e12  # of a weight or a score; a product of a few such weights overflows
Steps = Annotated[int, Meta(ge=0, le=10**15)]
SMALLEST = 1024  # what a smaller tensor counts as, since making one takes time
_SIZED = ("empty", "empty_strided", "eye", "full", "ones", "rand", "randint", "randn", "zeros")
_RANGES = ("arange", "linspace", "logspace", "randperm")
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")
FACTORIES = {getattr(torch, name) for name in (*_SIZED, *_RANGES)} | {getattr(torch.Tensor, name) for name in _METHODS}


class Score(Struct, forbid_unknown_fields=True):
    """The score with which a model was kept as the run's best, and what it is a score of."""

    score: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
    of: Annotated[str, Meta(pattern=r"\A[ -~]{0,200}\Z")]


class PolicySettings(Struct, forbid_unknown_fields=True):
    """The arguments of `SRWMPolicy`."""

    core: str
    core_kwargs: dict[str, Any]
    encoder_kwargs: dict[str, Any]
    net_arch: list[Any] | dict[str, Any]
    activation_fn: str
    normalize_images: bool


class ModelMeta(Struct, forbid_unknown_fields=True):
    """The JSON of a model file."""

    format: Annotated[int, Meta(ge=1)]
    kind: Literal["model"]
    policy: PolicySettings
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    config: dict[str, Any]
    num_timesteps: Steps
    levels_played: dict[str, Any] | UnsetType = UNSET  # only in models of training runs, as is the next
    chosen: Score | UnsetType = UNSET
    card: Card | UnsetType = UNSET  # only in shared models


def check_meta(meta: dict[str, Any], source: str, newest: int) -> ModelMeta:
    """Return a file's JSON as declared, if it describes a model that this version can read.

    Raises:
        UserError: it does not; the message names the file and the entry.
    """
    if (kind := meta.get("kind")) != "model":
        raise UserError(f"{source} is a {kind!s:.40} file, not a model; give the run folder or a model file")
    if type(number := meta.get("format")) is int and number > newest:
        raise UserError(f"{source} has format {number}; upgrade srwm-rl, which reads up to {newest}")
    return convert(meta, ModelMeta, f"{source} is damaged")


class TensorBudget(TorchFunctionMode):
    """Raise an error once the tensors made have more numbers in all than a few networks of these weights need."""

    def __init__(self, weights: Mapping[str, Any], copies: int = 2) -> None:
        super().__init__()
        self.left = copies * sum(math.prod(weight.shape) for weight in weights.values()) + 2**22

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            # Tensors on the meta device have a shape, but no memory.
            options = {key: value for key, value in kwargs.items() if key not in ("generator", "out", "pin_memory")}
            self.left -= max(SMALLEST, func(*args, **{**options, "device": "meta"}).numel())
            if self.left < 0:
                raise UserError("its settings describe a much larger network than it has weights for")
        return func(*args, **kwargs)


def build_policy(meta: dict[str, Any], arrays: Arrays, source: str) -> SRWMPolicy:
    """Build the policy that a file describes, without loading its weights.

    Raises:
        UserError: the description builds no policy, or one with other weights; a width of a billion is refused before
            it takes memory.
    """
    copies = 8 if ":" in meta["policy"]["core"] else 2  # a user's core may make more tensors
    try:
        observed, acted = space_from_json(meta["observation_space"]), space_from_json(meta["action_space"])
        with TensorBudget(arrays, copies):
            policy = SRWMPolicy(observed, acted, lambda _: 0.0, ortho_init=False, **meta["policy"])
    except UserError as error:
        raise UserError(f"{source} is of another architecture, or damaged: {error}") from error
    except Exception as error:  # a setting of a wrong type can raise anything in torch or in a user's core
        raise UserError(f"{source} is damaged: its settings build no network ({type(error).__name__})") from error
    check_shapes(policy, arrays, source)
    return policy


def weights_of(policy: SRWMPolicy) -> dict[str, torch.Tensor]:
    """Return what a file holds of a policy, by name and each tensor once: parameters and persistent buffers.

    Frozen columns of an SRWM are buffers, and so may be weights of a user's core.
    """
    saved = policy.state_dict().keys()
    buffers = {name: buffer for name, buffer in policy.named_buffers() if name in saved}
    return {**dict(policy.named_parameters()), **buffers}


def shapes_of(policy: SRWMPolicy) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a policy's weights by name."""
    return {name: tuple(weight.shape) for name, weight in weights_of(policy).items()}


def missing_buffers(policy: SRWMPolicy, arrays: Arrays) -> list[str]:
    """Return the names of buffers that a file lacks: earlier versions wrote parameters alone."""
    parameters = dict(policy.named_parameters())
    return [name for name in weights_of(policy) if name not in parameters and name not in arrays]


def check_shapes(policy: SRWMPolicy, arrays: Arrays, source: str) -> None:
    """Check that weights have the names, shapes and types of a policy's; buffers may be missing.

    Raises:
        UserError: a weight is missing, surplus, of another shape or type; the message names it.
    """
    optional = missing_buffers(policy, arrays)
    expected = {name: shape for name, shape in shapes_of(policy).items() if name not in optional}
    if expected.keys() != arrays.keys():
        odd = sorted(expected.keys() ^ arrays.keys())[0]
        how = "lacks" if odd in expected else "has a surplus"
        raise UserError(f"{source} is of another architecture: it {how} weight {odd!r:.120}")
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise UserError(
                f"{source} is of another architecture: weight {name!r} is {array.dtype} {list(array.shape)}, "
                f"not float32 {list(shape)}"
            )


def check_finite(arrays: Arrays, source: str) -> None:
    """Check that every weight is finite, and not too large to compute with.

    Raises:
        UserError: a weight is not; the message names it.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{source} is broken: weight {name!r} is not finite; use an earlier checkpoint")
        if array.size and max(array.max(), -array.min()) > LARGEST:
            raise UserError(f"{source} is broken: weight {name!r} exceeds {LARGEST:g}; use an earlier checkpoint")
