"""Cores from the weights of the authors' public code, under the names they have there.

The names are those of IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py: `input_proj`, `fwm_layers.<i>` and
`ff_layers.<i>`. Its self-modifying layers hold a `layer_norm` that they never use; it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import Core, make_core
from srwm_rl.storage.model_schema import TensorBudget

_NAMES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta", "lstm", "feedforward")
_ALIASES = {name: name for name in _NAMES} | {"deltanet": "delta"}
DEEP = "trafo_ff_block."  # the deeper feed-forward agent's prefix, instead of "core."
_FEED_FORWARD = {"layer_norm": "layer_norm", "up": "ff_layers.0", "down": "ff_layers.3"}


class _Source(NamedTuple):
    """One of our weights: the authors' weights, of these shapes, joined along the last axis."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


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
    sources = list(_sources(name, core))
    surplus = weights.keys() - {key for source in sources for key in source.theirs}
    if name not in ("delta", "feedforward"):  # only the Delta Net uses its layer norm
        surplus -= {
            f"fwm_layers.{i}.layer_norm.{kind}" for i in range(core.state_layers) for kind in ("weight", "bias")
        }
    if surplus:
        raise UserError(f"official core {name!r} has no weight {min(surplus)!r}")
    core.load_state_dict({source.ours: _joined(source, weights) for source in sources})
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


def _sources(name: str, core: Core) -> Iterator[_Source]:
    for ours, value in core.state_dict().items():
        shape = tuple(value.shape)
        module, _, rest = ours.partition(".")
        number, _, name_in_layer = rest.partition(".")
        if module == "lstm":
            yield _Source(ours, (rest,), (shape,))
        elif module == "project":
            yield _Source(ours, (f"input_proj.{number}",), (shape,))
        elif module == "blocks":
            part, _, kind = name_in_layer.rpartition(".")
            yield _Source(ours, (f"ff_layers.{number}.{_FEED_FORWARD[part]}.{kind}",), (shape,))
        elif name_in_layer == "weight" and name == "fake_sr":
            yield _Source(ours, (f"fwm_layers.{number}.W_y",), (shape,))
        elif name_in_layer == "weight":
            heads, size, columns = shape
            widths = (columns - 2 * size - 4, size, size, 4)
            names = tuple(f"fwm_layers.{number}.{group}" for group in ("W_y", "W_q", "W_k", "w_b"))
            yield _Source(ours, names, tuple((1, heads, size, width) for width in widths))
        else:
            theirs = name_in_layer.replace("out.", "out_linear.")
            yield _Source(ours, (f"fwm_layers.{number}.{theirs}",), (shape,))


def _joined(source: _Source, weights: Mapping[str, Tensor]) -> Tensor:
    pieces = []
    for key, shape in zip(source.theirs, source.shapes, strict=True):
        piece = _get(weights, key, len(shape))
        if piece.shape != shape:
            raise UserError(f"the official weight {key!r} must be {list(shape)}, not {list(piece.shape)}")
        pieces.append(piece)
    return torch.cat([piece[0] for piece in pieces], dim=-1) if len(pieces) > 1 else pieces[0]
