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

from srwm_rl.errors import UserError, named
from srwm_rl.nn.encoders import MAIN_KEY, PREVIOUS_REWARD
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.official.cores import DEEP, copy_weights, core_settings, get_weight
from srwm_rl.storage.model_file import load_policy_arrays, policy_arrays
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
    # A damaged file may name a width of a million.
    with named(f"{source} is no ProcGen agent of the published RL code"), TensorBudget(weights, copies=8):
        channels: list[int] = []
        while (name := f"feat_convs.{len(channels)}.0.weight") in weights:
            channels.append(len(get_weight(weights, name, (-1, -1, -1, -1))))
        features = len(get_weight(weights, "fc.weight", (-1, -1)))
        names = _names_around_the_core(len(channels))
        rest = {name: array for name, array in weights.items() if name not in names.values()}
        core_weights, core_kwargs = _read_core(core_name, rest, features + 1)
        policy = SRWMPolicy(
            observation_space(),
            spaces.Discrete(N_ACTIONS),
            lambda _: 0.0,
            core=core_name,
            core_kwargs=core_kwargs,
            encoder_kwargs={"cnn": {"channels": channels, "features": features}},
            ortho_init=False,
        )
        if core_weights:
            copy_weights(core_name, core_weights, policy.core)
        else:  # return the features exactly
            zeros = {name: torch.zeros_like(weight) for name, weight in policy.core.state_dict().items()}
            policy.core.load_state_dict({**zeros, "project.weight": torch.eye(features + 1)})
        arrays = {
            ours: get_weight(weights, names[ours], shape) for ours, shape in shapes_of(policy).items() if ours in names
        }
    load_policy_arrays(policy, policy_arrays(policy) | arrays, source)
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


def _read_core(name: str, weights: Weights, n_inputs: int) -> tuple[Weights, dict[str, Any]]:
    """Return the core's weights and settings; the simplest agent, whose heads read the features, has no weights."""
    prefix = DEEP if name == "feedforward" else "core."
    if surplus := sorted(key for key in weights if not key.startswith(prefix)):
        raise UserError(f"it has a surplus weight {surplus[0]!r}")
    if not weights and name == "feedforward":
        return {}, {"hidden_size": n_inputs, "n_layers": 1, "ff_size": 1}
    weights = {key.removeprefix(prefix): array for key, array in weights.items()}
    settings = core_settings(name, weights)
    if (n_features := settings.pop("input_size")) != n_inputs:
        raise UserError(f"its core reads {n_features} features, not {n_inputs}")
    return weights, settings
