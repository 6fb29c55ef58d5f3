"""`srwm-rl train`."""

from __future__ import annotations

import math
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srwm_rl.errors import FaultError, UserError
from srwm_rl.run import CONFIG, TENSORBOARD, Run
from srwm_rl.scripts.checkpoints import capture, check_resumable, restore, save
from srwm_rl.scripts.cli import allow_core, check_device, parse, peek, warn
from srwm_rl.scripts.config import TrainConfig, defaults, pairs
from srwm_rl.scripts.training.build import make_env, make_model, resolved_precision
from srwm_rl.scripts.training.looking import filming, watchers
from srwm_rl.scripts.training.plan import describe, run_base, run_record
from srwm_rl.scripts.training.resume import METRICS, check_changes, keep_settings, stored_config, verify
from srwm_rl.scripts.untrusted import allow_env

if TYPE_CHECKING:
    from srwm_rl.agents.metrics import MetricsFile
    from srwm_rl.agents.recurrent import RecurrentAlgorithm

PROG = "srwm-rl train"


class Stop(BaseException):
    """A signal asked the run to stop; raised between two bytecodes of whatever was going on."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
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
    if config.supervise:
        from srwm_rl.scripts.training.supervise import supervise

        return supervise(argv, config.hang_seconds)
    return _train(config, run, changes)


def _train(config: TrainConfig, run: Run | None, changes: dict[str, list[Any]]) -> int:
    import torch

    torch.set_num_threads(config.n_threads or torch.get_num_threads())
    check_device(config.device)
    if run is None:  # said once, so that the run goes on in it wherever it is resumed
        config = replace(config, precision=resolved_precision(config))
    env = make_env(config)
    try:
        model = make_model(config, env)
        if ":" in config.core:  # before hours are spent on a core that mixes up environments
            from srwm_rl import check_core, make_core

            check_core(make_core(config.core, model.policy.features_dim, **pairs(config.core_kwargs, "core_kwargs")))
        plan = describe(config, model, run)
        if config.dry_run:
            print(plan)
            return 0
        if run is not None:
            with run.lock():
                if config.verify:
                    print(verify(run, config, model))
                    return 0
                return _learn(config, model, run, plan, changes)
        with _removed_if_empty(Run.create(run_base(config), run_record(config))) as run, run.lock():
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
    from srwm_rl.agents.callbacks import Checkpoints, ProgressBar
    from srwm_rl.agents.metrics import MetricsFile
    from srwm_rl.scripts.training.watchdog import Watchdog

    metrics = MetricsFile(run.path / METRICS)
    checkpoints = Checkpoints(
        lambda: capture(model, metrics), lambda state: save(run, model, config, state), config.save_freq
    )
    bar = ProgressBar(config.n_timesteps)
    watchdog = Watchdog(run.path, config.hang_seconds)
    looking = [*watchers(config, model, watchdog.beat), *filming(config, model, run.path, watchdog.beat)]
    callbacks = [checkpoints, watchdog, *looking, *([bar] if config.progress else [])]
    try:
        with _stop_on_signals():
            _prepare(config, model, run, metrics, changes)
            if config.verbose:
                print(f"{plan}\n  folder    {run.path}", flush=True)
            remaining = config.n_timesteps - model.num_timesteps
            model.learn(remaining, callbacks, reset_num_timesteps=False)
            checkpoints.latest = capture(model, metrics)
            checkpoints.save_latest()
    except Stop as stop:
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
    if config.verbose:
        print(f"done: {model.num_timesteps} steps. Now: srwm-rl eval {shlex.quote(str(run.path))}")
    return 0


def _prepare(
    config: TrainConfig, model: RecurrentAlgorithm, run: Run, metrics: MetricsFile, changes: dict[str, list[Any]]
) -> None:
    """Take up a resumed run where it was, and open its logs."""
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

    pending = {}
    if config.resume is not None:
        pending = restore(model, run, metrics)
        if model.num_timesteps >= config.n_timesteps:
            raise UserError(f"{run.path} has its {model.num_timesteps} steps already; give more with -n to go on")
        keep_settings(run, config, model.num_timesteps, changes)
    model.set_logger(Logger(str(run.path), [TensorBoardOutputFormat(str(run.path / TENSORBOARD)), metrics]))
    for name, (value, exclude) in pending.items():
        model.logger.record(name, math.nan if value is None else value, tuple(exclude))


def _how_to_go_on(run: Run) -> str:
    saved = run.files("checkpoint")
    if not saved:
        return "nothing was learned yet, and nothing is kept"
    steps = int(saved[-1].stem.rpartition("-")[2])
    return f"saved at {steps} steps. Go on with: srwm-rl train --resume {shlex.quote(str(run.path))}"


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Stop`; after it, they work as they did before."""
    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # An ignored signal stays ignored: under nohup the run is to outlive its terminal.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        raise Stop(signal.Signals(number).name)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


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
