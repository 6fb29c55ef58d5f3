"""An `SRWMPolicy` with the weights of a published RL agent.

Their network (IDSIA/modern-srwm, reinforcement_learning/torchbeast_procgen/model.py) has the same layers: the IMPALA
CNN on pixels / 255, the previous reward clipped to +-1 appended to its features, a core, two linear heads. The names
differ, and their frames are `[3, 64, 64]`, ours `[64, 64, 3]` as from the environment.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.nn.cores import Core
from srwm_rl.nn.encoders import MAIN_KEY, PREVIOUS_REWARD
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.official.cores import load_core
from srwm_rl.storage.model_file import load_policy_arrays

Weights = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
SIDE, N_ACTIONS = 64, 15  # ProcGen's
CNN = f"features_extractor.images.{MAIN_KEY}"
DEEP = "trafo_ff_block."  # the deeper feed-forward agent's prefix, instead of "core."
# A stage of the CNN is four modules here: convolution, pooling, two residual blocks.
STAGE = (
    (0, "", "feat_convs.{}.0"),
    (2, ".first", "resnet1.{}.1"),
    (2, ".second", "resnet1.{}.3"),
    (3, ".first", "resnet2.{}.1"),
    (3, ".second", "resnet2.{}.3"),
)


def observation_space() -> spaces.Dict:
    """Return the published agents' observations, as `srwm_rl.envs.VecMemoryInputs` makes them for ProcGen."""
    frame = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    return spaces.Dict({MAIN_KEY: frame, PREVIOUS_REWARD: spaces.Box(-1, 1, (1,), np.float32)})


def build_policy(core_name: str, weights: Weights, source: str) -> SRWMPolicy:
    """Build the policy of a published agent.

    Args:
        core_name: the name of the agent's core in this package.
        weights: float32 arrays by the names they have in the checkpoint.
        source: the checkpoint's name in errors.

    Raises:
        UserError: a weight is missing, surplus or of another shape; it is named.
    """
    # All sizes are checked before anything is built: a damaged file may name a width of a million.
    channels, names, shapes = _around_the_core(weights, source)
    n_features = shapes["fc.weight"][0]
    _check_shapes(weights, shapes, source)
    core_weights = {name: array for name, array in weights.items() if name not in shapes}
    try:
        if core_name == "feedforward":
            core_kwargs, arrays = _feed_forward(core_weights, n_features + 1, source)
        else:
            core_kwargs, arrays = _with_memory(core_name, core_weights, n_features + 1, source)
    except UserError as error:
        raise UserError(str(error) if source in str(error) else f"{source}: {error}") from error
    policy = SRWMPolicy(
        observation_space(),
        spaces.Discrete(N_ACTIONS),
        lambda _: 0.0,
        core=core_name,
        core_kwargs=core_kwargs,
        encoder_kwargs={"cnn": {"channels": channels, "features": n_features}},
    )
    arrays = {f"core.{name}": array for name, array in arrays.items()}
    arrays |= {ours: weights[theirs] for ours, theirs in names.items()}
    load_policy_arrays(policy, arrays, source)
    return policy


def _around_the_core(weights: Weights, source: str) -> tuple[list[int], dict[str, str], Shapes]:
    """Return the CNN's channels, our names -> theirs for encoder and heads, and the expected shapes of theirs."""
    channels: list[int] = []
    while f"feat_convs.{len(channels)}.0.weight" in weights:
        channels.append(_axis(weights, f"feat_convs.{len(channels)}.0.weight", 0, source))
    features, width = _axis(weights, "fc.weight", 0, source), _axis(weights, "policy.weight", 1, source)
    names: dict[str, str] = {}
    kernels: Shapes = {}
    depth, side = 3, SIDE
    for i, n_channels in enumerate(channels):
        for module, part, theirs in STAGE:
            names[f"{CNN}.stages.{4 * i + module}{part}"] = theirs.format(i)
            kernels[theirs.format(i)] = (n_channels, n_channels if module else depth, 3, 3)
        depth, side = n_channels, (side + 1) // 2
    names |= {f"{CNN}.head": "fc", "action_net": "policy", "value_net": "baseline"}
    kernels |= {"fc": (features, depth * side * side), "policy": (N_ACTIONS, width), "baseline": (1, width)}
    shapes = {f"{name}.weight": shape for name, shape in kernels.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in kernels.items()}
    return channels, _with_kinds(names), shapes


def _with_kinds(names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def _axis(weights: Weights, name: str, axis: int, source: str) -> int:
    if name not in weights or weights[name].ndim <= axis:
        raise UserError(f"{source} is no ProcGen agent of the published RL code: it lacks weight {name!r}")
    return int(weights[name].shape[axis])


def _check_shapes(weights: Weights, shapes: Shapes, source: str) -> None:
    for name, shape in shapes.items():
        _axis(weights, name, 0, source)
        if weights[name].shape != shape:
            actual = list(weights[name].shape)
            raise UserError(f"{source} is no ProcGen agent: weight {name!r} is {actual}, not {list(shape)}")


def _with_memory(name: str, weights: Weights, n_inputs: int, source: str) -> tuple[dict[str, Any], Weights]:
    """Return the settings and weights of a core that the published code stores under "core."."""
    if surplus := sorted(key for key in weights if not key.startswith("core.")):
        raise UserError(f"{source} has a surplus weight {surplus[0]!r}")
    _check_core(weights, n_inputs, source)
    core = load_core(name, weights)
    return _settings(core), {key: weight.detach().numpy() for key, weight in core.named_parameters()}


def _check_core(weights: Weights, n_inputs: int, source: str) -> None:
    """Check the core's input width, and its width and depth against the weights in the file."""
    shapes: Shapes
    if "core.weight_ih_l0" in weights:
        width = _axis(weights, "core.weight_hh_l0", 1, source)
        shapes = {"core.weight_ih_l0": (4 * width, n_inputs)}
        shapes |= {name.replace("_ih", "_hh"): (4 * width, width) for name in weights if "weight_ih" in name}
    else:
        width = _axis(weights, "core.input_proj.weight", 0, source)
        ff_size = _axis(weights, "core.ff_layers.0.ff_layers.0.weight", 0, source)
        shapes = {"core.input_proj.weight": (width, n_inputs)}
        for layer in {name.split(".")[2] for name in weights if name.startswith("core.fwm_layers.")}:
            shapes[f"core.fwm_layers.{layer}.out_linear.weight"] = (width, width)
            shapes[f"core.ff_layers.{layer}.ff_layers.0.weight"] = (ff_size, width)
    _check_shapes(weights, shapes, source)


def _settings(core: Core) -> dict[str, Any]:
    """Return the keyword arguments with which `make_core` builds this core again."""
    settings: dict[str, Any] = {"hidden_size": core.output_size, "n_layers": core.state_layers}
    if "variant" in inspect.signature(type(core)).parameters:
        settings["n_heads"] = core.layers[0].n_heads  # type: ignore[index, union-attr]
        settings["ff_size"] = core.blocks[0].up.out_features  # type: ignore[index, union-attr]
        settings["variant"] = "paper"
    return settings


def _feed_forward(weights: Weights, n_inputs: int, source: str) -> tuple[dict[str, Any], Weights]:
    """Return the settings and weights of an agent without memory: the deeper agent's blocks, or no core at all."""
    if not any(name.startswith(DEEP) for name in weights):
        return _identity(n_inputs)
    width = _axis(weights, f"{DEEP}input_proj.weight", 0, source)
    ff_size = _axis(weights, f"{DEEP}ff_layers.0.ff_layers.0.weight", 0, source)
    n_layers = len({match[1] for name in weights if (match := re.match(rf"{DEEP}ff_layers\.(\d+)\.", name))})
    names, kernels = {"project": f"{DEEP}input_proj"}, {f"{DEEP}input_proj": (width, n_inputs)}
    for i in range(n_layers):
        theirs = f"{DEEP}ff_layers.{i}"
        names |= {f"blocks.{i}.layer_norm": f"{theirs}.layer_norm"}
        names |= {f"blocks.{i}.up": f"{theirs}.ff_layers.0", f"blocks.{i}.down": f"{theirs}.ff_layers.3"}
        kernels |= {f"{theirs}.ff_layers.0": (ff_size, width), f"{theirs}.ff_layers.3": (width, ff_size)}
    _check_shapes(weights, {f"{name}.weight": shape for name, shape in kernels.items()}, source)
    names = _with_kinds(names)
    if odd := sorted({*names.values()} ^ weights.keys()):
        how = "has a surplus" if odd[0] in weights else "lacks"
        raise UserError(f"{source} {how} weight {odd[0]!r}")
    settings = {"hidden_size": width, "n_layers": n_layers, "ff_size": ff_size}
    return settings, {ours: weights[theirs] for ours, theirs in names.items()}


def _identity(width: int) -> tuple[dict[str, Any], Weights]:
    """Return a feed-forward core that returns its input exactly: the simplest agent's heads read the features."""
    block = {"layer_norm": (width,), "up": (1, width), "down": (width, 1)}
    arrays: dict[str, np.ndarray] = {"project.weight": np.eye(width, dtype=np.float32)}
    arrays["project.bias"] = np.zeros(width, np.float32)
    for name, shape in block.items():
        arrays[f"blocks.0.{name}.weight"] = np.zeros(shape, np.float32)
        arrays[f"blocks.0.{name}.bias"] = np.zeros(shape[0], np.float32)
    return {"hidden_size": width, "n_layers": 1, "ff_size": 1}, arrays
