"""Logs of a run beside its own file: TensorBoard's, with the run's settings, and Weights & Biases (`--track wandb`)."""

from __future__ import annotations

import errno
import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import HParam, KVWriter, TensorBoardOutputFormat

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.config_file import settings_of_trainer
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.resume import FREE
from srwm_rl.storage.run_folder import Run, title_of
from srwm_rl.storage.run_group import is_group

SHOWN = ("n_timesteps", "preset")  # of the settings that a resumed run may change
PROJECT = "srwm-rl"
RUN_ID = "wandb_id"  # in config.json, so that a resumed run continues the same run of wandb
# What TensorBoard's page of settings shows of a run: the last value that was logged.
RESULTS = {"ppo": ("rollout/ep_rew_mean",), "impala": ("rollout/ep_rew_mean",), "supervised": ("rollout/accuracy",)}
EVALUATIONS = ("eval_train/mean_reward", "eval_test/mean_reward")  # with --eval-freq


def check_tracking(config: TrainConfig) -> None:
    """Check that what `--track` names is installed.

    Raises:
        UserError: it is not.
    """
    if config.track == "wandb" and find_spec("wandb") is None:
        raise UserError("--track wandb needs wandb: pip install 'srwm-rl[wandb]', or leave it out (--track none)")


def open_tensorboard(config: TrainConfig, folder: Path) -> TensorBoardOutputFormat:
    """Return the log for TensorBoard, with the settings for its page HPARAMS."""
    settings = {name: _scalar(value) for name, value in _settings(config).items()}
    metrics = (*RESULTS[config.algo], *(EVALUATIONS if config.eval_freq else ()))
    output = TensorBoardOutputFormat(str(folder))
    output.write({"hparams": HParam(settings, dict.fromkeys(metrics, 0.0))}, {"hparams": ()})
    return output


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what is learned."""
    settings = settings_of_trainer(config)
    return {name: value for name, value in settings.items() if name not in FREE or name in SHOWN}


def _scalar(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))


class WandbOutput(KVWriter):
    """An output of SB3's logger that logs to Weights & Biases.

    A resumed run continues the same run there; of rows that were logged before, the first stays. Runs of several seeds
    are a group. wandb's own environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline.

    Args:
        config: the run's settings.
        run: its folder, whose config.json gets the id of the run of wandb.

    Raises:
        UserError: wandb refuses to start, as without a login.
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        import wandb

        if not isinstance(run.config.get(RUN_ID), str):
            run.config[RUN_ID] = uuid.uuid4().hex[:12]
            run.write_config()
        kind = f"{config.algo}_{config.core}"
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run.config[RUN_ID],
                resume="allow",
                name=f"{kind}/{title_of(run.path)}",
                group=f"{kind}/{run.path.parent.name}" if is_group(run.path.parent) else None,
                config=_settings(config),
                dir=run.path.resolve(),
                settings=wandb.Settings(console="off", silent=not config.verbose),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--track wandb: {reason:.300} (WANDB_MODE=offline keeps the log here)") from error

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Log the numbers of a row.

        Raises:
            OSError: wandb's process has ended.
        """
        numbers = {
            key: float(value)
            for key, value in key_values.items()
            if isinstance(value, int | float | np.number) and "wandb" not in (key_excluded.get(key) or ())
        }
        try:
            self.run.log(numbers, step=step)
        except Exception as error:  # several kinds, by version
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Wait until everything is sent, or stored with WANDB_MODE=offline."""
        self.run.finish()
