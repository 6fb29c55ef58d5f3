"""Divide a run's settings among the processes that train it together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from srwm_rl.agents.distributed import ProcessGroup, RankInfo
from srwm_rl.agents.run.checkpoint_state import fresh_seed
from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import TrainConfig

# Settings that may differ between the processes.
LOCAL_SETTINGS = {"n_threads", "progress", "verbose", "log_folder", "resume"}


def shard_config(config: TrainConfig, rank_info: RankInfo) -> TrainConfig:
    """Return the settings of one process: its environments, its share of each batch, its seed and its device.

    Raises:
        UserError: environments or batch cannot be divided evenly, or there is no device for each process.
    """
    if rank_info.size == 1:
        check_device(config.device)
        return config
    size, games = rank_info.size, len(resolve(config.env).names)
    divisor = size * games * (config.n_groups or 1)
    if config.n_envs % divisor:
        of_games = f", {games} games" if games > 1 else ""
        of_groups = f" and {config.n_groups} groups each" if divisor > size * games else ""
        raise UserError(
            f"--n-envs {config.n_envs} cannot be divided evenly among {size} processes{of_games}{of_groups}; "
            f"use a multiple of {divisor}"
        )
    length = config.sequence_length or config.n_steps
    n_sequences, batch_size = config.batch_size // length, config.batch_size
    if n_sequences % size:
        raise UserError(
            f"--batch-size {config.batch_size} holds {n_sequences} sequence(s) of {length} steps, which cannot be "
            f"divided evenly among {size} processes; use a multiple of {size * length}"
        )
    if n_sequences:  # else the trainer raises an error
        batch_size = batch_size // size if config.algo == "impala" else n_sequences // size * length
    return replace(
        config,
        n_envs=config.n_envs // size,
        batch_size=batch_size,
        seed=config.seed if rank_info.rank == 0 else fresh_seed(config.seed, rank_info.rank),
        device=_own_device(config.device, rank_info),
    )


def _own_device(device: str, rank_info: RankInfo) -> str:
    if device.startswith("cuda:"):
        raise UserError(f"--device {device} is one device for {rank_info.size} processes: use cuda, one for each")
    if check_device(device) == "cpu":
        return "cpu"
    if rank_info.local_size > torch.cuda.device_count():
        raise UserError(
            f"{rank_info.local_size} processes were started where torch finds {torch.cuda.device_count()} GPU(s): give "
            "torchrun --nproc-per-node as many as there are, or --device cpu"
        )
    return f"cuda:{rank_info.local_rank}"


def check_same(config: TrainConfig, own: TrainConfig, processes: ProcessGroup) -> None:
    """Check that all processes were started with the same settings, and on the same kind of device."""
    settings: dict[str, Any] = {**config.to_json(), "device": own.device.partition(":")[0]}
    by_rank = processes.all_gather({name: repr(settings[name]) for name in settings.keys() - LOCAL_SETTINGS})
    for rank, theirs in enumerate(by_rank):
        for name, value in sorted(by_rank[0].items()):
            if theirs.get(name) != value:
                raise UserError(
                    f"process {rank} has --{name.replace('_', '-')} {theirs.get(name)}, process 0 has {value}: start "
                    "all of them with the same options"
                )
