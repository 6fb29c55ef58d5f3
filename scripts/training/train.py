"""Train a run: build it, learn, save it, and report how it ended."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from srwm_rl import check_core, make_core
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.distributed import LostProcessError, ProcessGroup, RankInfo, init_processes
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.callbacks import Checkpoints, ProgressBar
from srwm_rl.agents.run.checkpoint_state import capture_state
from srwm_rl.agents.run.metrics import MetricsFile
from srwm_rl.errors import FaultError, UserError
from srwm_rl.scripts.cli import INTERRUPTED, warn
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.training.build import (
    groups_of_new_run,
    make_env,
    make_model,
    on_gpu,
    resolved_precision,
    use_threads,
)
from srwm_rl.scripts.training.checkpoints import (
    capture,
    check_resumable,
    log_pending,
    restore,
    save,
)
from srwm_rl.scripts.training.launch import command_to_resume, is_distributed
from srwm_rl.scripts.training.monitoring import VideoCallback, make_best_model_tracker, make_callbacks
from srwm_rl.scripts.training.profiling import Profile
from srwm_rl.scripts.training.resume import keep_settings
from srwm_rl.scripts.training.sharding import check_same, shard_config
from srwm_rl.scripts.training.signals import StopSignal, raise_on_signals
from srwm_rl.scripts.training.summary import describe, run_base, run_record
from srwm_rl.scripts.training.verify import verify
from srwm_rl.scripts.training.watchdog import Watchdog
from srwm_rl.storage.run_folder import BEST, METRICS, TENSORBOARD, Run, steps_of

FAULT = 3  # exit code


def train(config: TrainConfig, run: Run | None, changes: dict[str, list[Any]]) -> int:
    """Train in this process, which may be one of several; return the exit code.

    `changes` are the settings of a resumed run that change, `{name: [before, now]}`.
    """
    if run is not None:
        check_resumable(run, config)
    rank_info = RankInfo.of()
    own = shard_config(config, rank_info)
    if run is None:  # fixed here, so that the run is the same on every machine that resumes it
        fixed: dict[str, Any] = {"precision": resolved_precision(own), "n_groups": groups_of_new_run(own)}
        config, own = replace(config, **fixed), replace(own, **fixed)
    processes = init_processes(rank_info, own.device)
    check_same(config, own, processes)
    env = make_env(own)
    try:
        overlapping = own.n_envs if config.algo == "impala" and not config.synchronous else 0
        use_threads(config.n_threads, env.observation_space, overlapping, on_gpu(own))
        model = make_model(own, env)
        model.join(processes)
        if ":" in config.core:  # a user's core might mix up environments
            check_core(make_core(config.core, model.policy.features_dim, **pairs(config.core_kwargs, "core_kwargs")))
        code = _run(config, model, run, processes, changes)
    finally:
        env.close()
    if code == 0:  # else the other processes may have ended, or still be training
        processes.close()
    return code


def _run(
    config: TrainConfig,
    model: RecurrentAlgorithm,
    run: Run | None,
    processes: ProcessGroup,
    changes: dict[str, list[Any]],
) -> int:
    plan = describe(config, model, run)
    if config.dry_run:
        print(plan)
        return 0
    if not processes.first:
        return _learn_worker(config, model, run)
    if run is not None:
        with run.lock():
            if config.verify:
                print(verify(run, config, model))
                return 0
            return _learn(config, model, run, plan, changes)
    new_run = Run.create(run_base(config), run_record(config, processes.size))
    with _removed_if_empty(new_run), new_run.lock():
        return _learn(config, model, new_run, plan, {})


@contextmanager
def _removed_if_empty(run: Run) -> Iterator[None]:
    """Delete the folder of a run that ends before its first update."""
    try:
        yield
    finally:
        metrics = run.path / METRICS
        if not run.files("checkpoint") and not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(run.path, ignore_errors=True)


def _learn(config: TrainConfig, model: RecurrentAlgorithm, run: Run, plan: str, changes: dict[str, list[Any]]) -> int:
    """Train as the only process, or as process 0, which writes the run's files."""
    metrics = MetricsFile(run.path / METRICS)
    best_model = make_best_model_tracker(config)
    checkpoints = Checkpoints(
        lambda: capture(model, metrics, best_model),
        lambda state: save(run, model, config, state, best_model),
        config.save_freq,
        processes=model.processes,
    )
    bar = ProgressBar(config.n_timesteps)
    watchdog = Watchdog(run.path, config.hang_seconds)
    callbacks: list[BaseCallback] = [
        checkpoints,
        watchdog,
        *make_callbacks(config, model, best_model, watchdog.heartbeat),
        *([VideoCallback(config, run.path, watchdog.heartbeat)] if config.video_freq else []),
        *([bar] if config.progress else []),
        *([Profile(run.path, lambda table: print(table, flush=True))] if config.profile else []),
    ]
    try:
        with raise_on_signals(ignore_signals_after=is_distributed()):
            _prepare(config, model, run, metrics, best_model, changes)
            if config.verbose:
                print(f"{plan}\n  folder    {run.path}", flush=True)
            model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
            checkpoints.latest = capture(model, metrics, best_model)
            checkpoints.save_latest()
    except (StopSignal, FaultError) as stop:
        bar.close()
        checkpoints.save_latest()
        is_signal = isinstance(stop, StopSignal)
        reason = f" by {stop}" if is_signal else f": {stop}. The weights from before it are kept"
        warn(f"stopped{reason}; {_saved(run)}")
        return INTERRUPTED if is_signal else FAULT
    except BrokenPipeError:
        checkpoints.save_latest()
        raise
    finally:
        watchdog.close()
        metrics.close()
        if hasattr(model, "_logger"):  # not if stopped before `_prepare`
            model.logger.close()  # TensorBoard writes in the background
    if config.verbose:
        if best_model.best is not None:
            print(f"best model: {best_model.best}: {run.path / BEST}")
        print(f"done: {model.num_timesteps} steps. Now: srwm-rl eval {shlex.quote(str(run.path))}")
    return 0


def _prepare(
    config: TrainConfig,
    model: RecurrentAlgorithm,
    run: Run,
    metrics: MetricsFile,
    best_model: BestModelTracker,
    changes: dict[str, list[Any]],
) -> None:
    """Restore a resumed run, and open the logs."""
    pending: dict[str, Any] = {}
    if config.resume is not None:
        pending = restore(model, run, metrics, best_model)
        _check_remaining(config, model, run)
        keep_settings(run, config, model.num_timesteps, changes)
    model.set_logger(Logger(str(run.path), [TensorBoardOutputFormat(str(run.path / TENSORBOARD)), metrics]))
    log_pending(model, pending)


def _learn_worker(config: TrainConfig, model: RecurrentAlgorithm, run: Run | None) -> int:
    """Train as a process other than 0, which takes part in process 0's collective operations and writes nothing."""
    checkpoints = Checkpoints(lambda: capture_state(model), lambda _: None, config.save_freq, processes=model.processes)
    watchdog = Watchdog(Path(), config.hang_seconds)
    best_model = make_best_model_tracker(config)
    callbacks = [checkpoints, watchdog, *make_callbacks(config, model, best_model, watchdog.heartbeat)]
    try:
        with raise_on_signals():
            if run is not None:
                restore(model, run)
                _check_remaining(config, model, run)
            model.set_logger(Logger(None, []))
            model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
            capture_state(model)
    except StopSignal:
        return INTERRUPTED
    except FaultError as fault:
        if not isinstance(fault, LostProcessError):  # the process that ended first has printed the reason
            warn(f"stopped: {fault}")
        return FAULT
    finally:
        watchdog.close()
    return 0


def _check_remaining(config: TrainConfig, model: RecurrentAlgorithm, run: Run) -> None:
    if model.num_timesteps >= config.n_timesteps:
        raise UserError(f"{run.path} has its {model.num_timesteps} steps already; give more with -n to continue")


def _saved(run: Run) -> str:
    checkpoints = run.files("checkpoint")
    if not checkpoints:
        return "nothing was learned yet, and nothing is kept"
    return f"saved at {steps_of(checkpoints[-1])} steps. Resume with: {command_to_resume(run)}"
