"""The settings of a training run, each written once with type, default and meaning; the command line comes of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from srwm_rl.errors import UserError, did_you_mean

Arg = tyro.conf.arg
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """Train an agent, or go on with a run."""

    env: str = "coinrun"
    """A ProcGen game, several (coinrun,maze) or paper6; a task (recall, bandit, parity, repeat_previous); any
    Gymnasium id. See --env-list."""
    core: str = "srwm"
    """The agent's memory: srwm, srwm_no_carry, sr_delta, fake_sr, delta, lstm, gru, feedforward; or a class of your
    own, my_module:MyCore."""
    algo: Literal["ppo", "impala"] = "ppo"
    """The trainer: ppo, or impala, which learns while it plays on (V-trace corrects for that)."""
    n_timesteps: Annotated[int, Arg(aliases=["-n"])] = 1_000_000
    """Environment steps in all."""
    preset: str | None = None
    """A set of defaults for a purpose (quickstart, demo, paper, paper-memory); other options override it."""
    resume: str | None = None
    """Go on with this run folder, exactly; -n may be given a new value."""
    override: bool = False
    """With --resume: accept new values of the trainer's settings. The run's history keeps them."""
    verify: bool = False
    """With --resume: play the stretch between the two newest checkpoints again, compare it bit by bit, and stop."""
    supervise: bool = False
    """Train in a process of its own and start it again from the last checkpoint when it is killed, aborts or hangs."""
    hang_seconds: int = 600
    """Say where the environments are, and with --supervise start again, when no step ends for so long; 0: never."""
    dry_run: bool = False
    """Say what would be trained and stop."""
    env_list: bool = False
    """List the environments and stop."""

    n_envs: int = 64
    """Environments that step together."""
    levels: str = "0:200"
    """Training levels, start:stop; a level is a seed where the environment has no levels. "all": no limit."""
    eval_levels: str = "1000:1200"
    """Held-out levels for srwm-rl eval; must not overlap the training levels."""
    mode: str = "easy"
    """ProcGen's distribution mode: easy, hard, extreme, memory, exploration."""
    env_kwargs: tuple[str, ...] = ()
    """Further settings of the environment, as name:value."""
    inputs: tuple[Literal["action", "reward", "step"], ...] = ("action", "reward", "step")
    """What the core is shown of its own past: previous action, previous reward, step within the episode."""
    reward_clip: float = 1.0
    """Clip the previous reward that the core is shown to +- this; 0: no clipping."""
    normalize_reward: bool = True
    """Train on rewards divided by the running deviation of the return."""
    loss_reward_clip: float = 0.0
    """Train on rewards clipped to +- this, as the paper does with 1; 0: no clipping."""

    core_kwargs: tuple[str, ...] = ()
    """Settings of the core, as name:value, such as hidden_size:64 n_layers:1 variant:paper."""
    encoder_kwargs: tuple[str, ...] = ()
    """Settings of the encoder, as name:value, such as mlp:[64,64] or cnn:{"channels":[8,16,16]}."""

    learning_rate: float = 5e-4
    """The optimizer's step size."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Default: adam for ppo, rmsprop for impala."""
    rms_prop_eps: float = 0.01
    """RMSProp's epsilon; impala's loss is a sum over the batch, as published."""
    lr_decay: Literal["none", "linear"] = "none"
    """Lower the learning rate linearly to 0 over the run, or not."""
    n_steps: int = 256
    """T, steps per environment and update."""
    batch_size: int = 2048
    """Steps per minibatch; whole sequences of n_steps (or sequence_length)."""
    sequence_length: int | None = None
    """Steps per training sequence, a divisor of n_steps; None: n_steps."""
    bptt: int | None = None
    """Cut the gradient through the memory every so many steps; None: never."""
    n_epochs: int = 3
    """Passes over each rollout."""
    gamma: float = 0.999
    """Discount per step."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: float = 0.2
    """PPO's clipping of the probability ratio."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradient norm above which the gradient is scaled down."""
    target_kl: float | None = None
    """Stop an update early above this divergence; None: never."""
    vtrace_lambda: float = 1.0
    """V-trace's lambda (impala)."""
    rho_clip: float = 1.0
    """V-trace's bound on the probability ratio in targets and policy gradient (impala); 0: none."""
    c_clip: float = 1.0
    """V-trace's bound on the ratio in the trace (impala); 0: none."""
    synchronous: bool = False
    """Play, then learn, in turn (impala): the same seed gives the same run, and a resumed run is exact. Also faster
    where both want the same few cores: 1.2 times on two."""
    n_groups: int | None = None
    """Groups of environments: some step while one is acted for. None: two on a GPU, if the environments divide, and
    one on a CPU."""

    on_nan: Literal["stop", "skip"] = "stop"
    """At a number that is not finite: stop, with the last good checkpoint kept, or skip that step or update."""

    seed: int = 0
    """Of weights, actions and environments."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    precision: Precision = "auto"
    """In which the CNN computes; auto: bfloat16 where the processor has it (weights stay float32), else float32."""
    n_threads: int | None = None
    """Threads for torch; None: one per core for images (half as many where learning overlaps playing), one for
    vectors and where a GPU computes."""
    eval_freq: int = 0
    """Environment steps between evaluations on training and held-out levels while training; 0: none."""
    eval_episodes: int = 50
    """Levels of each kind and game that such an evaluation plays."""
    video_freq: int = 0
    """Environment steps between films of a held-out level, in the run's folder videos/; 0: none."""
    save_freq: int = 200_000
    """Environment steps between checkpoints (one is also written every ten minutes, and at the end)."""
    log_folder: Annotated[str, Arg(aliases=["-f"])] = "logs"
    """Where run folders are made: <log_folder>/<algo>_<core>/<env>_<n>."""
    profile: bool = False
    """Time the parts of three updates, print the table, and write a trace of one update for the browser."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a live progress bar."""
    verbose: int = 1
    """0: errors only, 1: the plan and the result, 2: tracebacks too."""

    def __post_init__(self) -> None:
        for name in ("n_timesteps", "n_envs", "n_steps", "batch_size", "n_epochs", "save_freq", "eval_episodes"):
            _at_least_one(name, getattr(self, name))
        for name in ("sequence_length", "bptt", "n_threads", "n_groups"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}], not {value:g}")
        for name in ("env_kwargs", "core_kwargs", "encoder_kwargs"):
            pairs(getattr(self, name), name)
        if self.normalize_reward and self.loss_reward_clip:
            raise UserError("--loss-reward-clip clips raw rewards: give --no-normalize-reward too, or leave it out")
        for name in ("override", "verify"):
            if getattr(self, name) and self.resume is None:
                raise UserError(f"--{name} is for a run that goes on: give --resume RUN too")
        for algo, names in ONLY.items():
            for field in fields(self):
                if field.name in names and algo != self.algo and getattr(self, field.name) != field.default:
                    raise UserError(f"--{field.name.replace('_', '-')} is a setting of {algo}, not of {self.algo}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings in JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainConfig:
        """Rebuild what `to_json` gave.

        Raises:
            UserError: unknown or unfit settings.
        """
        if not isinstance(data, dict):
            raise UserError("the run's settings are damaged; give another run")
        known = {field.name: field.default for field in fields(cls)}
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        for name, value in settings.items():
            if name not in known:
                raise UserError(
                    f"the run's settings have an unknown name {name!r}; it is from another version of srwm-rl"
                )
            if not _same_type(value, known[name]):
                raise UserError(f"the run's settings are damaged: {name} cannot be {value!r}; give another run")
        return cls(**settings)


# What only one trainer has.
ONLY = {
    "ppo": ("n_epochs", "sequence_length", "gae_lambda", "clip_range", "target_kl"),
    "impala": ("vtrace_lambda", "rho_clip", "c_clip", "synchronous"),
}
RANGES = (
    ("gamma", 0.0, 1.0),
    ("gae_lambda", 0.0, 1.0),
    ("learning_rate", 0.0, 1e3),
    ("clip_range", 0.0, 1e3),
    ("ent_coef", 0.0, 1e3),
    ("vf_coef", 0.0, 1e3),
    ("max_grad_norm", 0.0, 1e9),
    ("reward_clip", 0.0, 1e9),
    ("loss_reward_clip", 0.0, 1e9),
    ("vtrace_lambda", 0.0, 1.0),
    ("rho_clip", 0.0, 1e9),
    ("c_clip", 0.0, 1e9),
    ("rms_prop_eps", 0.0, 1e3),
    ("target_kl", 0.0, 1e3),
    ("hang_seconds", 0, 10**6),
    ("eval_freq", 0, 10**12),
    ("video_freq", 0, 10**12),
    ("seed", 0, 2**31 - 1),
)


def _same_type(value: Any, default: Any) -> bool:
    if default is None or type(value) is type(default):
        return not isinstance(value, tuple) or all(isinstance(each, str) for each in value)
    return isinstance(default, float) and type(value) is int


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


# The defaults above follow the ProcGen paper (https://arxiv.org/abs/1912.01588, appendix D). Environments of another
# kind have vectors to observe and seeds for levels: a small network, short updates, more levels.
_OTHER: dict[str, Any] = {
    "levels": "0:1000000",
    "eval_levels": "1000000:1001000",
    "gamma": 0.99,
    "learning_rate": 1e-3,
    "lr_decay": "linear",  # at a constant rate a solved task is now and then unlearned again
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
# IMPALA learns from every step once: shorter unrolls, and the optimizer, bounds and rates of the published setting.
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
    # Several times the published rate: networks this small take it, and bandits are learned better.
    "task": {**IMPALA, "n_steps": 16, "batch_size": 256, "learning_rate": 4e-3},
    "gymnasium": {**IMPALA, "n_steps": 32, "batch_size": 256, "learning_rate": 4e-3},
}
# IDSIA/modern-srwm, reinforcement_learning/README.md and torchbeast_procgen: the published RL agent and its training.
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
# Where answers change nothing but their own reward, a discount of 0 says so and takes away the noise of later rewards.
# Five times the usual rate then decides within minutes; with ten times as much some seeds are lost. A rollout holds
# whole episodes, so that no gradient ends inside one. Among four suits, a larger entropy bonus keeps an agent from
# settling early on some of them.
_ANSWERS: dict[str, Any] = {"gamma": 0.0, "gae_lambda": 0.0, "learning_rate": 5e-3}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "parity": {**_ANSWERS, "n_steps": 40, "batch_size": 400},
    "repeat_previous": {**_ANSWERS, "ent_coef": 0.05, "n_steps": 51, "batch_size": 510},
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_PAPER, "env": "paper6"},
    "paper-memory": {**_PAPER, "env": "dodgeball,heist,maze,miner", "mode": "memory", "levels": "0:500"},
    "quickstart": {"env": "recall", "n_timesteps": 1_000_000},
    "demo": {
        "env": "coinrun",
        "n_timesteps": 300_000,
        "n_envs": 32,
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 2,
        # A third of the published CNN's arithmetic, so that minutes on two cores show something.
        "encoder_kwargs": ('cnn:{"channels":[8,16,16]}',),
    },
}


HEADLESS = ("lstm", "gru", "feedforward")  # the cores without heads
PAPER_CORES = ("srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta")  # those that have a published variant


def defaults(env: str | None, preset: str | None, core: str | None = None, algo: str | None = None) -> TrainConfig:
    """Return the defaults for a kind of environment, a preset, a core and a trainer.

    Raises:
        UserError: an unknown preset or environment.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
    chosen = PRESETS[preset] if preset else {}
    env = env or chosen.get("env", TrainConfig.env)
    from srwm_rl.envs.make import resolve
    from srwm_rl.envs.tasks import TASKS

    kind = resolve(env).kind
    of_env = {"inputs": TASKS[env].memory_inputs, **TASK_SETTINGS.get(env, {})} if kind == "task" else {}
    algo = algo or chosen.get("algo") or TrainConfig.algo
    of_algo = IMPALA_KINDS[kind] if algo == "impala" else {}
    settings: dict[str, Any] = {**KINDS[kind], **of_algo, **of_env, **chosen, "env": env, "preset": preset}
    if algo in ONLY:  # an unknown one is refused by name later
        foreign = {name for other, names in ONLY.items() if other != algo for name in names}
        settings = {name: value for name, value in settings.items() if name not in foreign}
    if chosen.get("algo", algo) != algo:
        raise UserError(f"preset {preset!r} trains with {chosen['algo']}; leave out --algo, or choose no preset")
    if preset in ("paper", "paper-memory") and (core or TrainConfig.core) in PAPER_CORES:
        settings["core_kwargs"] = ("variant:paper",)
    of_core = settings.get("core_kwargs", ())
    if core in HEADLESS:
        settings["core_kwargs"] = tuple(each for each in of_core if not each.startswith("n_heads:"))
    elif core and ":" in core:  # its settings are its own
        settings["core_kwargs"] = ()
    return TrainConfig(**settings)


def pairs(texts: tuple[str, ...], option: str) -> dict[str, Any]:
    """Read `name:value` texts; a value is JSON where it can be read as such, else text.

    Raises:
        UserError: a text without a name or a colon.
    """
    result: dict[str, Any] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name or not value:
            raise UserError(f"--{option.replace('_', '-')} takes name:value, not {text!r}")
        try:
            result[name] = json.loads(value)
        except ValueError:
            result[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return result
