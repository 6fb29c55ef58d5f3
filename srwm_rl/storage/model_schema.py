"""What a model file says of its network, checked against the weights in the file before any network is built."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import core_names
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.safe_file import unpack
from srwm_rl.storage.seen_levels import SeenLevels
from srwm_rl.storage.space_json import space_from_json

Arrays = dict[str, np.ndarray]
ENTRIES: dict[str, type] = {
    "format": int,
    "kind": str,
    "policy": dict,
    "observation_space": dict,
    "action_space": dict,
    "config": dict,
    "num_timesteps": int,
}
# What only models of runs have that keep such a record.
OPTIONAL: dict[str, type] = {"levels_played": dict, "chosen": dict}
SETTINGS = {
    "core": (str,),
    "core_kwargs": (dict,),
    "encoder_kwargs": (dict,),
    "net_arch": (list, dict),
    "activation_fn": (str,),
    "normalize_images": (bool,),
}
LENGTHS = ("n_layers",)  # how many parts a network has; all other whole numbers are widths
FREE = ("micro_batch", "shift_bound")  # nothing is as large as these say
MAX_STEPS = 10**15
MAX_LETTERS = 200
RECORD = "/levels_played/"  # with which the names of arrays begin that are no weights
LARGEST = 1e12  # of a weight; a product of a few such overflows
_SIZED = ("empty", "empty_strided", "eye", "full", "ones", "rand", "randint", "randn", "zeros")
_RANGES = ("arange", "linspace", "logspace", "randperm")
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")
FACTORIES = {getattr(torch, name) for name in (*_SIZED, *_RANGES)} | {getattr(torch.Tensor, name) for name in _METHODS}


def check_meta(meta: dict[str, Any], source: str, newest: int) -> None:
    """Check that a file describes a model that this version can read.

    Raises:
        UserError: it does not; the message names the file and the entry.
    """
    kind: Any = meta.get("kind")
    number: Any = meta.get("format")
    if kind != "model":
        raise UserError(f"{source} is a {kind!s:.40} file, not a model; give the run folder or a model file")
    if type(number) is int and number > newest:
        raise UserError(f"{source} has format {number}; upgrade srwm-rl, which reads up to {newest}")
    known = ENTRIES | {name: wanted for name, wanted in OPTIONAL.items() if name in meta}
    if odd := sorted(map(str, meta.keys() ^ known.keys())):
        raise UserError(f"{source} is damaged: it {'lacks' if odd[0] in ENTRIES else 'has a surplus'} entry {odd[0]!r}")
    for name, wanted in known.items():
        if type(meta[name]) is not wanted:
            raise UserError(f"{source} is damaged: its {name} cannot be {meta[name]!r:.60}")
    if number < 1 or not 0 <= meta["num_timesteps"] <= MAX_STEPS:
        raise UserError(f"{source} is damaged: its format or num_timesteps is out of range")
    settings = meta["policy"]
    if odd := sorted(map(str, settings.keys() ^ SETTINGS.keys())):
        raise UserError(f"{source} is damaged: its policy's settings are not those of a policy ({odd[0]!r})")
    for name, types in SETTINGS.items():
        if type(settings[name]) not in types:
            raise UserError(f"{source} is damaged: its policy's {name} cannot be {settings[name]!r:.60}")
    _check_core_name(settings["core"], source)
    if "chosen" in meta:
        check_score(meta["chosen"], source)


def check_score(chosen: dict[str, Any], source: str) -> None:
    """Check what is said of the score for which a model was kept: `score`, a number, and `of`, what it is.

    Raises:
        UserError: it cannot be; the message names the file.
    """
    score, of = chosen.get("score"), chosen.get("of")
    is_number = isinstance(score, int | float) and type(score) is not bool and abs(score) <= LARGEST  # not so NaN
    is_text = isinstance(of, str) and len(of) <= MAX_LETTERS and of.isprintable()
    if not is_number or not is_text or len(chosen) != 2:
        raise UserError(f"{source} is damaged: its score cannot be; use another file")


def take_levels_played(meta: dict[str, Any], arrays: Arrays, source: str) -> tuple[SeenLevels | None, Arrays]:
    """Return the record of the levels that a model was trained on, None if its file has none, and its weights.

    Raises:
        UserError: the record is damaged; the message names the file.
    """
    if "levels_played" not in meta:
        return None, arrays
    weights = {name: each for name, each in arrays.items() if not name.startswith(RECORD)}
    record = {name: each for name, each in arrays.items() if name.startswith(RECORD)}
    try:
        tree = unpack(record, meta["levels_played"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    played = SeenLevels.from_tree(tree, source)
    if len(record) != 2 * len(played.games):
        raise UserError(f"{source} is damaged: its record of the levels played has a surplus part")
    return played, weights


def _check_core_name(core: str, source: str) -> None:
    if core in core_names():
        return
    if ":" in core:
        raise UserError(
            f"{source} needs core {core!r:.120}, code of your own, which no file can start: call "
            f"srwm_rl.import_core({core!r:.120}) first, or on the command line add --core {core:.120}"
        )
    raise UserError(f"{source} needs core {core!r:.120}, which is not registered{did_you_mean(core, core_names())}")


class _Budget(TorchFunctionMode):
    """Refuse the tensor with which more numbers would have been made than a network of so many weights needs."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            # On the meta device tensors have shapes, but no memory.
            alike = {key: each for key, each in kwargs.items() if key not in ("generator", "out", "pin_memory")}
            self.left -= func(*args, **{**alike, "device": "meta"}).numel()
            if self.left < 0:
                raise UserError("its settings describe a much larger network than it has weights for")
        return func(*args, **kwargs)


def build_policy(meta: dict[str, Any], arrays: Arrays, source: str) -> SRWMPolicy:
    """Build the policy that a file describes, its weights not yet loaded.

    Raises:
        UserError: the description is none of a policy, or not of one with these weights; a width of a billion is
            refused before it takes any memory.
    """
    _check_sizes(meta["policy"], arrays, source)
    n_weights = sum(each.size for each in arrays.values())
    copies = 8 if ":" in meta["policy"]["core"] else 2  # what a core of the user's own does, it may
    try:
        observed, acted = space_from_json(meta["observation_space"]), space_from_json(meta["action_space"])
        with _Budget(copies * n_weights + 2**22):
            policy = SRWMPolicy(observed, acted, lambda _: 0.0, ortho_init=False, **meta["policy"])
    except UserError as error:
        raise UserError(f"{source} is of another architecture, or damaged: {error}") from error
    except Exception as error:  # whatever a setting of a wrong type ends in, deep in torch or in a core of the user's
        raise UserError(f"{source} is damaged: its settings build no network ({type(error).__name__})") from error
    check_shapes({name: tuple(each.shape) for name, each in policy.named_parameters()}, arrays, source)
    return policy


def _check_sizes(settings: dict[str, Any], arrays: Arrays, source: str) -> None:
    """Check that no number in the settings exceeds what the file has of weights: even an outline takes its time."""
    n_weights = sum(each.size for each in arrays.values())
    own_core = ":" in settings["core"]  # whose settings may be anything; those called as here mean the same
    for name, value in _numbers({**settings, "core": None}):
        known = name in ("hidden_size", "n_heads", "ff_size", *LENGTHS)
        most = len(arrays) if name in LENGTHS else n_weights
        if (known or not own_core) and name not in FREE and value > most:
            raise UserError(
                f"{source} is of another architecture: its settings say {name} {value}, "
                f"but it has {len(arrays):,} arrays of {n_weights:,} weights"
            )


def _numbers(node: Any, name: str = "a list") -> list[tuple[str, float]]:
    if isinstance(node, dict):
        return [pair for key, each in node.items() for pair in _numbers(each, key)]
    if isinstance(node, list):
        return [(name, len(node)), *(pair for each in node for pair in _numbers(each, name))]
    return [(name, node)] if isinstance(node, int) else []


def check_shapes(expected: dict[str, tuple[int, ...]], arrays: Arrays, source: str) -> None:
    """Check the names, shapes and types of weights.

    Raises:
        UserError: a weight is missing, surplus, of another shape or type; the message names it.
    """
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
    """Check that every weight is a number, and one with which there can be reckoned.

    Raises:
        UserError: one is not; the message names it.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{source} is sick: weight {name!r} is not finite; use an earlier checkpoint")
        if array.size and max(array.max(), -array.min()) > LARGEST:
            raise UserError(f"{source} is sick: weight {name!r} exceeds {LARGEST:g}; use an earlier checkpoint")
