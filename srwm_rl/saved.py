"""Model files: a policy's weights with all it takes to build and judge it, and `load`, which makes an agent of one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srwm_rl.cores import core_names
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.files import read_file, write_file
from srwm_rl.policy import SRWMPolicy
from srwm_rl.run import Run
from srwm_rl.spaces import space_from_json, space_to_json

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
        """Act as `SRWMPolicy.predict` does."""
        return self.policy.predict(obs, state, episode_start, deterministic)


def policy_arrays(policy: SRWMPolicy) -> dict[str, np.ndarray]:
    """Return copies of the policy's weights by name, each once, as float32 arrays on the CPU."""
    return {name: np.array(each.detach().cpu().numpy(), order="C") for name, each in policy.named_parameters()}


def load_policy_arrays(policy: SRWMPolicy, arrays: dict[str, np.ndarray], source: str) -> None:
    """Copy weights into a policy.

    Raises:
        UserError: a weight is missing, surplus, of another shape or type, or not finite; the message names it.
    """
    parameters = dict(policy.named_parameters())
    if parameters.keys() != arrays.keys():
        odd = sorted(parameters.keys() ^ arrays.keys())[0]
        how = "lacks" if odd in parameters else "has a surplus"
        raise UserError(f"{source} is of another architecture: it {how} weight {odd!r}")
    for name, parameter in parameters.items():
        array = arrays[name]
        if array.shape != tuple(parameter.shape) or array.dtype != np.float32:
            raise UserError(
                f"{source} is of another architecture: weight {name!r} is {array.dtype} {list(array.shape)}, "
                f"not float32 {list(parameter.shape)}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{source} is sick: weight {name!r} is not finite; use an earlier checkpoint")
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
    meta = {
        "format": FORMAT,
        "kind": "model",
        "policy": policy.settings(),
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.action_space),
        "config": config,
        "num_timesteps": num_timesteps,
    }
    write_file(path, policy_arrays(policy) if arrays is None else arrays, meta)


def load(path: str | Path, device: str = "cpu") -> Agent:
    """Load the newest intact model of a run folder, or one model file, without executing anything in it.

    Raises:
        UserError: no run and no model, a damaged or foreign file, a newer format, an unknown core.
    """
    candidates = [Path(path)] if Path(path).is_file() else Run.open(Path(path)).models()
    file, arrays, meta = _first_intact(candidates)
    if meta.get("kind") != "model":
        raise UserError(f"{file} is a {meta.get('kind')} file, not a model; give the run folder or a model file")
    if meta["format"] > FORMAT:
        raise UserError(f"{file} has format {meta['format']}; upgrade srwm-rl, which reads up to {FORMAT}")
    settings = meta["policy"]
    if settings["core"] not in core_names() and ":" in settings["core"]:
        raise UserError(
            f"{file} needs core {settings['core']!r}, code of your own, which no file can start: call "
            f"srwm_rl.import_core({settings['core']!r}) first, or on the command line add --core {settings['core']}"
        )
    if settings["core"] not in core_names():
        hint = did_you_mean(settings["core"], core_names())
        raise UserError(f"{file} needs core {settings['core']!r}, which is not registered{hint}")
    observation_space, action_space = (space_from_json(meta[f"{kind}_space"]) for kind in ("observation", "action"))
    policy = SRWMPolicy(observation_space, action_space, lambda _: 0.0, **settings).to(device)
    load_policy_arrays(policy, arrays, str(file))
    return Agent(policy, meta["config"], meta["num_timesteps"], file)


def _first_intact(candidates: list[Path]) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    for file in candidates[:-1]:
        try:
            return (file, *read_file(file))
        except UserError as error:
            logger.warning("%s; taking an older model", error)
    return (candidates[-1], *read_file(candidates[-1]))
