"""From a run's settings to its environments and its trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import ONLY, Precision, TrainConfig, pairs

if TYPE_CHECKING:
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import VecEnv

    from srwm_rl.agents.base import RecurrentAlgorithm

# Settings that mean the same to every trainer.
SHARED = ("n_steps", "batch_size", "gamma", "ent_coef", "vf_coef", "max_grad_norm", "bptt", "on_nan", "seed", "device")


def make_env(config: TrainConfig) -> VecEnv:
    """Make the training environments, in groups: memory inputs inside, reward scaling outside.

    Raises:
        UserError: settings that do not fit the environment.
    """
    n_groups = _n_groups(config)
    if n_groups == 1:
        return _make_group(config, config.n_envs, config.seed)
    from srwm_rl.envs.wrappers.grouped import GroupedVecEnv

    each = config.n_envs // n_groups
    return GroupedVecEnv([_make_group(config, each, config.seed + i * each) for i in range(n_groups)])


def _n_groups(config: TrainConfig) -> int:
    if config.n_groups is None:  # a run from before its settings said it
        return 2 if config.algo == "impala" and _halves(config) else 1
    games = _n_games(config)
    if config.n_groups > 1 and config.n_envs % (config.n_groups * games):
        of_games = f" of {games} games" if games > 1 else ""
        raise UserError(
            f"--n-envs {config.n_envs} cannot be divided evenly into {config.n_groups} groups{of_games}; "
            f"use a multiple of {config.n_groups * games}, or another --n-groups"
        )
    return config.n_groups


def _halves(config: TrainConfig) -> bool:
    return config.n_envs % (2 * _n_games(config)) == 0


def _n_games(config: TrainConfig) -> int:
    from srwm_rl.envs.make import resolve

    return len(resolve(config.env).names)


def groups_of_new_run(config: TrainConfig) -> int:
    """Return the `n_groups` that a new run keeps; it is resumed with them anywhere, for each group saves its own state.

    Two on a GPU, which acts for one group while the processor steps the other. On a CPU both would want the same cores.
    """
    if config.n_groups is not None:
        return config.n_groups
    return 2 if on_gpu(config) and _halves(config) else 1


def on_gpu(config: TrainConfig) -> bool:
    """Say whether a run computes on a GPU."""
    from stable_baselines3.common.utils import get_device

    return get_device(config.device).type == "cuda"


def _make_group(config: TrainConfig, n_envs: int, seed: int) -> VecEnv:
    from srwm_rl.envs.make import make_vec_env
    from srwm_rl.envs.wrappers.reward import VecClipReward, VecNormalizeReward

    env = make_vec_env(
        config.env,
        n_envs,
        config.levels,
        seed,
        config.mode,
        pairs(config.env_kwargs, "env_kwargs"),
        config.inputs,
        config.reward_clip or None,
        config.on_nan,
    )
    if config.loss_reward_clip:
        return VecClipReward(env, config.loss_reward_clip)
    return VecNormalizeReward(env, config.gamma) if config.normalize_reward else env


def use_threads(
    n_threads: int | None, observation_space: spaces.Space[Any], overlapping: int = 0, on_gpu: bool = False
) -> None:
    """Give torch its threads; None: one per core for images, and for vectors one, for their operations are too small.

    The C kernels take longer at a time, and share their work even so.

    Args:
        n_threads: as many, whatever is done with them.
        observation_space: what the encoder reads.
        overlapping: how many environments are acted for while the policy learns from others' steps; 0: in turn.
        on_gpu: whether a GPU computes: then torch's threads would only copy frames, in the environments' way.
    """
    import torch

    from srwm_rl.agents.base import FRAMES_AT_ONCE
    from srwm_rl.nn.encoders import LEAST, flatten_obs_space, is_image
    from srwm_rl.ops.cpu import n_threads as kernel_threads
    from srwm_rl.ops.cpu import set_threads

    cores = n_threads or kernel_threads()
    set_threads(cores)
    images = any(map(is_image, flatten_obs_space(observation_space).values()))
    # Learning and playing may have all cores each where a part of the frames is the work of one thread: whoever has
    # something to do gets a core. Threads that share an operation would wait for those that have none.
    divided = overlapping and min(overlapping, FRAMES_AT_ONCE["cpu"]) < cores * LEAST
    torch.set_num_threads(n_threads or ((max(1, cores // 2) if divided else cores) if images and not on_gpu else 1))


def describe_threads() -> str:
    """Say how many threads work on the CPU, such as "1 thread, 2 in C"."""
    import torch

    from srwm_rl.ops.cpu import n_threads

    of_torch, of_c = torch.get_num_threads(), n_threads()
    said = f"{of_torch} thread{'s' * (of_torch > 1)}"
    return said if of_torch == of_c else f"{said}, {of_c} in C"


def resolved_precision(config: TrainConfig) -> Precision:
    """Return what "auto" means on this machine."""
    if config.precision != "auto":
        return config.precision
    from stable_baselines3.common.utils import get_device

    from srwm_rl.nn.encoders import fastest_precision

    return "bfloat16" if fastest_precision(get_device(config.device)) == "bfloat16" else "float32"


def make_model(config: TrainConfig, env: VecEnv) -> RecurrentAlgorithm:
    """Build the trainer and its policy.

    Raises:
        UserError: settings that do not fit.
    """
    import torch

    from srwm_rl.agents import IMPALA, PPO

    rate = config.learning_rate
    policy_kwargs: dict[str, Any] = {
        "core": config.core,
        "core_kwargs": pairs(config.core_kwargs, "core_kwargs"),
        "encoder_kwargs": {
            "precision": resolved_precision(config),
            **pairs(config.encoder_kwargs, "encoder_kwargs"),
        },
    }
    if config.optimizer == "rmsprop":
        policy_kwargs |= {"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": {"eps": config.rms_prop_eps}}
    elif config.algo == "impala":
        policy_kwargs["optimizer_class"] = torch.optim.Adam
    shared = {name: getattr(config, name) for name in SHARED}
    shared |= {
        "learning_rate": (lambda remaining: rate * remaining) if config.lr_decay == "linear" else rate,
        "policy_kwargs": policy_kwargs,
    }
    if config.algo == "ppo":
        return PPO("SRWMPolicy", env, **shared, **{name: getattr(config, name) for name in ONLY["ppo"]})
    rho_clip = config.rho_clip or None
    return IMPALA(
        "SRWMPolicy",
        env,
        **shared,
        vtrace_lambda=config.vtrace_lambda,
        rho_clip=rho_clip,
        pg_rho_clip=rho_clip,
        c_clip=config.c_clip or None,
        synchronous=config.synchronous,
    )
