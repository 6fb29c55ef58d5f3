"""`torchrun ... -m srwm_rl train`: what each process has to do, and how all of them start and end.

Every process makes its own environments and its own trainer. Process 0 does everything that one process alone does;
the others run_worker it: they write nothing, and say nothing that process 0 says too.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srwm_rl.errors import FaultError, UserError
from srwm_rl.scripts.cli import check_device, warn
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import follow_up
from srwm_rl.scripts.training.monitoring import make_best_model_tracker, make_callbacks
from srwm_rl.scripts.training.signals import StopSignal, raise_on_signals
from srwm_rl.storage.run_folder import Run

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.agents.distributed import ProcessGroup, RankInfo

# Process 0 finds the errors that all find and says them; then torchrun ends the others. What only another process
# found, that one says after so many seconds.
DEFER = 20.0
# What may differ between the processes.
OF_EACH = {"n_threads", "progress", "verbose", "log_folder", "resume"}


def is_distributed() -> bool:
    """Say whether torchrun started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def run_rank(command: Callable[[], int], words: list[str]) -> int:
    """Run a command as one of is_distributed processes.

    Returns only where all went well. Otherwise it ends this process with the exit code at once: an ordinary exit would
    first end threads that may be waiting for processes which do not come.
    """
    from srwm_rl.scripts.main import run_command

    follower = os.environ.get("RANK", "0") != "0"
    if follower:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = run_command(words, lambda: _deferring(command) if follower else command())
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # whoever read the output left
        code = 141
    except BaseException:
        traceback.print_exc()
        code = 1
    if code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _deferring(command: Callable[[], int]) -> int:
    try:
        return command()
    except (UserError, OSError):
        time.sleep(DEFER)
        raise


def shard_config(config: TrainConfig, place: RankInfo) -> TrainConfig:
    """Return the settings of one process's part: its environments, its steps of each batch, its seed, its device.

    Raises:
        UserError: environments or batch cannot be divided evenly, or there is no device for each process.
    """
    if place.size == 1:
        check_device(config.device)
        return config
    from srwm_rl.agents.run.checkpoint_state import fresh_seed
    from srwm_rl.envs.make import resolve

    size, games = place.size, len(resolve(config.env).names)
    together = size * games * (config.n_groups or 1)
    if config.n_envs % together:
        of_games = f", {games} games" if games > 1 else ""
        of_groups = f" and {config.n_groups} groups each" if together > size * games else ""
        raise UserError(
            f"--n-envs {config.n_envs} cannot be divided evenly among {size} processes{of_games}{of_groups}; "
            f"use a multiple of {together}"
        )
    length = config.sequence_length or config.n_steps
    n_sequences, batch_size = config.batch_size // length, config.batch_size
    if n_sequences % size:
        raise UserError(
            f"--batch-size {config.batch_size} holds {n_sequences} sequence(s) of {length} steps, which cannot be "
            f"divided evenly among {size} processes; use a multiple of {size * length}"
        )
    if n_sequences:  # else the trainer says what is wrong
        batch_size = batch_size // size if config.algo == "impala" else n_sequences // size * length
    seed = config.seed if place.rank == 0 else fresh_seed(config.seed, place.rank)
    return replace(
        config, n_envs=config.n_envs // size, batch_size=batch_size, seed=seed, device=_own_device(config.device, place)
    )


def _own_device(device: str, place: RankInfo) -> str:
    import torch

    if device.startswith("cuda:"):
        raise UserError(f"--device {device} is one device for {place.size} processes: each takes its own with cuda")
    if check_device(device) == "cpu":
        return "cpu"
    if place.local_size > torch.cuda.device_count():
        raise UserError(
            f"{place.local_size} processes were started where torch finds {torch.cuda.device_count()} GPU(s): give "
            "torchrun --nproc-per-node as many as there are, or --device cpu"
        )
    return f"cuda:{place.local_rank}"


def check_same(config: TrainConfig, own: TrainConfig, processes: ProcessGroup) -> None:
    """Check that all processes were started with the same settings, and on the same kind of device.

    Raises:
        UserError: they were not; all processes say so.
    """
    wanted: dict[str, Any] = {**config.to_json(), "device": own.device.partition(":")[0]}
    settings = processes.all_gather({name: each for name, each in wanted.items() if name not in OF_EACH})
    for rank, other in enumerate(settings):
        for name, value in settings[0].items():
            if repr(_listed(other.get(name))) != repr(_listed(value)):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"process {rank} has {flag} {other.get(name)!r}, process 0 has {value!r}: start all of them with "
                    "the same options"
                )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_remaining(config: TrainConfig, model: RecurrentAlgorithm, run: Run) -> None:
    """Raise a `UserError` if a resumed run has nothing left to do."""
    if model.num_timesteps >= config.n_timesteps:
        raise UserError(f"{run.path} has its {model.num_timesteps} steps already; give more with -n to go on")


def run_worker(config: TrainConfig, model: RecurrentAlgorithm, run: Run | None) -> int:
    """Train in a process other than 0; return the exit code.

    It makes the calls that process 0 makes wherever these are a matter of all: restoring, capturing, evaluating.

    Args:
        config: the settings of all processes together.
        model: this process's trainer.
        run: the run that goes on; None: a new one.
    """
    from stable_baselines3.common.logger import Logger

    from srwm_rl.agents.distributed import LostProcessError
    from srwm_rl.agents.run.callbacks import Checkpoints
    from srwm_rl.agents.run.checkpoint_state import capture_state
    from srwm_rl.scripts.training.watchdog import Watchdog

    checkpoints = Checkpoints(lambda: capture_state(model), lambda _: None, config.save_freq, processes=model.processes)
    watchdog = Watchdog(Path(), config.hang_seconds)
    callbacks = [
        checkpoints,
        watchdog,
        *make_callbacks(config, model, make_best_model_tracker(config), watchdog.heartbeat),
    ]
    try:
        with raise_on_signals():
            if run is not None:
                follow_up(model, run)
                check_remaining(config, model, run)
            model.set_logger(Logger(None, []))
            model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
            capture_state(model)
    except StopSignal:
        return 130
    except LostProcessError:  # who ended first has said why
        return 3
    except FaultError as fault:
        warn(f"stopped: {fault}")
        return 3
    finally:
        watchdog.close()
    return 0


def command_to_resume(run: Run) -> str:
    """Return the command that goes on with a run in as many processes as this one has."""
    words = f"train --resume {shlex.quote(str(run.path))}"
    if not is_distributed():
        return f"srwm-rl {words}"
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    several_machines = f"--nnodes {size // local} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    machines = "--standalone" if size == local else several_machines
    return f"torchrun {machines} --nproc-per-node {local} -m srwm_rl {words}"
