"""Default settings per kind of environment, task and algorithm, and the presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from srwm_rl.envs.make import resolve, short_name
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.config.settings import ALGO_SETTINGS, BY_REWARD, KWARGS, TrainConfig, merged_pairs
from srwm_rl.scripts.config.tuned import NONE, TUNED, tuned_for

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
    # All of 10 seeds solve recall, parity and repeat_previous (docs/results/README.md). With a lambda near 1, later
    # steps' luck is noise in an advantage.
    "task": {
        **_OTHER,
        "n_steps": 64,
        "gamma": 0.95,
        "gae_lambda": 0.3,
        "learning_rate": 5e-3,
        "ent_coef": 0.02,
        "core_kwargs": ("hidden_size:32", "n_layers:1"),
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
    "task": {
        **IMPALA,
        "n_steps": 16,
        "batch_size": 256,
        "learning_rate": 4e-3,
        "ent_coef": 0.01,
        "normalize_reward": False,
    },
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
# Trials of several attempts: a rollout holds a whole one.
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "associative_recall": {"gamma": 0.0, "gae_lambda": 0.0, "n_steps": 40, "batch_size": 640},
    "hidden_controls": {"gamma": 0.9, "n_steps": 72, "batch_size": 16 * 72},
    # Rewards are normal around means of 1 +- 1: clipped to 1, most would look alike.
    "mdp": {"learning_rate": 3e-3, "n_steps": 100, "batch_size": 16 * 100, "reward_clip": 0.0},
}
# Of PPO with other memories, in all tasks (None) or in one: as many parameters as the SRWM has, and the learning rates
# that were the best of those tried (docs/results/README.md).
TASK_CORES: dict[tuple[str | None, str | None], dict[str, Any]] = {
    (None, "gru"): {"learning_rate": 1e-2, "core_kwargs": ("hidden_size:38", "n_layers:1")},
    (None, "lstm"): {"core_kwargs": ("hidden_size:30", "n_layers:1")},
    ("hidden_controls", "lstm"): {"learning_rate": 2e-2},
}
# Actions affect only their own reward: a discount of 0 removes the noise of later rewards. A rollout holds whole
# episodes, so that no gradient is cut inside one. repeat_previous: a larger entropy bonus prevents early convergence to
# some of the four suits.
_PER_STEP: dict[str, Any] = {"gamma": 0.0, "learning_rate": 5e-3}
IMPALA_TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "parity": {**_PER_STEP, "n_steps": 40, "batch_size": 400},
    "repeat_previous": {**_PER_STEP, "ent_coef": 0.05, "n_steps": 51, "batch_size": 510},
}
# Learning from right answers: no rewards, and no inputs that would be right answers.
SUPERVISED: dict[str, Any] = {
    "algo": "supervised",
    "n_steps": 64,
    "learning_rate": 2e-2,
    "lr_decay": "linear",
    "max_grad_norm": 1.0,
    "normalize_reward": False,
    "core_kwargs": ("hidden_size:32", "n_layers:1"),
}
_CONV4 = 'cnn:{"kind":"conv4","channels":[32,32,32,32],"first_stride":2,"standardize":true}'
SUPERVISED_TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "parity": {"n_steps": 40},
    "repeat_previous": {"n_steps": 51},
    "associative_recall": {"n_steps": 40},
    "fewshot": {
        "n_envs": 16,
        "n_steps": 52,  # the longest episode of the task's own settings
        "learning_rate": 5e-3,
        "aux_coef": 0.5,
        "core_kwargs": ("hidden_size:128", "n_layers:1"),
        "encoder_kwargs": ("mlp:[]", "vector_scale:6", _CONV4),
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_PAPER, "env": "paper6"},
    "paper-memory": {**_PAPER, "env": "dodgeball,heist,maze,miner", "mode": "memory", "levels": "0:500"},
    "quickstart": {"env": "recall", "n_timesteps": 1_000_000},
    # For a quarter of an hour and more on a CPU; in minutes the demo's smaller CNN learns as much (docs/procgen.md).
    "procgen-cpu": {
        "n_timesteps": 2_000_000,
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 1,
        "learning_rate": 1e-3,
        "lr_decay": "linear",  # at a constant rate StarPilot levels off at 6; when it falls the return rises at once
        "encoder_kwargs": ('cnn:{"kind":"patch"}',),
    },
    "demo": {
        "env": "starpilot",  # on CoinRun the same settings learn no more than one constant action earns
        "n_timesteps": 200_000,
        "n_envs": 32,
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 1,
        "learning_rate": 1e-3,
        # A step takes a quarter of the time that it takes with an IMPALA CNN of half the published widths.
        "encoder_kwargs": ('cnn:{"kind":"nature","channels":[16,32,32]}',),
    },
}


HEADLESS = ("lstm", "gru", "feedforward")  # cores without n_heads
EDITING_CORES = ("srwm", "srwm_no_carry", "sr_delta")  # cores that edit their own weight
EDITING_HEADS = ("n_heads:2", "key_init:2", "edit_lr_multiplier:3")  # found together with the settings of tasks
# Of few-shot learning: layers that are an associative memory before training.
FEW_SHOT_LAYERS = {
    **dict.fromkeys(EDITING_CORES, ("n_heads:4", "norm:residual", "query_init:1", "identity_init:2")),
    "delta": ("n_heads:4", "norm:residual", "identity_init:2"),
    "fake_sr": ("n_heads:4", "norm:residual"),
}
SIZES = ("hidden_size", "n_layers", "n_heads")  # default settings of a core that its `variant` does not decide
PAPER_CORES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta")  # cores with variant:paper


def defaults(
    env: str | None, preset: str | None, core: str | None = None, algo: str | None = None, atari: bool = False
) -> TrainConfig:
    """Return the default settings for an environment, a preset, a core and an algorithm; None: not chosen.

    `atari`: with --atari, which skips frames itself and clips rewards in training.

    Raises:
        UserError: an unknown preset or environment, a preset of another algorithm, or no tuned settings.
    """
    chosen = _preset(preset, env, core)
    env = short_name(env or chosen.get("env", TrainConfig.env))
    algo = algo or chosen.get("algo") or default_algo(env)
    if chosen.get("algo", algo) != algo:
        raise UserError(f"preset {preset!r} trains with {chosen['algo']}; leave out --algo, or choose no preset")
    kind = resolve(env).kind
    settings: dict[str, Any] = {**KINDS[kind]}
    if algo == "impala":
        settings |= IMPALA_KINDS[kind]
    if kind == "task":
        others = TASK_CORES if algo == "ppo" else {}
        settings |= {"inputs": TASKS[env].memory_inputs, **others.get((None, core), {})}
        settings |= {**TASK_SETTINGS.get(env, {}), **others.get((env, core), {})}
        if algo == "supervised":
            settings |= {**SUPERVISED, **SUPERVISED_TASK_SETTINGS.get(env, {})}
            settings["inputs"] = tuple(name for name in settings["inputs"] if name not in ("action", "reward"))
        settings["core_kwargs"] += _heads(core or TrainConfig.core, algo)
        if algo == "supervised" and env == "fewshot":
            layers = FEW_SHOT_LAYERS.get(core or TrainConfig.core, ())
            settings["core_kwargs"] = merged_pairs(settings["core_kwargs"], layers)
        if algo == "impala":
            settings |= IMPALA_TASK_SETTINGS.get(env, {})
    if atari:
        settings |= {"atari": True, "normalize_reward": False, "loss_reward_clip": 1.0}
        settings["env_kwargs"] = ("frameskip:1",) if env.startswith("ALE/") else ()
    parts = {name: merged_pairs(settings.get(name, ()), chosen[name]) for name in KWARGS if name in chosen}
    settings |= {**chosen, **parts, "env": env, "preset": preset}
    for owner, names in ALGO_SETTINGS.items():
        if algo in ALGO_SETTINGS and algo != owner:  # an unknown algorithm is refused when the command line is parsed
            settings = {name: value for name, value in settings.items() if name not in names}
    if preset in ("paper", "paper-memory") and (core or TrainConfig.core) in PAPER_CORES:
        settings["core_kwargs"] = ("variant:paper",)
    if core and (":" in core or core == "prototype"):  # settings of its own
        settings["core_kwargs"] = ()
    n_envs, n_games = settings.get("n_envs", TrainConfig.n_envs), len(resolve(env).names)
    settings["n_envs"] = -(-n_envs // n_games) * n_games  # as many of each game
    return TrainConfig(**settings)


def default_algo(env: str | None) -> Literal["ppo", "impala", "supervised"]:
    """Return the trainer of an environment where none is chosen: few-shot episodes are learned from right answers."""
    return "supervised" if env is not None and short_name(env) == "fewshot" else TrainConfig.algo


def _preset(preset: str | None, env: str | None, core: str | None) -> dict[str, Any]:
    if preset in (None, NONE):
        return {}
    if preset == TUNED:
        env, core = env or TrainConfig.env, core or TrainConfig.core
        if (tuned := tuned_for(env, core)) is None:
            raise UserError(f"there are no tuned settings of {env} with core {core}; leave out --preset {TUNED}")
        return tuned.settings
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(str(preset), [*PRESETS, TUNED, NONE])}")
    return PRESETS[preset]


def with_defaults(config: TrainConfig, default: TrainConfig) -> TrainConfig:
    """Return the settings of a command line with the `name:value` settings that it leaves out, from its defaults.

    A `variant` that is given decides the core's layers: of the defaults only the sizes are kept.

    Raises:
        UserError: a setting of learning by reward is given to the supervised trainer.
    """
    for name in BY_REWARD if config.algo == "supervised" else ():
        if getattr(config, name) != getattr(default, name):
            option, hint = f"--{name.replace('_', '-')}", "leave it out, or give --algo ppo"
            raise UserError(f"{option} is a setting of ppo and impala, not of supervised: {hint}")
    merged: dict[str, Any] = {name: merged_pairs(getattr(default, name), getattr(config, name)) for name in KWARGS}
    is_new = config.core_kwargs != default.core_kwargs  # not those of a resumed run
    if is_new and any(text.startswith("variant:") for text in config.core_kwargs):
        sizes = tuple(text for text in default.core_kwargs if text.partition(":")[0] in SIZES)
        merged["core_kwargs"] = merged_pairs(sizes, config.core_kwargs)
    return replace(config, **merged)


def _heads(core: str, algo: str) -> tuple[str, ...]:
    """Return the settings of the heads in a core for tasks."""
    if core in HEADLESS:
        return ()
    return EDITING_HEADS if algo == "ppo" and core in EDITING_CORES else ("n_heads:4",)
