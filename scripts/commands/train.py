"""`srwm-rl train`."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srwm_rl.errors import FaultError, UserError
from srwm_rl.scripts.cli import allow_core, parse, peek, warn
from srwm_rl.scripts.config.foreign_settings import allow_env
from srwm_rl.scripts.config.settings import TrainConfig, defaults, pairs
from srwm_rl.scripts.training.build import (
    groups_of_new_run,
    make_env,
    make_model,
    on_gpu,
    resolved_precision,
    use_threads,
)
from srwm_rl.scripts.training.checkpoints import capture, check_resumable, restore, save
from srwm_rl.scripts.training.launch import (
    check_remaining,
    check_same,
    command_to_resume,
    is_distributed,
    run_rank,
    run_worker,
    shard_config,
)
from srwm_rl.scripts.training.monitoring import make_best_model_tracker, make_callbacks, make_video_callback
from srwm_rl.scripts.training.resume import METRICS, check_changes, keep_settings, stored_config, verify
from srwm_rl.scripts.training.signals import StopSignal, raise_on_signals
from srwm_rl.scripts.training.summary import describe, run_base, run_record
from srwm_rl.storage.run_folder import BEST, CONFIG, TENSORBOARD, Run

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.agents.distributed import ProcessGroup
    from srwm_rl.agents.run.best_model import BestModelTracker
    from srwm_rl.agents.run.metrics import MetricsFile

PROG = "srwm-rl train"


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if is_distributed():
        return run_rank(lambda: _main(argv), ["train", *argv])
    return _main(argv)


def _main(argv: list[str]) -> int:
    resume = peek(argv, "--resume")
    run, changes = None, {}
    if resume is not None and not {"-h", "--help"} & set(argv):
        run = Run.open(Path(resume))
        stored = stored_config(run, resume)
        allow_core(stored.core, peek(argv, "--core"))
        allow_env(stored.env, peek(argv, "--env"), str(run.path / CONFIG))
        config = parse(TrainConfig, argv, PROG, stored)
        changes = check_changes(stored, config)
        check_resumable(run, stored)
    else:
        default = defaults(peek(argv, "--env"), peek(argv, "--preset"), peek(argv, "--core"), peek(argv, "--algo"))
        config = parse(TrainConfig, argv, PROG, default)
        allow_core(config.core, config.core)
    if config.env_list:
        print(_env_list())
        return 0
    _check_levels(config)
    for name in ("supervise", "verify"):
        if is_distributed() and getattr(config, name):
            raise UserError(f"--{name} is for one process: leave it out under torchrun, or start without torchrun")
    if config.supervise:
        from srwm_rl.scripts.training.supervise import supervise

        return supervise(argv, config.hang_seconds)
    return _train(config, run, changes)


def _train(config: TrainConfig, run: Run | None, changes: dict[str, list[Any]]) -> int:
    from srwm_rl.agents.distributed import RankInfo, init_processes

    own = shard_config(config, place := RankInfo.of())
    if run is None:  # said once, so that the run goes on in it wherever it is resumed
        said: dict[str, Any] = {"precision": resolved_precision(own), "n_groups": groups_of_new_run(own)}
        config, own = replace(config, **said), replace(own, **said)
    processes = init_processes(place, own.device)
    check_same(config, own, processes)
    code = _train_own(config, own, processes, run, changes)
    if code == 0:  # else some of them may be anywhere
        processes.close()
    return code


def _train_own(
    config: TrainConfig, own: TrainConfig, processes: ProcessGroup, run: Run | None, changes: dict[str, list[Any]]
) -> int:
    """Do this process's part, whose settings are `own`, of the run whose settings are `config`."""
    env = make_env(own)
    try:
        overlapping = own.n_envs if config.algo == "impala" and not config.synchronous else 0
        use_threads(config.n_threads, env.observation_space, overlapping, on_gpu(own))
        model = make_model(own, env)
        model.join(processes)
        if ":" in config.core:  # before hours are spent on a core that mixes up environments
            from srwm_rl import check_core, make_core

            check_core(make_core(config.core, model.policy.features_dim, **pairs(config.core_kwargs, "core_kwargs")))
        plan = describe(config, model, run)
        if config.dry_run:
            print(plan)
            return 0
        if not processes.first:
            return run_worker(config, model, run)
        if run is not None:
            with run.lock():
                if config.verify:
                    print(verify(run, config, model))
                    return 0
                return _learn(config, model, run, plan, changes)
        with _removed_if_empty(Run.create(run_base(config), run_record(config, processes.size))) as run, run.lock():
            return _learn(config, model, run, plan, {})
    finally:
        env.close()


@contextmanager
def _removed_if_empty(run: Run) -> Iterator[Run]:
    """Leave no folder of a run that ended before its first update."""
    try:
        yield run
    finally:
        metrics = run.path / METRICS
        if not run.files("checkpoint") and not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(run.path, ignore_errors=True)


def _learn(config: TrainConfig, model: RecurrentAlgorithm, run: Run, plan: str, changes: dict[str, list[Any]]) -> int:
    from srwm_rl.agents.run.callbacks import Checkpoints, ProgressBar
    from srwm_rl.agents.run.metrics import MetricsFile
    from srwm_rl.scripts.training.watchdog import Watchdog

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
    looking = [
        *make_callbacks(config, model, best_model, watchdog.heartbeat),
        *make_video_callback(config, model, run.path, watchdog.heartbeat),
    ]
    callbacks = [checkpoints, watchdog, *looking, *([bar] if config.progress else []), *_profiling(config, run)]
    try:
        with raise_on_signals(ignore_signals_after=is_distributed()):
            _prepare(config, model, run, metrics, best_model, changes)
            if config.verbose:
                print(f"{plan}\n  folder    {run.path}", flush=True)
            remaining = config.n_timesteps - model.num_timesteps
            model.learn(remaining, callbacks, reset_num_timesteps=False)
            checkpoints.latest = capture(model, metrics, best_model)
            checkpoints.save_latest()
    except StopSignal as stop:
        bar.close()
        checkpoints.save_latest()
        warn(f"stopped by {stop}; {_how_to_go_on(run)}")
        return 130
    except FaultError as fault:
        bar.close()
        checkpoints.save_latest()
        warn(f"stopped: {fault}. The weights from before it are kept; {_how_to_go_on(run)}")
        return 3
    except BrokenPipeError:  # whoever read the progress left
        checkpoints.save_latest()
        raise
    finally:
        watchdog.close()
        metrics.close()
        if hasattr(model, "_logger"):  # else it was stopped before it began
            model.logger.close()  # TensorBoard writes in the background
    if config.verbose:
        if best_model.best is not None:
            print(f"best model: {best_model.best}: {run.path / BEST}")
        print(f"done: {model.num_timesteps} steps. Now: srwm-rl eval {shlex.quote(str(run.path))}")
    return 0


def _profiling(config: TrainConfig, run: Run) -> list[BaseCallback]:
    if not config.profile:
        return []
    from srwm_rl.scripts.training.profiling import Profile

    return [Profile(run.path, lambda table: print(table, flush=True))]


def _prepare(
    config: TrainConfig,
    model: RecurrentAlgorithm,
    run: Run,
    metrics: MetricsFile,
    best_model: BestModelTracker,
    changes: dict[str, list[Any]],
) -> None:
    """Take up a resumed run where it was, and open its logs."""
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

    pending = {}
    if config.resume is not None:
        pending = restore(model, run, metrics, best_model)
        check_remaining(config, model, run)
        keep_settings(run, config, model.num_timesteps, changes)
    model.set_logger(Logger(str(run.path), [TensorBoardOutputFormat(str(run.path / TENSORBOARD)), metrics]))
    for name, (value, exclude) in pending.items():
        model.logger.record(name, math.nan if value is None else value, tuple(exclude))


def _how_to_go_on(run: Run) -> str:
    saved = run.files("checkpoint")
    if not saved:
        return "nothing was learned yet, and nothing is kept"
    steps = int(saved[-1].stem.rpartition("-")[2])
    return f"saved at {steps} steps. Go on with: {command_to_resume(run)}"


def _check_levels(config: TrainConfig) -> None:
    from srwm_rl.envs.levels import LevelRange

    train, held_out = LevelRange.parse(config.levels), LevelRange.parse(config.eval_levels)
    if config.levels != "all" and train.overlap(held_out):
        raise UserError(
            f"--levels {train} and --eval-levels {held_out} overlap in {train.overlap(held_out)} levels; "
            "hold out levels that are not trained on"
        )


def _env_list() -> str:
    from srwm_rl.envs.make import list_envs

    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in list_envs().items())
