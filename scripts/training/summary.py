"""The description of a run: printed before it starts, and stored with it."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.envs.make import resolve
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import describe_threads
from srwm_rl.storage.run_folder import Run


def run_base(config: TrainConfig) -> Path:
    """Return `<log_folder>/<algo>_<core>/<env>`, to which `Run.create` adds a number."""
    core, env = ("".join(c if c.isalnum() or c in "-_." else "+" for c in name) for name in (config.core, config.env))
    return Path(config.log_folder) / f"{config.algo}_{core}" / env


def run_record(config: TrainConfig, processes: int = 1) -> dict[str, Any]:
    """Return the content of `config.json`: the settings, the versions, the command and the time."""
    packages = ("srwm-rl", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib")
    return {
        "train": config.to_json(),
        "command": shlex.join(["srwm-rl", *sys.argv[1:]]),
        **({"processes": processes} if processes > 1 else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe(config: TrainConfig, model: RecurrentAlgorithm, run: Run | None) -> str:
    """Return a few lines that describe what will be trained."""
    memory = model.policy.core
    n_parameters = sum(parameter.numel() for parameter in model.policy.parameters())
    core = " ".join((config.core, *config.core_kwargs))
    mode = f"; mode {config.mode}" if resolve(config.env).kind == "procgen" else ""
    size = model.processes.size
    processes = f"; {size} processes, {config.n_envs // size} environments each" if size > 1 else ""
    threads = f", {describe_threads()}" if model.device.type == "cpu" else ""
    verb = "resuming" if run else "training"
    return "\n".join(
        (
            f"{verb} {config.env} for {config.n_timesteps:,} steps: {config.algo}, core {core}",
            f"  network   {model.policy.features_extractor.describe()}",
            f"            {n_parameters:,} parameters; memory {memory.state_layers * memory.state_size:,} floats per "
            "environment",
            f"  levels    {config.levels} for training, {config.eval_levels} held out; seed {config.seed}{mode}",
            f"  updates   {_updates(config)}{processes}",
            f"  device    {model.device}{threads}",
        )
    )


def _updates(config: TrainConfig) -> str:
    per_rollout = config.n_envs * config.n_steps
    rollouts = f"{config.n_envs} environments x {config.n_steps} steps"
    if config.algo == "ppo":
        return (
            f"{ceil(config.n_timesteps / per_rollout):,} of {rollouts}, "
            f"{config.n_epochs} epochs of {ceil(per_rollout / config.batch_size)} minibatches"
        )
    order = "in turn with playing" if config.synchronous else "while the actors play on"
    n_unrolls = config.batch_size // config.n_steps
    return f"{config.n_timesteps // config.batch_size:,} of {n_unrolls} unrolls, {order}; {rollouts} at a time"
