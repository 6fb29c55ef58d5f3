"""Model files: a policy's weights with all it takes to build and judge it, and `load`, which makes an agent of one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srwm_rl.blueprint import build_policy, check_finite, check_meta, check_shapes
from srwm_rl.errors import UserError
from srwm_rl.files import read_file, write_file
from srwm_rl.policy import SRWMPolicy
from srwm_rl.run import Run
from srwm_rl.spaces import space_to_json

FORMAT = 1
logger = logging.getLogger(__name__)


class Agent:
    """A trained policy that acts, and what is known of its training.

    Attributes:
        policy: the `SRWMPolicy`, in evaluation mode.
        config: the run's settings as trained, JSON types.
        num_timesteps: environment steps it was trained for.
        path: the model file.
    """

    def __init__(self, policy: SRWMPolicy, config: dict[str, Any], num_timesteps: int, path: Path) -> None:
        self.policy, self.config, self.num_timesteps, self.path = policy, config, num_timesteps, path
        policy.set_training_mode(False)

    def predict(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Act as `SRWMPolicy.predict` does.

        Raises:
            UserError: an observation or a state that does not fit, or weights that give no numbers.
        """
        try:
            return self.policy.predict(obs, state, episode_start, deterministic)
        except UserError:
            raise
        except ValueError as error:  # torch's distributions refuse what is not finite
            raise UserError(f"{self.path} is sick: it answers what is no number; use an earlier checkpoint") from error


def policy_arrays(policy: SRWMPolicy) -> dict[str, np.ndarray]:
    """Return copies of the policy's weights by name, each once, as float32 arrays on the CPU."""
    return {name: np.array(each.detach().cpu().numpy(), order="C") for name, each in policy.named_parameters()}


def load_policy_arrays(policy: SRWMPolicy, arrays: dict[str, np.ndarray], source: str) -> None:
    """Copy weights into a policy.

    Raises:
        UserError: a weight is missing, surplus, of another shape or type, or not finite; the message names it.
    """
    parameters = dict(policy.named_parameters())
    check_shapes({name: tuple(each.shape) for name, each in parameters.items()}, arrays, source)
    check_finite(arrays, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(arrays[name]))


def save_model(
    path: Path,
    policy: SRWMPolicy,
    config: dict[str, Any],
    num_timesteps: int,
    arrays: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a model file: weights, architecture, spaces, the run's settings and its age in steps.

    Args:
        path: the file.
        policy: whose architecture it is.
        config: the run's settings, JSON types.
        num_timesteps: environment steps the weights were trained for.
        arrays: the weights; None: the policy's present ones.

    Raises:
        OSError: it cannot be written.
        UserError: a space that cannot be described.
    """
    meta = describe(policy, config, num_timesteps)
    write_file(path, policy_arrays(policy) if arrays is None else arrays, meta)


def describe(policy: SRWMPolicy, config: dict[str, Any], num_timesteps: int) -> dict[str, Any]:
    """Return what a model file says beside its weights: what it takes to build the policy again, and its history.

    Raises:
        UserError: a space that cannot be described.
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
    """Load the newest intact model of a run folder, or one model file, without executing anything in it.

    Raises:
        UserError: no run and no model, a damaged or foreign file, a newer format, an unknown core.
    """
    candidates = [Path(path)] if Path(path).is_file() else Run.open(Path(path)).models()
    file, arrays, meta = _first_intact(candidates)
    check_meta(meta, str(file), FORMAT)
    policy = build_policy(meta, arrays, str(file))
    load_policy_arrays(policy, arrays, str(file))
    return Agent(policy.to(device), meta["config"], meta["num_timesteps"], file)


def _first_intact(candidates: list[Path]) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    for file in candidates[:-1]:
        try:
            return (file, *read_file(file))
        except UserError as error:
            logger.warning("%s; taking an older model", error)
    return (candidates[-1], *read_file(candidates[-1]))
