"""Cores from the weights of the authors' public code, under the names they have there.

The names are those of IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py: `input_proj`, `fwm_layers.<i>` and
`ff_layers.<i>`. Its self-modifying layers hold a `layer_norm` that they never use; it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import Core, make_core
from srwm_rl.storage.model_schema import TensorBudget

_NAMES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta", "lstm", "feedforward", "deltanet")
DEEP = "trafo_ff_block."  # the deeper feed-forward agent's prefix, instead of "core."
# Ours -> theirs.
_RENAMED = (
    (r"^lstm\.", ""),
    (r"^project\.", "input_proj."),
    (r"^layers\.", "fwm_layers."),
    (r"^blocks\.", "ff_layers."),
    (r"\.out\.", ".out_linear."),
    (r"\.up\.", ".ff_layers.0."),
    (r"\.down\.", ".ff_layers.3."),
)


def load_core(name: str, params: Mapping[str, np.ndarray | Tensor]) -> Core:
    """Build a core from arrays under the authors' parameter names; the sizes follow from the shapes.

    Args:
        name: "srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta" (or "deltanet"), "lstm" or "feedforward".
        params: the core's parameters. If any name begins with "param/", "core." or "trafo_ff_block.", only the names
            with that prefix are used.

    Returns:
        The core, variant "paper", float32, on the CPU.

    Raises:
        UserError: an unknown name, or a weight that is missing, surplus or of another shape; the message names it.
    """
    if name not in _NAMES:
        raise UserError(f"unknown official core {name!r}{did_you_mean(name, _NAMES)}")
    name = "delta" if name == "deltanet" else name
    for prefix in ("param/", "core.", DEEP):
        if any(key.startswith(prefix) for key in params):
            params = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
    with TensorBudget(params):
        core = make_core(name, **core_settings(name, params))
    copy_weights(name, params, core)
    return core


def core_settings(name: str, weights: Mapping[str, np.ndarray | Tensor]) -> dict[str, Any]:
    """Return the arguments of `make_core`, `input_size` among them, read from the shapes of a few weights.

    Raises:
        UserError: a weight is missing or has other axes; the message names it.
    """
    if name == "lstm":
        n_layers = sum(f"weight_ih_l{i}" in weights for i in range(len(weights)))
        gates, input_size = get_weight(weights, "weight_ih_l0", (-1, -1)).shape
        return {"input_size": input_size, "hidden_size": gates // 4, "n_layers": n_layers}
    hidden, input_size = get_weight(weights, "input_proj.weight", (-1, -1)).shape
    sizes = {
        "input_size": input_size,
        "hidden_size": hidden,
        "n_layers": len({key.split(".")[1] for key in weights if key.startswith("ff_layers.")}),
        "ff_size": len(get_weight(weights, "ff_layers.0.ff_layers.0.weight", (-1, -1))),
    }
    if name == "feedforward":
        return sizes
    first = "fwm_layers.0.slow_net.weight" if name == "delta" else "fwm_layers.0.W_y"
    shape = get_weight(weights, first, {"delta": (-1, -1), "fake_sr": (-1, -1, -1)}.get(name, (1, -1, -1, -1))).shape
    heads = shape[0] - 3 * hidden if name == "delta" else shape[-3]  # the Delta Net's weight has H (3D + 1) rows
    if heads < 1 or hidden % heads:
        raise UserError(f"the official weight {first!r} does not fit a core of width {hidden}")
    return {**sizes, "n_heads": heads, "variant": "paper"}


def get_weight(weights: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Any:
    """Return one of the authors' weights; a size of -1 stands for any but 0.

    Raises:
        UserError: it is missing, or of another shape.
    """
    if key not in weights:
        raise UserError(f"the official weight {key!r} is missing")
    actual = tuple(weights[key].shape)
    pairs = zip(actual, shape, strict=False)
    if len(actual) != len(shape) or any(n == 0 or wanted not in (-1, n) for n, wanted in pairs):
        raise UserError(f"the official weight {key!r} must be {list(shape)}, not {list(actual)}")
    return weights[key]


def copy_weights(name: str, weights: Mapping[str, np.ndarray | Tensor], core: Core) -> None:
    """Copy all of the authors' weights into a core of ours.

    Raises:
        UserError: a weight is missing, surplus or of another shape; the message names it.
    """
    sources = {ours: _sources(name, ours, tuple(value.shape)) for ours, value in core.state_dict().items()}
    surplus = weights.keys() - {key for shapes in sources.values() for key in shapes}
    if name not in ("delta", "feedforward"):  # only the Delta Net uses its layer norm
        surplus = {key for key in surplus if not re.fullmatch(r"fwm_layers\.\d+\.layer_norm\.(weight|bias)", key)}
    if surplus:
        raise UserError(f"official core {name!r} has no weight {min(surplus)!r}")
    joined = {}
    for ours, shapes in sources.items():
        pieces = [torch.as_tensor(get_weight(weights, key, shape)) for key, shape in shapes.items()]
        joined[ours] = torch.cat([piece[0] for piece in pieces], dim=-1) if len(pieces) > 1 else pieces[0]
    core.load_state_dict(joined)


def _sources(name: str, ours: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the authors' weights, names and shapes, that make one of ours when joined along the last axis."""
    theirs = ours
    for pattern, replacement in _RENAMED:
        theirs = re.sub(pattern, replacement, theirs)
    if not re.fullmatch(r"fwm_layers\.\d+\.weight", theirs):
        return {theirs: shape}
    layer = theirs.removesuffix("weight")
    if name == "fake_sr":
        return {f"{layer}W_y": shape}
    heads, size, columns = shape
    widths = {"W_y": columns - 2 * size - 4, "W_q": size, "W_k": size, "w_b": 4}
    return {f"{layer}{group}": (1, heads, size, width) for group, width in widths.items()}
