"""Convert a checkpoint of the published RL code to a run folder, for `srwm-rl eval` and the other commands."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from srwm_rl.errors import UserError
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.official.checkpoint import OfficialCheckpoint, read_checkpoint
from srwm_rl.official.policy import build_policy
from srwm_rl.storage.model_file import save_model
from srwm_rl.storage.run_folder import CHECKPOINTS, Run
from srwm_rl.storage.safe_file import TEMPORARY


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
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    try:
        _write(temporary, checkpoint, policy)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run_folder}: {error.strerror}; choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(run_folder)


def _write(folder: Path, checkpoint: OfficialCheckpoint, policy: SRWMPolicy) -> None:
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
        "file": checkpoint.path.name,
        "n_weights": sum(weight.size for weight in checkpoint.weights.values()),
        "notes": list(checkpoint.notes),
    }
    (folder / CHECKPOINTS).mkdir(parents=True)
    run = Run(folder, {"train": settings, "imported": facts})
    run.write_config()
    save_model(run.file("model", checkpoint.num_timesteps), policy, settings, checkpoint.num_timesteps)


def _texts(settings: dict[str, Any]) -> list[str]:
    return [f"{name}:{value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
