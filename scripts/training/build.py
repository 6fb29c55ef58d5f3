"""Build the environments and the trainer of a run, or of one of its processes, from the run's settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.agents import IMPALA, PPO, Supervised
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.distributed import ProcessGroup, RankInfo
from srwm_rl.agents.frames_at_once import FRAMES_AT_ONCE
from srwm_rl.agents.run.checkpoint_state import fresh_seed
from srwm_rl.envs.make import make_vec_env, resolve
from srwm_rl.envs.wrappers.grouped import GroupedVecEnv
from srwm_rl.envs.wrappers.reward import VecClipReward, VecNormalizeReward
from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import MIN_FRAMES_PER_THREAD, fastest_precision
from srwm_rl.nn.encoders import flatten_obs_space, is_image
from srwm_rl.ops import cpu
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import ALGO_SETTINGS, BY_REWARD, Precision, TrainConfig, pairs

# Settings with the same meaning for every trainer.
SHARED = ("n_steps", "max_grad_norm", "bptt", "on_nan", "seed", "device")
# Settings that may differ between the processes.
LOCAL_SETTINGS = {"n_threads", "progress", "verbose", "log_folder", "resume"}


def make_env(config: TrainConfig) -> VecEnv:
    """Make the training environments, in groups: memory inputs inside, reward scaling outside."""
    # None: a run from before this was one of its settings
    n_groups = config.n_groups or (2 if config.algo == "impala" and _is_divisible(config, 2) else 1)
    if n_groups > 1 and not _is_divisible(config, n_groups):
        games = len(resolve(config.env).names)
        raise UserError(
            f"--n-envs {config.n_envs} cannot be divided evenly into {n_groups} groups"
            f"{f' of {games} games' if games > 1 else ''}; use a multiple of {n_groups * games}, or another --n-groups"
        )
    size = config.n_envs // n_groups
    groups = [_make_group(config, size, config.seed + i * size) for i in range(n_groups)]
    return groups[0] if n_groups == 1 else GroupedVecEnv(groups)


def _is_divisible(config: TrainConfig, n_groups: int) -> bool:
    return config.n_envs % (n_groups * len(resolve(config.env).names)) == 0


def groups_of_new_run(config: TrainConfig) -> int:
    """Return `n_groups` for a new run, which keeps it wherever it is resumed: each group saves its own state.

    Two on a GPU, which acts for one group while the CPU steps the other. On a CPU both would compete for the cores.
    """
    return config.n_groups or (2 if on_gpu(config) and _is_divisible(config, 2) else 1)


def on_gpu(config: TrainConfig) -> bool:
    """Return whether a run computes on a GPU."""
    return get_device(config.device).type == "cuda"


def _make_group(config: TrainConfig, n_envs: int, seed: int) -> VecEnv:
    env = make_vec_env(config.env, n_envs, config.levels, seed, **config.env_settings(), on_nan=config.on_nan)
    if config.loss_reward_clip:
        return VecClipReward(env, config.loss_reward_clip)
    return VecNormalizeReward(env, config.gamma) if config.normalize_reward else env


def use_threads(
    n_threads: int | None, observation_space: spaces.Space[Any], overlapping: int = 0, on_gpu: bool = False
) -> None:
    """Set the numbers of threads of torch and of the C kernels, which use all cores unless `n_threads` is given.

    Without it torch uses one thread per core for images, one for vectors, whose operations are too small to share, and
    one beside a GPU, where more would only copy frames and slow the environments down. `overlapping` is the number of
    environments that are acted for while the policy learns; 0: acting and learning in turn.
    """
    cores = n_threads or cpu.n_threads()
    cpu.set_threads(cores)
    images = any(map(is_image, flatten_obs_space(observation_space).values()))
    # Learning and acting may each use all cores if every part of the frames is processed by one thread. Threads that
    # share an operation would wait for those that the other side has preempted.
    halved = overlapping and min(overlapping, FRAMES_AT_ONCE["cpu"]) < cores * MIN_FRAMES_PER_THREAD
    default = (max(1, cores // 2) if halved else cores) if images and not on_gpu else 1
    torch.set_num_threads(n_threads or default)


def use_deterministic_cudnn() -> None:
    """Let cuDNN run only algorithms that give the same bits every time, chosen without trials: as exact resume needs.

    SB3 does the same with a seed, but not for benchmarks. Trials choose by time, in a resumed run perhaps otherwise.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def describe_cudnn() -> str:
    """Return which algorithms cuDNN runs, such as "cuDNN deterministic"."""
    algorithms = "deterministic" if torch.backends.cudnn.deterministic else "any algorithm"
    return f"cuDNN {algorithms}{', by trial' * torch.backends.cudnn.benchmark}"


def describe_threads() -> str:
    """Return the numbers of threads on the CPU, such as "1 thread, 2 in C"."""
    in_torch, in_c = torch.get_num_threads(), cpu.n_threads()
    text = f"{in_torch} thread{'s' * (in_torch > 1)}"
    return text if in_torch == in_c else f"{text}, {in_c} in C"


def resolved_precision(config: TrainConfig) -> Precision:
    """Return the precision that "auto" stands for on this machine, or the one that is set."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if fastest_precision(get_device(config.device)) == "bfloat16" else "float32"


TRAINERS: dict[str, type[RecurrentAlgorithm]] = {"ppo": PPO, "impala": IMPALA, "supervised": Supervised}


def make_model(config: TrainConfig, env: VecEnv) -> RecurrentAlgorithm:
    """Build the trainer and its policy."""
    trainer: Any = TRAINERS[config.algo]
    return trainer("SRWMPolicy", env, **trainer_kwargs(config))  # type: ignore[no-any-return]


def trainer_kwargs(config: TrainConfig) -> dict[str, Any]:
    """Return the trainer's arguments beside the policy's name and the environments."""
    policy_kwargs: dict[str, Any] = {
        "core": config.core,
        "core_kwargs": pairs(config.core_kwargs, "core_kwargs"),
        "encoder_kwargs": {"precision": resolved_precision(config), **pairs(config.encoder_kwargs, "encoder_kwargs")},
    }
    if config.optimizer == "rmsprop":
        policy_kwargs |= {"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": {"eps": config.rms_prop_eps}}
    elif config.algo == "impala":
        policy_kwargs["optimizer_class"] = torch.optim.Adam
    rate = config.learning_rate
    names = (*SHARED, *(() if config.algo == "supervised" else BY_REWARD), *ALGO_SETTINGS[config.algo])
    settings = {name: getattr(config, name) for name in names} | {
        "learning_rate": (lambda remaining: rate * remaining) if config.lr_decay == "linear" else rate,
        "policy_kwargs": policy_kwargs,
    }
    if config.algo == "impala":
        rho_clip = config.rho_clip or None
        settings |= {"rho_clip": rho_clip, "pg_rho_clip": rho_clip, "c_clip": config.c_clip or None}
    return settings


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
