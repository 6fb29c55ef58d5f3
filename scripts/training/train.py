"""Train a run: build it, describe it, learn, save it, and report how it ended."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl import check_core, make_core
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.distributed import LostProcessError, RankInfo, init_processes
from srwm_rl.agents.run.callbacks import Checkpoints
from srwm_rl.agents.run.metrics import silence_tensorboard
from srwm_rl.agents.run.progress import ProgressBar
from srwm_rl.errors import FaultError, UserError
from srwm_rl.scripts.cli import FAULT, INTERRUPTED, own_code_options, quoted_path, say, warn
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.signals import STOP_SIGNALS, StopSignal, hold_signals, raise_on_signals
from srwm_rl.scripts.training import build
from srwm_rl.scripts.training.checkpoints import Session, check_resumable
from srwm_rl.scripts.training.cnn_kernels import choose_kernels, use_kernels
from srwm_rl.scripts.training.initial_weights import load_weights
from srwm_rl.scripts.training.launch import FOLDER, NOT_SAVED, command_to_resume, is_distributed
from srwm_rl.scripts.training.monitoring import make_callbacks, make_video_callback
from srwm_rl.scripts.training.plan import describe, duration, measure
from srwm_rl.scripts.training.profiling import Profile
from srwm_rl.scripts.training.resume import changed_schedule, installed_versions, keep_settings
from srwm_rl.scripts.training.tracking import check_tracking
from srwm_rl.scripts.training.verify import verify
from srwm_rl.scripts.training.watchdog import Watchdog
from srwm_rl.storage.run_folder import BEST, METRICS, Run, steps_of

SHORT = 30.0  # seconds, in which a run needs no estimate of its time
OUT_OF_MEMORY = 1  # exit code, after which --supervise starts again
LAST_RETRIES = (1.0, 2.0)  # seconds before the end of a run that could not be saved is saved again


def train(config: TrainConfig, run: Run | None, changes: dict[str, list[Any]]) -> int:
    """Train in this process, which may be one of several; return the exit code.

    `changes` are the settings of a resumed run that change, `{name: [before, now]}`.
    """
    check_tracking(config)
    if run is not None:
        check_resumable(run, config)
    rank_info = RankInfo.of()
    own = build.shard_config(config, rank_info)
    if run is None:  # fixed here, so that the run is the same on every machine that resumes it
        fixed: dict[str, Any] = {"precision": build.resolved_precision(own), "n_groups": build.groups_of_new_run(own)}
        config, own = replace(config, **fixed), replace(own, **fixed)
    processes = init_processes(rank_info, own.device)
    build.check_same(config, own, processes)
    with closing(build.make_env(own)) as env:
        overlapping = own.n_envs if config.algo == "impala" and not config.synchronous else 0
        build.use_threads(config.n_threads, env.observation_space, overlapping, build.on_gpu(own))
        build.use_deterministic_cudnn()
        model = build.make_model(own, env)
        model.join(processes)
        if run is None:
            chosen: dict[str, Any] = {"cnn_kernels": choose_kernels(own, model)}
            config = replace(config, **chosen)
        elif "cnn_kernels" in changes:
            choose_kernels(own, model)  # refuses what cannot run
        use_kernels(config.cnn_kernels, model)
        if ":" in config.core:  # a user's core might mix up environments
            check_core(make_core(config.core, model.policy.features_dim, **pairs(config.core_kwargs, "core_kwargs")))
        code = _run(config, model, run, changes)
    if code == 0:  # else the other processes may have ended, or still be training
        processes.close()
    return code


def _run(config: TrainConfig, model: RecurrentAlgorithm, run: Run | None, changes: dict[str, list[Any]]) -> int:
    """Train in the run's folder, under its lock; a new one is deleted if the run ends before its first update."""
    is_new = run is None
    agent = load_weights(model, config.init_from) if is_new and config.init_from is not None else None
    if config.dry_run:
        print(describe(config, model, None if run is None else _saved_steps(run)))
        if config.progress and (seconds := measure(model, config.n_timesteps)) is not None:
            print(f"  time      about {duration(seconds)} on this machine")
        return 0
    if not model.processes.first:  # which writes nothing, and does not know a new run's folder
        return _learn(Session(config, model, run or Run(Path(), {}), Path(os.devnull)), changes)
    own = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
    run = run or Run.create(config.run_base(), _run_record(config, model.processes.size), own)
    try:
        with run.lock():
            try:
                if config.verify:
                    print(verify(run, config, model))
                    return 0
                session = Session(config, model, run, run.path / METRICS)
                if agent is not None:
                    session.best_model.levels.include(agent.levels_played)
                return _learn(session, changes)
            finally:
                if is_new:
                    run.delete_if_empty()
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(f"stopped: {_reason(error)}")
        return NOT_SAVED


def _saved_steps(run: Run) -> int:
    return max(map(steps_of, run.files("checkpoint")), default=0)


def _learn(session: Session, changes: dict[str, list[Any]]) -> int:
    """Train as process 0, or as another one, which takes part in its collective operations."""
    config, model, run, first = session.config, session.model, session.run, session.model.processes.first
    checkpoints = Checkpoints(session.capture, session.save, config.save_freq, check=session.check)
    watchdog = Watchdog(run.path, config.hang_seconds)
    bar = ProgressBar(first and config.progress, partial(_say_time, config))

    def heartbeat() -> None:
        watchdog.heartbeat()
        bar.note("evaluating")

    callbacks: list[BaseCallback] = [checkpoints, watchdog, *make_callbacks(session, heartbeat)]
    if first:
        callbacks += [make_video_callback(session, heartbeat)] if config.video_freq else []
        callbacks += [bar]
        callbacks += [Profile(run.path)] if config.profile else []
    silence_tensorboard()
    # While process 0 saves the run: torchrun signals all processes as soon as one has ended; a supervisor, a closed
    # terminal, `timeout` and SLURM may signal a process twice. A second Ctrl-C ends a process that is alone.
    ignored = [number for number in STOP_SIGNALS if first and (is_distributed() or number != signal.SIGINT)]
    try:
        with raise_on_signals(ignored_after=ignored):
            _prepare(session, changes)
            if config.verbose:
                done = None if config.resume is None else model.num_timesteps
                say(f"{describe(config, model, done)}\n  folder    {run.path}")
            model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
            checkpoints.latest = session.capture()
            if not _save_last(checkpoints, model):
                return _not_saved(run, model.num_timesteps, first)
    except BaseException as stop:
        bar.close()
        saved = checkpoints.save_latest()
        if isinstance(stop, BrokenPipeError | UserError):
            raise
        code = _explain(stop, run if first else None, saved)
        if code is None:
            raise
        return code
    finally:
        watchdog.close()
        model.logger.close()  # TensorBoard writes in the background
    if config.verbose:
        best = session.best_model.best
        if best is not None and run.file(BEST, best.steps).exists():
            say(f"best model: {best}: {run.path / BEST}")
        own = own_code_options(config.to_json())
        say(f"done: {model.num_timesteps} steps. Now: srwm-rl eval {quoted_path(run.path)}{own}")
    return 0


def _say_time(config: TrainConfig, seconds_per_update: float, seconds_left: float) -> None:
    """Say how long a run takes, after its first update, unless it is short."""
    if config.verbose and seconds_left > SHORT:
        update = duration(seconds_per_update)
        say(f"  time      about {duration(seconds_left)} left on this machine; a rollout and its update take {update}")


def _save_last(checkpoints: Checkpoints, model: RecurrentAlgorithm) -> bool:
    """Save the run's end, again after a while if it fails; return, in all processes, whether it is saved."""
    saved = checkpoints.save_latest()
    for seconds in LAST_RETRIES:
        if not saved:
            time.sleep(seconds)
            saved = checkpoints.save_latest()
    return bool(model.processes.all_gather(saved)[0])


def _not_saved(run: Run, steps: int, first: bool) -> int:
    if first:
        kept = max(map(steps_of, run.files("checkpoint")), default=None)
        older = f"the run is saved at {kept} steps" if kept is not None else "nothing of the run is saved"
        if kept == steps:
            older = "not all of its files are written"
        hint = f"; make room for them, then: {command_to_resume(run)}" if kept is not None else ""
        warn(f"trained, but the end could not be saved (see above): {older}{hint}")
    return NOT_SAVED


def _prepare(session: Session, changes: dict[str, list[Any]]) -> None:
    """Restore a resumed run, and open TensorBoard's log."""
    config, model, run = session.config, session.model, session.run
    if config.resume is not None:
        session.resume()
        if model.num_timesteps >= config.n_timesteps:
            raise UserError(f"{run.path} has its {model.num_timesteps} steps already; give more with -n to continue")
    if model.processes.first:
        if config.verbose and (line := changed_schedule(run, config, model.num_timesteps)) is not None:
            say(line)
        keep_settings(run, config, model.num_timesteps, changes)
        session.open_logs()
        # An exception within TensorBoard's queue could make `close` wait two minutes for its thread.
        model.logger.dump = hold_signals()(model.logger.dump)  # type: ignore[method-assign]


def _explain(stop: BaseException, run: Run | None, saved: bool) -> int | None:
    """Print why a run has stopped, and how to resume it; only process 0 gives the run.

    Returns:
        The exit code; None for an exception that is a fault of this package, or of a user's core.
    """
    is_signal = isinstance(stop, StopSignal | KeyboardInterrupt)
    if run is not None:
        reason = f" by {_reason(stop)}" if is_signal else f": {_reason(stop)}"
        checkpoints = run.files("checkpoint")
        if checkpoints:
            reason += "" if is_signal or not saved else ". The weights from before it are kept"
            lost = "" if saved else "what was learned since could not be saved; "
            kept = f"{lost}saved at {steps_of(checkpoints[-1])} steps. Resume with: {command_to_resume(run)}"
        else:
            kept = "nothing was learned yet, and nothing is kept" if saved else "nothing could be saved"
        warn(f"stopped{reason}; {kept}")
    elif not isinstance(stop, StopSignal | KeyboardInterrupt | LostProcessError):  # process 0 printed the reason
        warn(f"stopped: {_reason(stop)}")
    if is_signal:
        return INTERRUPTED
    if isinstance(stop, OSError):
        return NOT_SAVED
    if isinstance(stop, FaultError | SystemExit):
        return FAULT
    return OUT_OF_MEMORY if _is_out_of_memory(stop) else None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory; torch raises a `RuntimeError` on the CPU."""
    is_torch = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return is_torch or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _reason(stop: BaseException) -> str:
    if isinstance(stop, OSError):
        return f"{stop.filename or 'training'}: {stop.strerror or stop}"
    if isinstance(stop, KeyboardInterrupt):
        return "SIGINT"
    if isinstance(stop, StopSignal | FaultError):
        return str(stop)
    return " ".join(f"{type(stop).__name__}: {stop!s:.300}".split())


def _run_record(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Return the content of `config.json`: the settings, the versions, the command and the time."""
    return {
        "train": config.to_json(),
        "command": shlex.join(["srwm-rl", *sys.argv[1:]]),
        **({"processes": processes} if processes > 1 else {}),
        "versions": installed_versions(config.env),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
