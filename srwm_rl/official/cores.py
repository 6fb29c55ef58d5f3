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

_NAMES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta", "lstm", "feedforward")
_ALIASES = {name: name for name in _NAMES} | {"deltanet": "delta"}
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
    if name not in _ALIASES:
        raise UserError(f"unknown official core {name!r}{did_you_mean(name, _ALIASES)}")
    name = _ALIASES[name]
    weights = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in _unprefixed(params).items()}
    with TensorBudget(2 * sum(weight.numel() for weight in weights.values()) + 2**22):
        core = make_core(name, **_sizes(name, weights))
    sources = {ours: _sources(name, ours, value.shape) for ours, value in core.state_dict().items()}
    surplus = weights.keys() - {key for shapes in sources.values() for key in shapes}
    if name not in ("delta", "feedforward"):  # only the Delta Net uses its layer norm
        surplus -= {
            f"fwm_layers.{i}.layer_norm.{kind}" for i in range(core.state_layers) for kind in ("weight", "bias")
        }
    if surplus:
        raise UserError(f"official core {name!r} has no weight {min(surplus)!r}")
    core.load_state_dict({ours: _joined(shapes, weights) for ours, shapes in sources.items()})
    return core


def _unprefixed(params: Mapping[str, Any]) -> dict[str, Any]:
    for prefix in ("param/", "core.", DEEP):
        if any(key.startswith(prefix) for key in params):
            params = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
    return dict(params)


def _get(weights: Mapping[str, Tensor], key: str, dims: int) -> Tensor:
    if key not in weights:
        raise UserError(f"the official weight {key!r} is missing")
    if weights[key].dim() != dims or not weights[key].numel():
        raise UserError(f"the official weight {key!r} must have {dims} axes, not shape {list(weights[key].shape)}")
    return weights[key]


def _sizes(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `make_core`, read from the shapes of a few weights."""
    if name == "lstm":
        n_layers = sum(f"weight_ih_l{i}" in weights for i in range(len(weights)))
        gates, input_size = _get(weights, "weight_ih_l0", 2).shape
        return {"input_size": input_size, "hidden_size": gates // 4, "n_layers": n_layers}
    hidden, input_size = _get(weights, "input_proj.weight", 2).shape
    layers = "ff_layers" if name == "feedforward" else "fwm_layers"
    numbers = {key.split(".")[1] for key in weights if re.match(rf"{layers}\.[0-9]+\.", key)}
    sizes = {
        "input_size": input_size,
        "hidden_size": hidden,
        "n_layers": len(numbers),
        "ff_size": len(_get(weights, "ff_layers.0.ff_layers.0.weight", 2)),
    }
    if name == "feedforward":
        return sizes
    if name == "delta":
        heads = len(_get(weights, "fwm_layers.0.slow_net.weight", 2)) - 3 * hidden  # of H (3D + 1) rows
    else:
        heads = _get(weights, "fwm_layers.0.W_y", 3 if name == "fake_sr" else 4).shape[-3]
    if heads < 1 or hidden % heads:
        first = "slow_net.weight" if name == "delta" else "W_y"
        raise UserError(f"the official weight 'fwm_layers.0.{first}' does not fit a core of width {hidden}")
    return {**sizes, "n_heads": heads, "variant": "paper"}


def _sources(name: str, ours: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the authors' weights, names and shapes, that make one of ours when joined along the last axis."""
    theirs = ours
    for pattern, replacement in _RENAMED:
        theirs = re.sub(pattern, replacement, theirs)
    if not re.fullmatch(r"fwm_layers\.\d+\.weight", theirs):
        return {theirs: tuple(shape)}
    layer = theirs.removesuffix("weight")
    if name == "fake_sr":
        return {f"{layer}W_y": tuple(shape)}
    heads, size, columns = shape
    widths = {"W_y": columns - 2 * size - 4, "W_q": size, "W_k": size, "w_b": 4}
    return {f"{layer}{group}": (1, heads, size, width) for group, width in widths.items()}


def _joined(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> Tensor:
    pieces = []
    for key, shape in shapes.items():
        piece = _get(weights, key, len(shape))
        if piece.shape != shape:
            raise UserError(f"the official weight {key!r} must be {list(shape)}, not {list(piece.shape)}")
        pieces.append(piece)
    return torch.cat([piece[0] for piece in pieces], dim=-1) if len(pieces) > 1 else pieces[0]
