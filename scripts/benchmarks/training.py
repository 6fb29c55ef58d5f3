"""`srwm-rl bench train`: steps per second of a trainer, its upper bound, and another trainer in alternation."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from srwm_rl.agents import IMPALA
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks import measure
from srwm_rl.scripts.benchmarks.measure import alternate, device_clock, ratio, speeds, summary
from srwm_rl.scripts.benchmarks.trainers import (
    TrainBench,
    make_other_core,
    make_ours,
    make_sb3_contrib,
    train_config,
)
from srwm_rl.scripts.benchmarks.upper_bound import check_same, make_components, report_upper_bound
from srwm_rl.scripts.training.build import describe_threads, make_env, use_threads
from srwm_rl.scripts.training.cnn_kernels import use_kernels

OURS, COMPONENTS = "srwm-rl", "components"
OTHER_CORES = ("feedforward", "lstm", "gru")
MAX_STEPS = 10**9  # the timing stops earlier
TimedTraining = Callable[[], dict[str, float]]
"""Trains for a while and returns the steps per second: "collect", "learn" and "both", or only "both"."""


def run(config: TrainBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: a mode that the trainer lacks, or a trainer that cannot be compared.
    """
    if config.overlapping and config.algo != "impala":
        raise UserError("--overlapping is impala's; give --algo impala")
    ours = make_ours(config)
    _use_threads(config, ours, config.overlapping)
    trainers = _trainers(config, ours)
    n_epochs = config.n_epochs if config.algo == "ppo" else 1
    print(
        f"{config.env}, core {config.core}, {config.algo}{' overlapping' if config.overlapping else ''}, "
        f"{config.n_envs} x {config.n_steps} steps, {n_epochs} epoch(s), batch {config.batch_size}, "
        f"{ours.policy.features_extractor.describe()}; {ours.device}, {describe_threads()}"
    )
    rates = alternate({**trainers, COMPONENTS: _timed_components(config, ours)}, config.rounds)
    components = rates.pop(COMPONENTS)
    rows = {name: {part: summary(values) for part, values in parts.items()} for name, parts in rates.items()}
    for name, row in rows.items():
        print(f"{name:<12} {'   '.join(f'{part} {speed:,.0f}' for part, speed in row.items())} steps/s")
    result: dict[str, Any] = {
        "bench": "train",
        "settings": {name: value for name, value in vars(config).items() if name not in ("json", "verbose")},
        "rows": rows,
    }
    concurrent = config.overlapping and ours.device.type == "cuda"
    result |= report_upper_bound(rates[OURS]["both"], components, n_epochs, concurrent)
    for name in trainers.keys() - {OURS}:
        result["ratio"] = {part: ratio(rates[OURS][part], values) for part, values in rates[name].items()}
        print(f"x {name:<10} {'   '.join(f'{part} {value:.2f}' for part, value in result['ratio'].items())}")
    if config.against == "sb3-contrib":
        memory = result["peak_mib"] = {name: peak_memory(config, name) for name in trainers}
        print(f"peak memory  {', '.join(f'{name} {mib:,.0f} MiB' for name, mib in memory.items())}")
    return result


def _use_threads(config: TrainBench, ours: RecurrentAlgorithm, overlapping: bool) -> None:
    n_concurrent = config.n_envs if overlapping else 0
    use_threads(config.threads, ours.observation_space, n_concurrent, on_gpu=ours.device.type == "cuda")


def _trainers(config: TrainBench, ours: RecurrentAlgorithm) -> dict[str, TimedTraining]:
    """Return our trainer and the one that it is compared with, by name."""
    against, trainers = config.against, {OURS: timed_training(ours)}
    if against == "sb3-contrib":
        trainers[against] = timed_training(make_sb3_contrib(config, ours))
    elif against is not None:
        other = make_other_core(config, ours, against) if against in OTHER_CORES else make_ours(config)
        if against == "reference":
            check_same(ours, other)
        elif against == "plain-cnn":
            use_kernels("plain", other)
        elif against == "autograd":
            other.native_gradient = lambda *_: None  # type: ignore[method-assign]
        trainers[against] = timed_training(other, "reference" if against == "reference" else "auto")
    return trainers


def _timed_components(config: TrainBench, ours: RecurrentAlgorithm) -> Callable[[], dict[str, float]]:
    components = make_components(ours, make_env(train_config(config)), config.batch_size)

    def timed() -> dict[str, float]:
        # In each round, since other load of the machine slows the components, too. Each of them uses all cores.
        _use_threads(config, ours, overlapping=False)
        result = components()
        _use_threads(config, ours, config.overlapping)
        return result

    return timed


def timed_training(model: Any, backend: str = "auto") -> TimedTraining:
    """Return a function that trains a model for a while and returns its speeds."""
    if isinstance(model, IMPALA) and not model.synchronous:
        return concurrent_training(model, backend)
    _, callback = model._setup_learn(MAX_STEPS)
    callback.on_training_start(locals(), globals())
    clock, n_steps = device_clock(model.device), model.n_steps

    def collect() -> None:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=n_steps)

    def update() -> dict[str, float]:
        parts = {"collect": collect, "learn": model.train}
        with prefer(backend):
            rates = speeds(parts, n_steps * model.n_envs, clock, measure.SECONDS)
        return {**rates, "both": 1 / sum(1 / rate for rate in rates.values())}

    return update


class ConcurrentTimer(BaseCallback):
    """Notes steps and time at the ends of rollouts, and stops training after a while.

    It starts with the first rollout after an update: copying the policy, capturing graphs and playing before the first
    batch are over then. From there on actors and learner are equally fast, since few batches can wait.
    """

    model: IMPALA

    def _on_training_start(self) -> None:
        self.updates = self.model._n_updates
        self.notes: list[tuple[int, float]] = []

    def _on_rollout_end(self) -> None:
        # Without waiting for the device: the actors wait in each step, the learner in each update.
        if self.model._n_updates > self.updates:
            self.notes.append((self.num_timesteps, time.perf_counter()))

    def _on_step(self) -> bool:
        return len(self.notes) < 2 or self.notes[-1][1] - self.notes[0][1] < measure.SECONDS


def concurrent_training(model: IMPALA, backend: str = "auto") -> TimedTraining:
    """Return a function that trains for a while, actors beside the learner, and returns the steps per second."""
    model.set_logger(Logger(None, []))

    def train() -> dict[str, float]:
        timer = ConcurrentTimer()
        with prefer(backend):
            model.learn(MAX_STEPS, timer, reset_num_timesteps=False)
        (first_step, start), *_, (last_step, end) = timer.notes
        return {"both": (last_step - first_step) / (end - start)}

    return train


def peak_memory(config: TrainBench, trainer: str) -> float:
    """Return the peak memory in MiB of a process that makes two updates: of the GPU's tensors, or of the process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(_peak_memory, config, trainer).result()
        except RuntimeError as error:  # such as one that was out of memory
            raise UserError(f"the memory of {trainer} could not be measured: {error}") from error


def _peak_memory(config: TrainBench, trainer: str) -> float:
    ours = make_ours(config)
    update = timed_training(ours if trainer == OURS else make_sb3_contrib(config, ours))
    update()
    update()
    if ours.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ours.device) / 2**20
    # Not getrusage, which in a child starts with the parent's memory.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
