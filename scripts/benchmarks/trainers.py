"""The trainers that `srwm-rl bench train` compares, and how each is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.envs.make import make_vec_env
from srwm_rl.errors import UserError
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks.concurrent_training import concurrent_training
from srwm_rl.scripts.benchmarks.contrib import policy_kwargs
from srwm_rl.scripts.benchmarks.measure import device_clock, long_enough
from srwm_rl.scripts.benchmarks.options import BenchOptions
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import groups_of_new_run, make_env, make_model

TimedTraining = Callable[[], dict[str, float]]
"""Trains for a while and returns the steps per second: "collect", "learn" and "both", or only "both"."""


@dataclass(frozen=True)
class TrainBench(BenchOptions):
    """Time training: `srwm-rl bench train`."""

    env: str = "bigfish"
    """A ProcGen game, a task, any Gymnasium id."""
    core: str = "srwm"
    """The agent's memory."""
    core_kwargs: tuple[str, ...] | None = None
    """Its settings as name:value, such as hidden_size:128; None: the defaults for the environment."""
    algo: Literal["ppo", "impala"] = "ppo"
    """The trainer; impala acts and learns in turn, unless --overlapping."""
    overlapping: bool = False
    """Let impala learn while its actors play, as `srwm-rl train` does; only both together are timed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the CNN."""
    n_envs: int = 64
    """Environments that step together."""
    n_steps: int = 64
    """Steps per environment and update."""
    batch_size: int = 512
    """Steps per minibatch."""
    n_epochs: int = 3
    """Passes over each rollout (ppo)."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment, as name:value, such as a longer task."""
    against: Literal["sb3-contrib", "feedforward", "reference", "autograd"] | None = None
    """Time another trainer in alternation: sb3_contrib.RecurrentPPO with the same encoder, an LSTM as wide as our core,
    and the same environments, epochs and batch; or our PPO without a memory; or ours with the recurrence step by step
    in plain PyTorch; or ours with PPO's gradient by autograd instead of C."""
    device: str = "auto"
    """auto, cpu, cuda."""


def train_config(config: TrainBench) -> TrainConfig:
    """Return the settings of our trainer."""
    train: TrainConfig = defaults(config.env, None, config.core, config.algo)
    names = ["core", "precision", "device", "n_envs", "env_kwargs", "n_steps", "batch_size"]
    names += ["core_kwargs"] * (config.core_kwargs is not None)
    train = replace(train, **{name: getattr(config, name) for name in names})
    train = replace(train, n_groups=groups_of_new_run(train))
    if config.algo == "ppo":
        return replace(train, n_epochs=config.n_epochs)
    return replace(train, synchronous=not config.overlapping)


def make_ours(config: TrainBench) -> RecurrentAlgorithm:
    """Return our trainer."""
    train = train_config(config)
    return make_model(train, make_env(train))


def make_sb3_contrib(config: TrainBench, ours: RecurrentAlgorithm) -> RecurrentPPO:
    """Return RecurrentPPO as its users set it up, with environments of its own.

    Raises:
        UserError: our trainer is not PPO.
    """
    if config.algo != "ppo":
        raise UserError("--against sb3-contrib compares PPO with PPO; leave out --algo")
    if ours.policy.features_extractor.images:
        env, name = make_vec_env(config.env, config.n_envs, "0:200", 0, inputs=()), "CnnLstmPolicy"
    else:
        # With the memory inputs, since the encoder is the same.
        env, name = make_env(replace(train_config(config), n_groups=1)), "MlpLstmPolicy"
    return RecurrentPPO(
        "MultiInputLstmPolicy" if isinstance(env.observation_space, spaces.Dict) else name,
        env,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        policy_kwargs=policy_kwargs(ours.policy),
        seed=0,
        device=config.device,
    )


def timed_training(config: TrainBench, model: Any, backend: str = "auto") -> TimedTraining:
    """Return a function that trains a model for a while and returns its speeds."""
    if config.overlapping:
        train = concurrent_training(model, backend)
        return lambda: {"both": train()}
    update = timed_updates(model, backend)

    def collect_and_learn() -> dict[str, float]:
        steps, collecting, learning = update()
        return {"collect": steps / collecting, "learn": steps / learning, "both": steps / (collecting + learning)}

    return collect_and_learn


def timed_updates(model: Any, backend: str = "auto") -> Callable[[], tuple[int, float, float]]:
    """Return a function that updates for a while and returns the steps, and the seconds of collecting and learning."""
    _, callback = model._setup_learn(10**9)
    callback.on_training_start(locals(), globals())
    clock = device_clock(model.device)

    def update() -> tuple[int, float, float]:
        first_step, collecting, learning = model.num_timesteps, 0.0, 0.0
        while model.num_timesteps == first_step or not long_enough(collecting + learning):
            start = clock()
            with prefer(backend):
                model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
                middle = clock()
                model.train()
            collecting, learning = collecting + middle - start, learning + clock() - middle
        return model.num_timesteps - first_step, collecting, learning

    return update


def peak_memory(config: TrainBench, trainer: str) -> float:
    """Return the peak memory in MiB of a process that makes two updates: of the GPU's tensors, or of the process."""
    settings = {name: value for name, value in settings_of(config).items() if value is not None and name != "rounds"}
    code = (
        "import json, sys; from srwm_rl.scripts.benchmarks.trainers import print_peak_memory; "
        "print_peak_memory(json.loads(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, json.dumps(settings), trainer]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"the memory of {trainer} could not be measured: {result.stderr.strip().splitlines()[-1]}")
    return float(result.stdout.split()[-1])


def print_peak_memory(settings: dict[str, Any], trainer: str) -> None:
    """Make two updates in this process and print its peak memory in MiB."""
    config = TrainBench(**settings)
    ours = make_ours(config)
    model: Any = ours if trainer == "srwm-rl" else make_sb3_contrib(config, ours)
    update = timed_updates(model)
    update()
    update()
    if model.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(model.device) / 2**20)
    else:  # not getrusage, which in a child starts with the parent's memory
        print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024)


def settings_of(config: TrainBench) -> dict[str, Any]:
    """Return the settings to report."""
    return {name: value for name, value in vars(config).items() if name not in ("json", "verbose")}
