"""What a run is to be, said before it starts and kept with it."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.run_folder import Run

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm


def run_base(config: TrainConfig) -> Path:
    """Return `<log_folder>/<algo>_<core>/<env>`, to which `Run.create` adds a number."""
    core, env = ("".join(c if c.isalnum() or c in "-_." else "+" for c in name) for name in (config.core, config.env))
    return Path(config.log_folder) / f"{config.algo}_{core}" / env


def run_record(config: TrainConfig, processes: int = 1) -> dict[str, Any]:
    """Return what `config.json` keeps: the settings, the versions, the command, the time."""
    packages = ("srwm-rl", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib")
    return {
        "train": config.to_json(),
        "command": shlex.join(["srwm-rl", *sys.argv[1:]]),
        **({"processes": processes} if processes > 1 else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe(config: TrainConfig, model: RecurrentAlgorithm, run: Run | None) -> str:
    """Say in a few lines what will be trained."""
    from srwm_rl.envs.make import resolve
    from srwm_rl.scripts.training.build import describe_threads

    memory = model.policy.core
    n_parameters = sum(each.numel() for each in model.policy.parameters())
    floats = memory.state_layers * memory.state_size
    core = " ".join((config.core, *config.core_kwargs))
    mode = f"; mode {config.mode}" if resolve(config.env).kind == "procgen" else ""
    verb = "going on with" if run else "training"
    size = model.processes.size
    shared = f"; {size} processes, {config.n_envs // size} environments each" if size > 1 else ""
    threads = f", {describe_threads()}" if model.device.type == "cpu" else ""
    return "\n".join(
        (
            f"{verb} {config.env} for {config.n_timesteps:,} steps: {config.algo}, core {core}",
            f"  network   {model.policy.features_extractor.describe()}",
            f"            {n_parameters:,} parameters; memory {floats:,} floats per environment",
            f"  levels    {config.levels} for training, {config.eval_levels} held out; seed {config.seed}{mode}",
            f"  updates   {_updates(config, model)}{shared}",
            f"  device    {model.device}{threads}",
        )
    )


def _updates(config: TrainConfig, model: RecurrentAlgorithm) -> str:
    per_rollout = config.n_envs * config.n_steps
    rollouts = f"{config.n_envs} environments x {config.n_steps} steps"
    if config.algo == "ppo":
        return (
            f"{-(-config.n_timesteps // per_rollout):,} of {rollouts}, "
            f"{config.n_epochs} epochs of {-(-per_rollout // config.batch_size)} minibatches"
        )
    how = "in turn with playing" if config.synchronous else "while the actors play on"
    n_unrolls = config.batch_size // config.n_steps
    return f"{config.n_timesteps // config.batch_size:,} of {n_unrolls} unrolls, {how}; {rollouts} at a time"
