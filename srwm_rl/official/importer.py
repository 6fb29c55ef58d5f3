"""A published RL agent as an `SRWMPolicy`, and as a run folder for `srwm-rl eval` and the other commands.

Their network (IDSIA/modern-srwm, reinforcement_learning/torchbeast_procgen/model.py) has the same layers: the IMPALA
CNN on pixels / 255, the previous reward clipped to +-1 appended to its features, a core, two linear heads. The names
differ, and their frames are `[3, 64, 64]`, ours `[64, 64, 3]` as from the environment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from srwm_rl.errors import UserError, named
from srwm_rl.nn.encoders import MAIN_KEY, PREVIOUS_REWARD
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.official.checkpoint import OfficialCheckpoint, read_checkpoint
from srwm_rl.official.cores import DEEP, copy_weights, core_settings, get_weight
from srwm_rl.storage.model_file import load_policy_arrays, policy_arrays, save_model
from srwm_rl.storage.model_schema import TensorBudget, shapes_of
from srwm_rl.storage.run_folder import CHECKPOINTS, Run
from srwm_rl.storage.safe_file import temporary_path

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


def import_checkpoint(path: str | Path, run_folder: str | Path) -> Path:
    """Convert a checkpoint of the authors' RL code to a run folder, without running anything in the file.

    The agent's observations differ in one point: the previous reward at an episode's first step is 0, in the authors'
    environments it is the last reward of the episode before.

    The folder may exist if it is empty. Its config.json lists under "imported" what was assumed because the checkpoint
    does not tell it.

    Raises:
        UserError: no such file; a file that is damaged, foreign or of an unknown agent; a folder that is not empty,
            or cannot be made.
    """
    folder = Path(os.path.abspath(run_folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{run_folder} exists already; give the name of a new folder")
    checkpoint = read_checkpoint(Path(path))
    policy = build_policy(checkpoint.core, checkpoint.weights, str(path))
    # Renamed when complete: a folder without its model would look like a run that failed.
    temporary = temporary_path(folder)
    try:
        _write(temporary, Path(path), checkpoint, policy)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run_folder}: {error.strerror}; choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(run_folder)


def _write(folder: Path, path: Path, checkpoint: OfficialCheckpoint, policy: SRWMPolicy) -> None:
    # Settings without a counterpart in their trainer keep our defaults.
    settings = {
        **checkpoint.training,
        "core": checkpoint.core,
        "algo": "impala",
        "inputs": ["reward"],
        "reward_clip": 1.0,
        "normalize_reward": False,
        "core_kwargs": _texts(policy.core_kwargs),
        "encoder_kwargs": _texts(policy.encoder_kwargs),
    }
    facts = {
        "file": path.name,
        "n_weights": sum(weight.size for weight in checkpoint.weights.values()),
        "notes": list(checkpoint.notes),
    }
    (folder / CHECKPOINTS).mkdir(parents=True)
    run = Run(folder, {"train": settings, "imported": facts})
    run.write_config()
    save_model(run.file("model", checkpoint.num_timesteps), policy, settings, checkpoint.num_timesteps)


def _texts(settings: dict[str, Any]) -> list[str]:
    return [f"{name}:{value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]


def build_policy(core_name: str, weights: Weights, source: str) -> SRWMPolicy:
    """Build the policy of a published agent with the core `core_name` of this package; `weights` are float32.

    Raises:
        UserError: a weight is missing, surplus or of another shape; it is named.
    """
    # A damaged file may name a width of a million.
    with named(f"{source} is no ProcGen agent of the published RL code"), TensorBudget(weights, copies=8):
        channels: list[int] = []
        while (name := f"feat_convs.{len(channels)}.0.weight") in weights or not channels:
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
