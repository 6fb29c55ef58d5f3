"""`srwm-rl train --seeds`: one run per seed, each in a process and a folder of its own, as many at once as fit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import BinaryIO

import torch

from srwm_rl.envs.processors import usable_processors
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_end
from srwm_rl.scripts.cli import (
    INTERRUPTED,
    check_device,
    drop,
    options_of,
    own_code_options,
    peek,
    quoted_path,
    say,
    warn,
)
from srwm_rl.scripts.config.settings import TrainConfig, parse_seeds
from srwm_rl.scripts.seeds.progress import RUNNING, WAITING, SeedProgress
from srwm_rl.scripts.seeds.summary import render_group, steps_of_run
from srwm_rl.scripts.signals import catch_signals
from srwm_rl.scripts.training.launch import FOLDER
from srwm_rl.storage.run_group import GroupRecord, RunGroup

POLL = 0.5  # seconds between looks at the processes
GRACE = 30.0  # seconds in which a process saves its run after SIGTERM
MAX_LOG_BYTES = 2**16  # of which the last line is read
# Options of the group's command that its runs do not get.
OWN_OPTIONS = ("--seeds", "--jobs", "--resume", "--progress", "--dry-run")


@dataclass
class SeedRun:
    """One run of a group, and its process once that was started."""

    seed: int
    path: Path
    log: Path
    argv: list[str]
    process: subprocess.Popen[bytes] | None = None
    slot: int = -1

    @property
    def code(self) -> int | None:
        """Return the exit code; None before the process has ended."""
        return None if self.process is None else self.process.poll()

    @property
    def failed(self) -> bool:
        """Return whether it ended before all of its steps."""
        return self.code not in (None, 0)

    def state(self, is_stopped: bool) -> str:
        """Return what it does, or how it ended; `is_stopped`: a signal asked all runs to stop."""
        if self.process is None:
            return WAITING
        if self.code is None:
            return RUNNING
        return "done" if self.code == 0 else "stopped" if is_stopped else "failed"


@dataclass(frozen=True)
class Resources:
    """How many runs train at once, with how many CPU threads each, and on which GPUs."""

    jobs: int
    threads: int
    gpus: Sequence[str] = ()  # a value of CUDA_VISIBLE_DEVICES per GPU; (): as it is

    def describe(self) -> str:
        """Return them as text."""
        return f"{self.jobs} at a time, {self.threads} thread{'s' * (self.threads > 1)} each"

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment variables that restrict the process in a slot."""
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(self.threads), **gpu}


def choose_resources(config: TrainConfig, n_runs: int) -> Resources:
    """Return as many jobs as there are GPUs, or cores that this process may use, unless --jobs says how many."""
    n_cores = usable_processors()
    gpus = _gpus() if check_device(config.device) == "cuda" else []
    fitting = len(gpus) or n_cores // (config.n_threads or 1)
    jobs = min(n_runs, config.jobs or max(1, fitting))
    return Resources(jobs, config.n_threads or max(1, n_cores // jobs), gpus)


def _gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[:count] if len(visible) >= count and visible[0] else [str(index) for index in range(count)]


def train_seeds(argv: list[str], config: TrainConfig) -> int:
    """Train a new group of runs; return the exit code, which is not 0 if a seed failed.

    `argv` are the arguments after `train`, `config` what they mean. A dry run of the first seed checks them.
    """
    assert config.seeds is not None
    seeds, common = parse_seeds(config.seeds), drop(TrainConfig, argv, *OWN_OPTIONS)
    resources = choose_resources(config, len(seeds))
    command = _command([*common, "--seed", str(seeds[0]), "--dry-run", "--no-progress"])
    environment = {**os.environ, **resources.environment(0)}
    if code := subprocess.run(
        command, env=environment, stdout=None if config.verbose else subprocess.DEVNULL
    ).returncode:
        return code
    if config.verbose:
        print(f"  seeds     {', '.join(map(str, seeds))}; {resources.describe()}")
    if config.dry_run:
        return 0
    group = RunGroup.create(config.run_base(), GroupRecord(seeds, common, resources.threads))
    argvs = [[*common, "--seed", str(seed)] for seed in seeds]
    return _train(group, [_seed_run(group, seed, of) for seed, of in zip(seeds, argvs, strict=True)], resources, config)


def resume_group(argv: list[str], group: RunGroup, config: TrainConfig) -> int:
    """Resume those runs of a group that have not all their steps; runs without a checkpoint start anew.

    `config`: what `argv` means for one of the runs.
    """
    more = drop(TrainConfig, argv, *OWN_OPTIONS)
    anew = [*drop(TrainConfig, group.record.command, *options_of(more)), *more]  # a new value replaces the group's
    runs, wanted = [], None if peek(argv, "-n", "--n-timesteps", "--n_timesteps") is None else config.n_timesteps
    for seed in group.record.seeds:
        path = group.run_path(seed)
        steps, started_with = steps_of_run(path)
        if steps < (wanted or started_with or config.n_timesteps):
            of = ["--resume", str(path), *more] if steps else [*anew, "--seed", str(seed)]
            runs.append(_seed_run(group, seed, of))
    if not runs:
        raise UserError(f"all seeds of {group.path} have their steps already; give more with -n to continue")
    # The same number of threads as before: results depend on it.
    resources = replace(choose_resources(config, len(runs)), threads=group.record.threads)
    if config.verbose:
        print(f"resuming {group.path}: seed {', '.join(str(run.seed) for run in runs)}; {resources.describe()}")
    return 0 if config.dry_run else _train(group, runs, resources, config, wanted)


def _seed_run(group: RunGroup, seed: int, argv: list[str]) -> SeedRun:
    return SeedRun(seed, group.run_path(seed), group.log_path(seed), [*argv, "--no-progress"])


def _command(argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "srwm_rl", "train", *argv]


def _train(
    group: RunGroup, runs: list[SeedRun], resources: Resources, config: TrainConfig, wanted: int | None = None
) -> int:
    """Train runs side by side, print how each ended and the table of the group, and return the exit code.

    `wanted`: the steps that all of them are to have; None: those that each was started with.
    """
    if config.verbose:
        print(f"  folder    {group.path}", flush=True)
    with (
        _stopping(runs) as signals,
        SeedProgress([(run.seed, run.path) for run in runs], _planned_steps(config), config.progress) as progress,
    ):
        _run_all(runs, resources, signals, progress)
    stopped = f"stopped by {signal.Signals(signals[0]).name}" if signals else ""
    if stopped and not group.run_paths():
        shutil.rmtree(group.path, ignore_errors=True)
        warn(f"{stopped}; nothing was learned yet, and nothing is kept")
        return INTERRUPTED
    if config.verbose and group.run_paths():
        say(render_group(group, wanted))
    arguments = f"{quoted_path(group.path)}{own_code_options(config.to_json())}"
    if stopped or any(run.code != 0 for run in runs):
        warn(f"{stopped or 'not all seeds are trained'}. Resume with: srwm-rl train --resume {arguments}")
        return INTERRUPTED if stopped else 1
    if config.verbose:
        say(f"done: {len(group.record.seeds)} seeds. Now: srwm-rl eval {arguments}")
    return 0


def _planned_steps(config: TrainConfig) -> int:
    """Return the steps that a run ends with, in whole rollouts."""
    rollout = config.n_envs * config.n_steps
    return ceil(config.n_timesteps / rollout) * rollout


def _run_all(runs: list[SeedRun], resources: Resources, signals: list[int], progress: SeedProgress) -> None:
    """Start each run when a slot is free, until all have ended; after a signal no more are started."""
    waiting, active, free = list(runs), list[SeedRun](), list(range(resources.jobs))
    while active or (waiting and not signals):
        while waiting and free and not signals:
            run = waiting.pop(0)
            run.slot = free.pop(0)
            process = _start(run, resources)
            active.append(run)
            if signals:  # it came while the process was made
                process.terminate()
        time.sleep(POLL)
        for run in [run for run in active if run.code is not None]:
            active.remove(run)
            free.append(run.slot)
            if run.failed and not signals:
                warn(f"seed {run.seed} failed ({_reason(run)}); its output is in {run.log}")
        progress.update({run.seed: run.state(bool(signals)) for run in runs})


def _start(run: SeedRun, resources: Resources) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **resources.environment(run.slot), FOLDER: str(run.path)}
    with _open_log(run.log) as log:
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes one signal on.
        run.process = subprocess.Popen(
            _command(run.argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return run.process


def _open_log(path: Path) -> BinaryIO:
    """Open a log to append to; where it cannot be written, a run trains without it."""
    try:
        return path.open("ab")
    except OSError as error:
        warn(f"cannot write {path} ({error.strerror}); what this run prints is lost")
        return open(os.devnull, "ab")


def _reason(run: SeedRun) -> str:
    log = read_end(run.log, MAX_LOG_BYTES).decode(errors="replace") if run.log.is_file() else ""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    code = run.code or 0
    ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    return f"{ended}: {lines[-1].removeprefix('srwm-rl: ').removeprefix('error: ')[:300]}" if lines else ended


@contextmanager
def _stopping(runs: list[SeedRun]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the running processes, as SIGTERM; give the list of those caught.

    Processes that still run when an error ends the block get SIGTERM too, and are killed after `GRACE` seconds.
    """

    def running() -> list[subprocess.Popen[bytes]]:
        return [run.process for run in runs if run.process is not None and run.code is None]

    def stop(_number: int) -> None:
        for process in running():
            process.terminate()

    try:
        with catch_signals(stop) as caught:
            yield caught
    finally:
        left = running()
        for process in left:
            process.terminate()
        end = time.monotonic() + GRACE
        for process in left:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
