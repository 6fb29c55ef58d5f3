"""An `SRWMPolicy` with the weights of a published RL agent.

Their network (IDSIA/modern-srwm, reinforcement_learning/torchbeast_procgen/model.py) has the same layers: the IMPALA
CNN on pixels / 255, the previous reward clipped to +-1 appended to its features, a core, two linear heads. The names
differ, and their frames are `[3, 64, 64]`, ours `[64, 64, 3]` as from the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.nn.cores import Core, make_core
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.encoders import MAIN_KEY, PREVIOUS_REWARD
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.official.cores import DEEP, load_core
from srwm_rl.storage.model_file import load_policy_arrays
from srwm_rl.storage.model_schema import TensorBudget, shapes_of

Weights = Mapping[str, np.ndarray]
SIDE, N_ACTIONS = 64, 15  # ProcGen's
CNN = f"features_extractor.images.{MAIN_KEY}"
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
    """Build the policy of a published agent with the core `core_name` of this package; `weights` are float32.

    Raises:
        UserError: a weight is missing, surplus or of another shape; it is named.
    """
    channels: list[int] = []
    while f"feat_convs.{len(channels)}.0.weight" in weights:
        channels.append(_n_rows(weights, f"feat_convs.{len(channels)}.0.weight", source))
    features = _n_rows(weights, "fc.weight", source)
    names = _names_around_the_core(len(channels))
    for theirs in names.values():
        _n_rows(weights, theirs, source)
    core_weights = {name: array for name, array in weights.items() if name not in names.values()}
    # A damaged file may name a width of a million.
    with TensorBudget(8 * sum(array.size for array in weights.values()) + 2**22):
        try:
            core = _build_core(core_name, core_weights, features + 1)
            policy = SRWMPolicy(
                observation_space(),
                spaces.Discrete(N_ACTIONS),
                lambda _: 0.0,
                core=core_name,
                core_kwargs=_settings(core),
                encoder_kwargs={"cnn": {"channels": channels, "features": features}},
                ortho_init=False,
            )
        except UserError as error:
            raise UserError(f"{source} is no ProcGen agent of the published RL code: {error}") from error
    shapes = shapes_of(policy)
    for ours, theirs in names.items():
        if weights[theirs].shape != shapes[ours]:
            actual = list(weights[theirs].shape)
            raise UserError(f"{source} is no ProcGen agent: weight {theirs!r} is {actual}, not {list(shapes[ours])}")
    arrays = {f"core.{name}": weight.detach().numpy() for name, weight in core.named_parameters()}
    load_policy_arrays(policy, arrays | {ours: weights[theirs] for ours, theirs in names.items()}, source)
    return policy


def _names_around_the_core(n_stages: int) -> dict[str, str]:
    """Return our names -> theirs of the weights of encoder and heads."""
    names = {
        f"{CNN}.stages.{4 * i + module}{part}": theirs.format(i)
        for i in range(n_stages)
        for module, part, theirs in STAGE
    }
    names |= {f"{CNN}.head": "fc", "action_net": "policy", "value_net": "baseline"}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def _n_rows(weights: Weights, name: str, source: str) -> int:
    if name not in weights or not weights[name].ndim:
        raise UserError(f"{source} is no ProcGen agent of the published RL code: it lacks weight {name!r}")
    return len(weights[name])


def _build_core(name: str, weights: Weights, n_inputs: int) -> Core:
    """Build the core; that of the simplest agent, whose heads read the features, returns its input exactly."""
    prefix = DEEP if name == "feedforward" else "core."
    if surplus := sorted(key for key in weights if not key.startswith(prefix)):
        raise UserError(f"it has a surplus weight {surplus[0]!r}")
    if weights or name != "feedforward":
        core = load_core(name, weights)
        if core.input_size != n_inputs:
            raise UserError(f"its core reads {core.input_size} features, not {n_inputs}")
        return core
    core = make_core(name, n_inputs, hidden_size=n_inputs, n_layers=1, ff_size=1)
    with torch.no_grad():
        for weight in core.parameters():
            weight.zero_()
        core.project.weight.copy_(torch.eye(n_inputs))  # type: ignore[union-attr, operator]
    return core


def _settings(core: Core) -> dict[str, Any]:
    """Return the keyword arguments with which `make_core` builds this core again."""
    settings: dict[str, Any] = {"hidden_size": core.output_size, "n_layers": core.state_layers}
    blocks: Any = getattr(core, "blocks", None)
    if blocks is not None:
        settings |= {"n_layers": len(blocks), "ff_size": blocks[0].up.out_features}
    if isinstance(core, StackCore):
        settings |= {"n_heads": core.layers[0].n_heads, "variant": "paper"}
    return settings
