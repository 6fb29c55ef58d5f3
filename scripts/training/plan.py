"""The plan of a training run: what will be trained, and how long it takes on this machine."""

from __future__ import annotations

from contextlib import suppress
from math import ceil
from time import monotonic

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.envs.make import resolve
from srwm_rl.envs.procgen.simulator import find_distribution
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.config.tuned import NONE, TUNED
from srwm_rl.scripts.training import build
from srwm_rl.scripts.training.cnn_kernels import cnns_of

MEASURE_SECONDS = 10.0


def describe(config: TrainConfig, model: RecurrentAlgorithm, done: int | None = None) -> str:
    """Return a few lines that describe what will be trained; `done`: the steps of a run that is resumed."""
    memory = model.policy.core
    n_parameters = sum(parameter.numel() for parameter in model.policy.parameters())
    core = " ".join((config.core, *config.core_kwargs))
    mode = f"; mode {config.mode} of {find_distribution()}" if resolve(config.env).kind == "procgen" else ""
    mode += f"; {config.attempts} attempts per trial" if config.attempts > 1 else ""
    mode += "; actions shuffled by level" if config.shuffle_actions else ""
    wrappers = [*["--atari"] * config.atari, *map(" ".join, config.wrapper)]
    mode += f"; wrapped by {', then '.join(wrappers)}" if wrappers else ""
    mode += f"; {config.frame_stack} observations stacked" if config.frame_stack > 1 else ""
    size = model.processes.size
    processes = f"; {size} processes, {config.n_envs // size} environments each" if size > 1 else ""
    mode_of_device = build.describe_cudnn() if model.device.type == "cuda" else build.describe_threads()
    mode_of_device += "".join(f", CNN {kernels}" for kernels in {cnn.kernels for cnn in cnns_of(model)} - {"plain"})
    per_rollout = config.n_envs * config.n_steps
    steps = (done or 0) + max(0, ceil((config.n_timesteps - (done or 0)) / per_rollout)) * per_rollout
    length = f"for {steps:,} steps" if done is None else f"from {done:,} to {steps:,} steps"
    rounded = f" (-n {config.n_timesteps:,} in whole rollouts)" if steps != config.n_timesteps else ""
    preset = f"; preset {config.preset}" if config.preset not in (None, NONE) else ""
    preset += " (--preset none: without it)" if config.preset == TUNED and done is None else ""
    weights = [f"  weights   of {config.init_from}"] if config.init_from is not None and done is None else []
    return "\n".join(
        (
            f"{'training' if done is None else 'resuming'} {config.env} {length}{rounded}: {config.algo}, core {core}"
            f"{preset}",
            f"  network   {model.policy.features_extractor.describe()}",
            f"            {n_parameters:,} parameters; memory {memory.state_layers * memory.state_size:,} floats per "
            "environment",
            *weights,
            f"  levels    {config.levels} for training, {config.eval_levels} held out; seed {config.seed}{mode}",
            f"  updates   {_updates(config, model, steps - (done or 0))}{processes}",
            f"  device    {model.device}, {mode_of_device}",
        )
    )


def _updates(config: TrainConfig, model: RecurrentAlgorithm, steps: int) -> str:
    n_rollouts = steps // (config.n_envs * config.n_steps)
    rollouts = f"{config.n_envs} environments x {config.n_steps} steps"
    if config.algo == "supervised":
        return f"{n_rollouts:,} of {rollouts}, by right answers"
    if config.algo == "ppo":
        epochs = "1 epoch" if config.n_epochs == 1 else f"{config.n_epochs} epochs"
        n_minibatches = model.minibatches_per_update // config.n_epochs
        return f"{n_rollouts:,} of {rollouts}, {epochs} of {n_minibatches} minibatches"
    order = "in turn with playing" if config.synchronous else "while the actors play on"
    n_unrolls = config.batch_size // config.n_steps
    return f"{steps // config.batch_size:,} of {n_unrolls} unrolls, {order}; {rollouts} at a time"


def duration(seconds: float) -> str:
    """Return a time with its unit: "40 s", "54 min", "2 h 10 min", "3 days 4 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


class _Measured(Exception):
    """Enough was measured."""


class _Measure(BaseCallback):
    """Measures how long a model plays and learns, `MEASURE_SECONDS` each and no more than one update."""

    model: RecurrentAlgorithm

    def __init__(self) -> None:
        super().__init__()
        self.playing = self.learning = 0.0  # seconds
        self.n_steps = self.n_learned = self.n_to_learn = 0
        self._start, self._first_step = monotonic(), 0

    def _on_rollout_start(self) -> None:
        if self.n_learned:
            raise _Measured
        self._start, self._first_step = monotonic(), self.num_timesteps

    def _on_step(self) -> bool:
        self.playing, self.n_steps = monotonic() - self._start, self.num_timesteps - self._first_step
        return self.playing < MEASURE_SECONDS

    def begin_learning(self) -> None:
        self._start, self.n_to_learn = monotonic(), max(1, self.model.minibatches_per_update)

    _on_rollout_end = begin_learning

    def on_gradient(self) -> None:
        self.learning = monotonic() - self._start
        self.n_learned += 1
        if self.learning > MEASURE_SECONDS:
            raise _Measured


def measure(model: RecurrentAlgorithm, n_timesteps: int) -> float | None:
    """Return the seconds that training takes, from a part of a first update; the model is spent.

    Returns:
        None: that says little, as the learner is a thread beside the actors, nothing could be learned, or other
            processes train too.
    """
    if getattr(model, "synchronous", True) is False or model.processes.size > 1:
        return None
    watch = _Measure()
    model.engine.listeners.append(watch.on_gradient)
    with suppress(_Measured):
        model.learn(n_timesteps, watch, reset_num_timesteps=False)
        if not watch.n_learned:  # playing takes longer than is measured
            watch.begin_learning()
            model.train()
    if not watch.n_learned:
        return None
    n_rollouts = n_timesteps / (model.n_steps * model.n_envs * model.processes.size)
    learning = watch.learning * watch.n_to_learn / watch.n_learned
    return n_timesteps * watch.playing / watch.n_steps + n_rollouts * learning
