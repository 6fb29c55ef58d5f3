"""The settings of a training run: type, default, documentation and checks. The command line is derived from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
from msgspec import Meta

from srwm_rl.envs.make import short_name
from srwm_rl.envs.wrappers.named_wrapper import NamedWrapper
from srwm_rl.errors import UserError

Arg = tyro.conf.arg
Precision = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Meta(ge=1)]
# Bounds far above any useful value, far below what exhausts a machine's memory: files hold these settings, too.
Number = Annotated[int, Meta(ge=1, le=2**16)]
Steps = Annotated[int, Meta(ge=1, le=10**15)]
Length = Annotated[int, Meta(ge=1, le=2**20)]
Frequency = Annotated[int, Meta(ge=0, le=10**12)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Coefficient = Annotated[float, Meta(ge=0, le=1e3)]
Seed = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Limit = Annotated[float, Meta(ge=0, le=1e9)]
Wrappers = tuple[tuple[str, ...], ...]
"""Of each wrapper the module and the class, "module:Class", then its keyword arguments, "name:value"."""


@dataclass(frozen=True)
class TrainConfig:
    """Train an agent, or resume a run."""

    env: str = "coinrun"
    """A ProcGen game, several (coinrun,maze) or paper6; a task (recall, bandit, parity, repeat_previous,
    associative_recall, hidden_controls, mdp, fewshot); any Gymnasium id. See --env-list."""
    core: str = "srwm"
    """The agent's memory: srwm, srwm_no_carry, sr_delta, fake_sr, delta, lstm, gru, feedforward; of few-shot episodes
    also prototype; or a class of your own, my_module:MyCore."""
    algo: Literal["ppo", "impala", "supervised"] = "ppo"
    """The trainer: ppo; impala, whose actors play on while it learns (V-trace corrects for the lag); or supervised, by
    right answers, for tasks that have them: recall, parity, repeat_previous, associative_recall, and fewshot, for
    which it is the default."""
    n_timesteps: Annotated[Steps, Arg(aliases=["-n"])] = 1_000_000
    """Environment steps in all, rounded up to whole rollouts of n_envs * n_steps."""
    preset: str | None = None
    """A set of defaults: for a purpose (quickstart, demo, procgen-cpu, paper, paper-memory); tuned, what a search found
    for this environment and core, the default where it comes with the package; or none. Other options override it."""
    config: str | None = None
    """A YAML file of settings, by the names of these options; other options override it. See --print-config."""
    print_config: bool = False
    """Print all settings as such a file and stop."""
    resume: str | None = None
    """Resume this run folder, exactly; -n may be given a new value."""
    init_from: Annotated[str | None, Arg(aliases=["-i"])] = None
    """Start a new run from the weights of a trained agent: RUN, RUN/best, a model file, zoo:NAME or an address. Its
    network is the default then; --resume continues a run itself."""
    override: bool = False
    """With --resume: accept new values of the trainer's settings. The run's history keeps them."""
    verify: bool = False
    """With --resume: replay the steps between the two newest checkpoints, compare bit by bit, and stop."""
    supervise: bool = False
    """Train in a child process, restarted from the last checkpoint when it is killed, aborts or hangs."""
    hang_seconds: Annotated[int, Meta(ge=0, le=10**6)] = 600
    """When no step ends for so long, print what the environments are doing, and with --supervise restart; 0: never."""
    dry_run: bool = False
    """Print what would be trained and stop."""
    env_list: bool = False
    """List the environments and stop."""

    n_envs: Number = 64
    """Number of environments that step together; a default is rounded up to as many of each game."""
    levels: str = "0:200"
    """Training levels, start:stop; a level is a seed where the environment has no levels. "all": no limit."""
    eval_levels: str = "1000:1200"
    """Held-out levels for srwm-rl eval; must not overlap the training levels."""
    mode: str = "easy"
    """ProcGen's distribution mode: easy, hard, extreme, memory, exploration."""
    env_kwargs: tuple[str, ...] = ()
    """Further settings of the environment, as name:value."""
    wrapper: tyro.conf.UseAppendAction[Wrappers] = ()
    """Wrap each Gymnasium environment: my_module:MyWrapper and its keyword arguments, as name:value. Repeat the option
    for several; the first is innermost."""
    atari: bool = False
    """Wrap Atari games as Stable-Baselines3 does: up to 30 no-ops at the start, four frames per action, FIRE to start,
    84x84 grey pixels. Rewards are clipped in training alone, and lives do not end episodes, so that returns are the
    game's own."""
    frame_stack: Annotated[int, Meta(ge=1, le=64)] = 1
    """Stack so many observations as one."""
    attempts: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Episodes of one level in a row that form a trial, one episode for the agent, whose memory is kept over them."""
    shuffle_actions: bool = False
    """Draw for every level which action does what (Discrete actions)."""
    inputs: tuple[Literal["action", "reward", "step", "observation"], ...] = ("action", "reward", "step")
    """Inputs of the core beside the observation: previous action, previous reward, step within the episode, previous
    observation (of vectors)."""
    reward_clip: Limit = 1.0
    """Clip the previous reward, as an input, to +- this; 0: no clipping."""
    normalize_reward: bool = True
    """Train on rewards divided by the running standard deviation of the return."""
    loss_reward_clip: Limit = 0.0
    """Train on rewards clipped to +- this, as the paper does with 1; 0: no clipping."""

    core_kwargs: tuple[str, ...] = ()
    """Settings of the core, as name:value, such as hidden_size:64 n_layers:1 variant:paper. Others keep the
    environment's default; see --dry-run."""
    encoder_kwargs: tuple[str, ...] = ()
    """Settings of the encoder, as name:value, such as mlp:[64,64] or, in quotes, 'cnn:{"channels":[8,16,16]}'."""

    learning_rate: Coefficient = 5e-4
    """The optimizer's step size."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Default: adam for ppo, rmsprop for impala."""
    rms_prop_eps: Coefficient = 0.01
    """RMSProp's epsilon; impala's loss is a sum over the batch, as published."""
    lr_decay: Literal["none", "linear"] = "none"
    """linear: lower the learning rate linearly to 0 over the run."""
    n_steps: Length = 256
    """T, steps per environment and update."""
    batch_size: Annotated[int, Meta(ge=1, le=2**26)] = 2048
    """Steps per minibatch; whole sequences of n_steps (or sequence_length)."""
    sequence_length: Length | None = None
    """Steps per training sequence, a divisor of n_steps; None: n_steps."""
    bptt: Length | None = None
    """Cut the gradient through the memory every so many steps; None: never."""
    n_epochs: Number = 3
    """Passes over each rollout."""
    gamma: Fraction = 0.999
    """Discount per step."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: Coefficient = 0.2
    """PPO's clipping of the probability ratio."""
    ent_coef: Coefficient = 0.01
    """Weight of the entropy bonus."""
    vf_coef: Coefficient = 0.5
    """Weight of the value loss."""
    max_grad_norm: Limit = 0.5
    """Gradient norm above which the gradient is scaled down."""
    target_kl: Coefficient | None = None
    """Stop an update early above this divergence; None: never."""
    vtrace_lambda: Fraction = 1.0
    """V-trace's lambda (impala)."""
    rho_clip: Limit = 1.0
    """V-trace's bound on the probability ratio in targets and policy gradient (impala); 0: none."""
    c_clip: Limit = 1.0
    """V-trace's bound on the ratio in the trace (impala); 0: none."""
    synchronous: bool = False
    """Play and learn in turn (impala): the same seed gives the same run, and a resumed run is exact. Also faster where
    both compete for few cores: 1.2 times on two."""
    aux_coef: Coefficient = 0.0
    """Weight of the prototype loss on the encoder's features (supervised, fewshot)."""
    warmup_updates: Frequency = 0
    """Updates in which the learning rate rises, to fall with 1/sqrt(updates) afterwards (supervised); 0: neither."""
    beta2: Fraction = 0.999
    """Adam's decay rate of squared gradients (supervised)."""
    adam_eps: Coefficient = 1e-8
    """Adam's epsilon (supervised)."""
    n_groups: Number | None = None
    """Groups of environments: the policy acts for one while others step. None: two on a GPU if n_envs is divisible,
    one on a CPU."""

    on_nan: Literal["stop", "skip"] = "stop"
    """At a number that is not finite: stop and keep the last good checkpoint, or skip that step or update."""

    seed: Seed = 0
    """Random seed of weights, actions and environments."""
    seeds: str | None = None
    """Train a run for each seed of start:stop or 0,3,7: a group, which --resume, eval, report and compare accept."""
    jobs: Number | None = None
    """With --seeds: runs that train at the same time. None: one per core, or per GPU; runs share the cores evenly."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    precision: Precision = "auto"
    """Precision of the CNN; auto: bfloat16 where the processor supports it (weights stay float32), else float32."""
    cnn_kernels: Literal["auto", "plain", "fused", "fused4", "fused8", "tiles", "vectors"] = "auto"
    """How the CNN runs: operation by operation (plain); on a GPU fused, with frames padded to 4 or 8 channels; on a CPU
    as one call of C, on its matrix tiles in bfloat16 (tiles) or its vectors in float32 (vectors). auto: the fastest,
    chosen when a run begins, which a resumed run keeps."""
    n_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads for torch; None: one per core for images (half as many where learning overlaps playing), one for vectors
    or with a GPU."""
    eval_freq: Frequency = 0
    """Environment steps between evaluations on training and held-out levels while training; 0: none."""
    eval_episodes: Steps = 50
    """Training and held-out levels per game in such an evaluation."""
    video_freq: Frequency = 0
    """Environment steps between videos of a held-out level, in the run's folder videos/; 0: none."""
    save_freq: Steps = 200_000
    """Environment steps between checkpoints (one is also written every ten minutes, and at the end)."""
    log_folder: Annotated[str, Arg(aliases=["-f"])] = "logs"
    """Parent of run folders: <log_folder>/<algo>_<core>/<env>_<n>."""
    track: Literal["none", "wandb"] = "none"
    """Log to Weights & Biases, too (pip install "srwm-rl[wandb]"); a resumed run continues there."""
    profile: bool = False
    """Time the parts of three updates, print a table, and write a trace of one update for the browser."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a live progress bar."""
    verbose: int = 1
    """0: errors only, 1: the plan and the result, 2: tracebacks too."""

    def __post_init__(self) -> None:
        check_bounds(self)
        object.__setattr__(self, "env", short_name(self.env))
        for name in KWARGS:
            pairs(getattr(self, name), name)
        check_wrappers(self.wrapper)
        if self.seeds is not None:
            self._check_seeds(self.seeds)
        elif self.jobs is not None and self.resume is None:
            raise UserError("--jobs is for several runs: give --seeds too")
        if self.normalize_reward and self.loss_reward_clip:
            raise UserError("--loss-reward-clip clips raw rewards: give --no-normalize-reward too, or leave it out")
        for name in ("override", "verify"):
            if getattr(self, name) and self.resume is None:
                raise UserError(f"--{name} is for a resumed run: give --resume RUN too")
        for algo, names in ALGO_SETTINGS.items():
            for name in names:
                if algo != self.algo and getattr(self, name) != getattr(TrainConfig, name):
                    option, hint = f"--{name.replace('_', '-')}", f"leave it out, or give --algo {algo}"
                    raise UserError(f"{option} is a setting of {algo}, not of {self.algo}: {hint}")

    def _check_seeds(self, seeds: str) -> None:
        parse_seeds(seeds)
        if self.resume is not None:
            raise UserError("--seeds starts new runs: leave it out to resume, --resume GROUP resumes all of its seeds")
        if self.seed != TrainConfig.seed:
            raise UserError("--seeds names the seeds of all runs: leave out --seed")

    def run_base(self) -> Path:
        """Return the path to which a new run, or group of runs, adds a number."""
        core, env = ("".join(c if c.isalnum() or c in "-_." else "+" for c in name) for name in (self.core, self.env))
        return Path(self.log_folder) / f"{self.algo}_{core}" / env

    def to_json(self) -> dict[str, Any]:
        """Return the settings in JSON's types."""
        return asdict(self)

    def env_settings(self) -> dict[str, Any]:
        """Return the arguments of `make_vec_env` and `make_levels_env` beside the levels, the numbers and the seed.

        It imports the modules of wrappers: of settings from a file, call `allow_wrappers` first.
        """
        env_kwargs = pairs(self.env_kwargs, "env_kwargs")
        return {
            "mode": self.mode,
            "env_kwargs": env_kwargs,
            "inputs": self.inputs,
            "reward_clip": self.reward_clip or None,
            "attempts": self.attempts,
            "shuffle_actions": self.shuffle_actions,
            "wrappers": load_wrappers(self.atari, self.wrapper),
            "frame_stack": self.frame_stack,
        }


MAX_SEEDS = 1000
BY_REWARD = ("batch_size", "gamma", "ent_coef", "vf_coef")  # settings of the trainers that learn from rewards
KWARGS = ("env_kwargs", "core_kwargs", "encoder_kwargs")  # settings that are name:value texts
# Settings that only one trainer has.
ALGO_SETTINGS = {
    "ppo": ("n_epochs", "sequence_length", "gae_lambda", "clip_range", "target_kl"),
    "impala": ("vtrace_lambda", "rho_clip", "c_clip", "synchronous"),
    "supervised": ("aux_coef", "warmup_updates", "beta2", "adam_eps"),
}


def bounds_of(config: type) -> dict[str, Meta]:
    """Return the bounds of a dataclass's fields, from their annotations."""
    hints = get_type_hints(config, include_extras=True)
    return {name: mark for name, hint in hints.items() for mark in _marks(hint) if isinstance(mark, Meta)}


def _marks(hint: Any) -> list[Any]:
    """Return what `Annotated` adds to a type and to the types that it consists of."""
    return [*getattr(hint, "__metadata__", ()), *(mark for part in get_args(hint) for mark in _marks(part))]


def check_bounds(config: object) -> None:
    """Raise a `UserError` for the first field of a dataclass that is outside the bounds of its annotation."""
    for name, bounds in bounds_of(type(config)).items():
        value, low, high = getattr(config, name), bounds.ge or 0, bounds.le
        if value is not None and not low <= value <= (math.inf if high is None else high):
            limits = f"be at least {low}" if high is None else f"lie in [{low:.10g}, {high:.10g}]"
            raise UserError(f"--{name.replace('_', '-')} must {limits}, not {value!s:.30}")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of start:stop, or of a list with commas.

    Raises:
        UserError: the text is neither, names a seed twice or none, or one that is out of range.
    """
    if match := re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII):
        seeds: Sequence[int] = range(int(match[1]), int(match[2]))
    elif re.fullmatch(r"\d{1,10}(,\d{1,10})*", text, re.ASCII):
        seeds = [int(part) for part in text.split(",")]
    else:
        raise UserError(f"--seeds takes start:stop, such as 0:5, or a list, such as 0,3,7, not {text!r}")
    if not 0 < len(seeds) <= MAX_SEEDS or len(set(seeds)) < len(seeds) or max(seeds) > 2**31 - 1:
        raise UserError(f"--seeds {text}: give 1 to {MAX_SEEDS} different seeds, each at most 2147483647")
    return list(seeds)


def merged_pairs(default: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
    """Return `name:value` texts: the default ones, each replaced by the given one of its name, then the new names."""
    by_name = {text.partition(":")[0]: text for text in (*default, *given)}
    return tuple(by_name.values())


def pairs(texts: tuple[str, ...], option: str) -> dict[str, Any]:
    """Read `name:value` texts; a value is JSON where it can be read as such, else text."""
    result: dict[str, Any] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name or not value:
            raise UserError(f"--{option.replace('_', '-')} takes name:value, not {text!r}")
        try:
            result[name] = json.loads(value)
        except (ValueError, RecursionError):
            result[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return result


# Rewards are clipped by --loss-reward-clip, which leaves the returns of episodes as they are.
ATARI = (
    "stable_baselines3.common.atari_wrappers:AtariWrapper",
    {"terminal_on_life_loss": False, "clip_reward": False},
    "--atari, for Atari games,",
)


def check_wrappers(wrappers: Wrappers) -> None:
    """Raise a `UserError` unless each is module:Class and name:value texts; nothing is imported."""
    for words in wrappers:
        module, colon, name = words[0].partition(":") if words else ("", "", "")
        if not (colon and module and name.isidentifier()):
            hint = f"; write {':'.join(words[0].rsplit('.', 1))}" if words and "." in words[0] and not colon else ""
            raise UserError(f"--wrapper takes my_module:MyWrapper, not {words[0] if words else ''!r}{hint}")
        pairs(words[1:], "wrapper")


def load_wrappers(atari: bool, wrappers: Wrappers) -> tuple[NamedWrapper, ...]:
    """Import the wrappers that --atari and --wrapper name.

    Raises:
        UserError: there is no such module or class, or no OpenCV for --atari.
    """
    if atari and find_spec("cv2") is None:
        raise UserError("--atari needs OpenCV: pip install opencv-python-headless")
    named = tuple(NamedWrapper(words[0], pairs(words[1:], "wrapper")) for words in wrappers)
    return (NamedWrapper(*ATARI), *named) if atari else named
