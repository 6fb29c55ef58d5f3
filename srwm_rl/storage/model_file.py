"""Model files: a policy's weights and the description to build it from; `load` returns an agent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import UNSET, to_builtins

from srwm_rl.errors import UserError, named
from srwm_rl.nn.encoders import Encoder
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.card import Card
from srwm_rl.storage.model_schema import (
    build_policy,
    check_finite,
    check_meta,
    check_shapes,
    missing_buffers,
    weights_of,
)
from srwm_rl.storage.run_folder import model_files
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file
from srwm_rl.storage.seen_levels import SeenLevels
from srwm_rl.storage.space_json import space_to_json

FORMAT = 2  # 1 had no levels played and no score
FORMAT_WITH_CARD = 3
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Agent:
    """A trained policy, in evaluation mode, and the facts about its training."""

    policy: SRWMPolicy
    config: dict[str, Any]  # the run's settings, in JSON types
    num_timesteps: int  # environment steps it was trained for
    path: Path  # the model file
    levels_played: SeenLevels | None = None  # the levels it was trained on; None: not recorded
    chosen: dict[str, Any] | None = None  # of a run's best model its `score`, and what that is a score `of`
    card: Card | None = None  # of a shared agent

    def __post_init__(self) -> None:
        self.policy.set_training_mode(False)

    def predict(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Act as `SRWMPolicy.predict` does.

        Raises:
            UserError: an observation or a state does not fit, or the outputs are not finite.
        """
        return self.policy.predict(obs, state, episode_start, deterministic, action_masks)


def policy_arrays(policy: SRWMPolicy) -> dict[str, np.ndarray]:
    """Return copies of the policy's weights by name, each once, as float32 arrays on the CPU."""
    tensors = {name: weight.detach().cpu() for name, weight in weights_of(policy).items()}
    floats = {name: tensor if tensor.is_floating_point() else tensor.float() for name, tensor in tensors.items()}
    return {name: np.array(tensor.numpy(), order="C") for name, tensor in floats.items()}


def load_policy_arrays(policy: SRWMPolicy, arrays: dict[str, np.ndarray], source: str) -> None:
    """Copy weights into a policy; its buffers may be missing, and are kept then.

    Raises:
        UserError: a weight is missing, surplus, of another shape or type, or not finite; the message names it.
    """
    check_shapes(policy, arrays, source)
    check_finite(arrays, source)
    with torch.no_grad():
        for name, weight in weights_of(policy).items():
            if name in arrays:
                weight.copy_(torch.from_numpy(arrays[name]))


def save_model(
    path: Path,
    policy: SRWMPolicy,
    config: dict[str, Any],
    num_timesteps: int,
    arrays: dict[str, np.ndarray] | None = None,
    levels_played: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
    card: Card | None = None,
) -> None:
    """Write a model file: weights, architecture, spaces, the run's settings and the number of steps.

    `arrays` are the weights (None: the policy's), `levels_played` the result of `SeenLevels.to_tree`. With a card it is
    the file of `srwm-rl share`.

    Raises:
        OSError: the file cannot be written.
        UserError: a space is not supported.
    """
    optional = {"levels_played": levels_played, "chosen": chosen}
    record, tree = pack({name: value for name, value in optional.items() if value is not None})
    meta = {**describe(policy, config, num_timesteps), **tree}
    if card is not None:
        meta |= {"format": FORMAT_WITH_CARD, "card": to_builtins(card)}
    write_file(path, {**(policy_arrays(policy) if arrays is None else arrays), **record}, meta)


def describe(policy: SRWMPolicy, config: dict[str, Any], num_timesteps: int) -> dict[str, Any]:
    """Return a model file's JSON: the description to build the policy from, and its training.

    Raises:
        UserError: a space is not supported.
    """
    return {
        "format": FORMAT,
        "kind": "model",
        "policy": policy.settings(),
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.action_space),
        "config": config,
        "num_timesteps": num_timesteps,
    }


def load(path: str | Path, device: str = "cpu") -> Agent:
    """Load a model, without executing anything in it.

    A CNN that was trained in bfloat16 computes in float32 on a device that would emulate bfloat16.

    Args:
        path: a run folder RUN for its newest intact model, RUN/best for its best, a model file, zoo:NAME for an agent
            that comes with the package (`srwm-rl zoo` lists them), or https://...#sha256=HEX.
        device: a torch device.

    Raises:
        UserError: there is no run or model, the file is damaged, foreign or of a newer format, or the core is unknown.
    """
    *newer, oldest = model_files(path)
    for file in newer:
        try:
            arrays, meta = read_file(file)
            break
        except UserError as error:
            logger.warning("%s; an older model is used", error)
    else:
        file, (arrays, meta) = oldest, read_file(oldest)
    card = check_meta(meta, str(file), FORMAT_WITH_CARD).card
    levels_played = None
    if "levels_played" in meta:
        with named(str(file)):
            levels_played = SeenLevels.from_tree(unpack(arrays, meta["levels_played"]), str(file))
        recorded, _ = pack({"levels_played": levels_played.to_tree()})
        arrays = {name: array for name, array in arrays.items() if name not in recorded}
    policy = build_policy(meta, arrays, str(file))
    if missing := missing_buffers(policy, arrays):
        logger.warning(
            "%s is of a version that did not save %s: the agent does not act as it was trained; train --resume of its "
            "run draws the same again, and saves them",
            *(file, ", ".join(missing)),
        )
    load_policy_arrays(policy, arrays, str(file))
    policy = policy.to(device)
    if isinstance(policy.features_extractor, Encoder):
        policy.features_extractor.avoid_emulation(device)
    return Agent(
        *(policy, meta["config"], meta["num_timesteps"], file, levels_played, meta.get("chosen")),
        card=None if card is UNSET else card,
    )
