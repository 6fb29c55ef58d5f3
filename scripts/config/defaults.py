"""Default settings per kind of environment, task and algorithm, and the presets."""

from __future__ import annotations

from typing import Any

from srwm_rl.envs.make import resolve
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.config.settings import ALGO_SETTINGS, TrainConfig

# The defaults of `TrainConfig` follow the ProcGen paper (https://arxiv.org/abs/1912.01588, appendix D). Other kinds of
# environments have vector observations and seeds for levels: a small network, short rollouts, more levels.
_OTHER: dict[str, Any] = {
    "levels": "0:1000000",
    "eval_levels": "1000000:1001000",
    "gamma": 0.99,
    "learning_rate": 1e-3,
    "lr_decay": "linear",  # at a constant rate a solved task is sometimes unlearned
    "batch_size": 512,
}
KINDS: dict[str, dict[str, Any]] = {
    "procgen": {},
    "task": {
        **_OTHER,
        "n_steps": 32,
        "normalize_reward": False,
        "core_kwargs": ("hidden_size:32", "n_layers:1", "n_heads:4"),
    },
    "gymnasium": {
        **_OTHER,
        "n_envs": 16,
        "n_steps": 128,
        "n_epochs": 8,
        "ent_coef": 0.0,
        "core_kwargs": ("hidden_size:64", "n_layers:1"),
    },
}
# IMPALA uses every step once: shorter unrolls, and the optimizer, clipping and rates of the published setting.
IMPALA: dict[str, Any] = {
    "algo": "impala",
    "optimizer": "rmsprop",
    "learning_rate": 6e-4,
    "lr_decay": "linear",
    "max_grad_norm": 40.0,
    "gamma": 0.99,
}
IMPALA_KINDS: dict[str, dict[str, Any]] = {
    "procgen": {**IMPALA, "n_steps": 50, "batch_size": 1600},
    # Several times the published rate: such small networks remain stable, and bandits are learned better.
    "task": {**IMPALA, "n_steps": 16, "batch_size": 256, "learning_rate": 4e-3},
    "gymnasium": {**IMPALA, "n_steps": 32, "batch_size": 256, "learning_rate": 4e-3},
}
# The published RL agent: IDSIA/modern-srwm, reinforcement_learning/README.md and torchbeast_procgen.
_PAPER: dict[str, Any] = {
    **IMPALA,
    "n_timesteps": 50_000_000,
    "n_envs": 48,
    "n_steps": 50,
    "batch_size": 32 * 50,
    "inputs": ("reward",),
    "normalize_reward": False,
    "loss_reward_clip": 1.0,
}
# Actions affect only their own reward: a discount of 0 removes the noise of later rewards. Five times the usual rate
# then learns within minutes; with ten times some seeds fail. A rollout holds whole episodes, so that no gradient is cut
# inside one. repeat_previous: a larger entropy bonus prevents early convergence to some of the four suits.
# associative_recall: 1.00 after 1 M steps with normalised rewards (2 seeds), 0.79 without (1 seed).
_PER_STEP: dict[str, Any] = {"gamma": 0.0, "gae_lambda": 0.0, "learning_rate": 5e-3}
# Trials of several attempts: a rollout holds a whole trial. With a lambda near 1 the luck of later attempts is noise in
# the advantages of the earlier ones.
_TRIAL: dict[str, Any] = {"gae_lambda": 0.3, "ent_coef": 0.02, "normalize_reward": True}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "parity": {**_PER_STEP, "n_steps": 40, "batch_size": 400},
    "repeat_previous": {**_PER_STEP, "ent_coef": 0.05, "n_steps": 51, "batch_size": 510},
    "associative_recall": {**_PER_STEP, "n_steps": 40, "batch_size": 640, "normalize_reward": True},
    "hidden_controls": {**_TRIAL, "gamma": 0.9, "learning_rate": 5e-3, "n_steps": 72, "batch_size": 16 * 72},
    "mdp": {**_TRIAL, "gamma": 0.95, "learning_rate": 3e-3, "n_steps": 100, "batch_size": 16 * 100},
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_PAPER, "env": "paper6"},
    "paper-memory": {**_PAPER, "env": "dodgeball,heist,maze,miner", "mode": "memory", "levels": "0:500"},
    "quickstart": {"env": "recall", "n_timesteps": 1_000_000},
    "demo": {
        "env": "starpilot",  # on CoinRun the same settings learn no more than one constant action earns
        "n_timesteps": 300_000,
        "n_envs": 32,
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 2,
        # A third of the published CNN's FLOPs, so that minutes on two cores are enough to learn something.
        "encoder_kwargs": ('cnn:{"channels":[8,16,16]}',),
    },
}


HEADLESS = ("lstm", "gru", "feedforward")  # cores without n_heads
PAPER_CORES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta")  # cores with variant:paper


def defaults(env: str | None, preset: str | None, core: str | None = None, algo: str | None = None) -> TrainConfig:
    """Return the default settings for an environment, a preset, a core and an algorithm; None: not chosen.

    Raises:
        UserError: an unknown preset or environment, or a preset of another algorithm.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
    chosen = PRESETS[preset] if preset else {}
    env = env or chosen.get("env", TrainConfig.env)
    algo = algo or chosen.get("algo") or TrainConfig.algo
    if chosen.get("algo", algo) != algo:
        raise UserError(f"preset {preset!r} trains with {chosen['algo']}; leave out --algo, or choose no preset")
    kind = resolve(env).kind
    settings: dict[str, Any] = {**KINDS[kind]}
    if algo == "impala":
        settings |= IMPALA_KINDS[kind]
    if kind == "task":
        settings |= {"inputs": TASKS[env].memory_inputs, **TASK_SETTINGS.get(env, {})}
    settings |= {**chosen, "env": env, "preset": preset}
    for owner, names in ALGO_SETTINGS.items():
        if algo in ALGO_SETTINGS and algo != owner:  # an unknown algorithm is refused when the command line is parsed
            settings = {name: value for name, value in settings.items() if name not in names}
    if preset in ("paper", "paper-memory") and (core or TrainConfig.core) in PAPER_CORES:
        settings["core_kwargs"] = ("variant:paper",)
    if core in HEADLESS:
        settings["core_kwargs"] = tuple(
            text for text in settings.get("core_kwargs", ()) if not text.startswith("n_heads:")
        )
    elif core and ":" in core:  # a user's core has settings of its own
        settings["core_kwargs"] = ()
    return TrainConfig(**settings)
