"""`srwm-rl train --seeds`: one run per seed, each in a process and a folder of its own, as many at once as fit."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import INTERRUPTED, check_device, drop, options_of, peek, warn
from srwm_rl.scripts.config.settings import TrainConfig, parse_seeds
from srwm_rl.scripts.seeds.progress import SeedProgress
from srwm_rl.scripts.seeds.summary import render_group
from srwm_rl.scripts.training.launch import FOLDER, STOP_SIGNALS
from srwm_rl.storage.run_folder import CONFIG, Run, steps_of
from srwm_rl.storage.run_group import GroupRecord, RunGroup

POLL = 0.5  # seconds between looks at the processes
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
        """Return whether it ended by itself before all of its steps."""
        return self.code not in (None, 0)


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
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus() if check_device(config.device) == "cuda" else []
    fitting = len(gpus) or n_cores // (config.n_threads or 1)
    jobs = min(n_runs, config.jobs or max(1, fitting))
    return Resources(jobs, config.n_threads or max(1, n_cores // jobs), gpus)


def _gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

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
    command = _command([*common, "--seed", str(seeds[0]), "--dry-run"])
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
    runs = []
    for seed in group.record.seeds:
        path = group.run_path(seed)
        steps = _saved_steps(path)
        if steps is None or steps < _wanted_steps(path, more, config):
            of = [*anew, "--seed", str(seed)] if steps is None else ["--resume", str(path), *more]
            runs.append(_seed_run(group, seed, of))
    if not runs:
        raise UserError(f"all seeds of {group.path} have their steps already; give more with -n to continue")
    # The same number of threads as before: results depend on it.
    resources = replace(choose_resources(config, len(runs)), threads=group.record.threads)
    if config.verbose:
        print(f"resuming {group.path}: seeds {', '.join(str(run.seed) for run in runs)}; {resources.describe()}")
    return 0 if config.dry_run else _train(group, runs, resources, config)


def _saved_steps(path: Path) -> int | None:
    """Return the steps of a run's newest checkpoint; None: there is none."""
    checkpoints = Run.open(path).files("checkpoint") if (path / CONFIG).exists() else []
    return steps_of(checkpoints[-1]) if checkpoints else None


def _wanted_steps(path: Path, argv: list[str], config: TrainConfig) -> int:
    """Return the steps that a run is to have: those of -n, else those it was started with."""
    if peek(argv, "-n", "--n-timesteps", "--n_timesteps") is None and (path / CONFIG).exists():
        steps = Run.open(path).config["train"].get("n_timesteps")
        return steps if isinstance(steps, int) else config.n_timesteps
    return config.n_timesteps


def _seed_run(group: RunGroup, seed: int, argv: list[str]) -> SeedRun:
    return SeedRun(seed, group.run_path(seed), group.log_path(seed), [*argv, "--no-progress"])


def _command(argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "srwm_rl", "train", *argv]


def _train(group: RunGroup, runs: list[SeedRun], resources: Resources, config: TrainConfig) -> int:
    """Train runs side by side, print how each ended and the table of the group, and return the exit code."""
    if config.verbose:
        print(f"  folder    {group.path}", flush=True)
    with (
        _stopping(runs) as signals,
        SeedProgress([(run.seed, run.path) for run in runs], config.n_timesteps, config.progress) as progress,
    ):
        _run_all(runs, resources, signals, progress)
    if not group.run_paths():
        shutil.rmtree(group.path, ignore_errors=True)
        warn(f"stopped{_by(signals)}; nothing was learned yet, and nothing is kept")
        return INTERRUPTED if signals else 1
    if config.verbose:
        print(render_group(group))
    if signals or any(run.code != 0 for run in runs):
        own = [f"{name} {value}" for name in ("--core", "--env") if ":" in (value := peek(runs[0].argv, name) or "")]
        command = " ".join(["srwm-rl train --resume", shlex.quote(str(group.path)), *own])
        warn(f"{f'stopped{_by(signals)}' if signals else 'not all seeds are trained'}. Resume with: {command}")
        return INTERRUPTED if signals else 1
    return 0


def _by(signals: list[int]) -> str:
    return f" by {signal.Signals(signals[0]).name}" if signals else ""


def _run_all(runs: list[SeedRun], resources: Resources, signals: list[int], progress: SeedProgress) -> None:
    """Start each run when a slot is free, until all have ended; after a signal no more are started."""
    waiting, active, free = list(runs), list[SeedRun](), list(range(resources.jobs))
    while active or (waiting and not signals):
        while waiting and free and not signals:
            run = waiting.pop(0)
            run.slot = free.pop(0)
            _start(run, resources)
            active.append(run)
        time.sleep(POLL)
        for run in [run for run in active if run.code is not None]:
            active.remove(run)
            free.append(run.slot)
            if run.failed and not signals:
                warn(f"seed {run.seed} failed ({_reason(run)}); its output is in {run.log}")
        progress.update([run.seed for run in active])


def _start(run: SeedRun, resources: Resources) -> None:
    environment = {**os.environ, **resources.environment(run.slot), FOLDER: str(run.path)}
    with run.log.open("ab") as log:
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes one signal on.
        run.process = subprocess.Popen(
            _command(run.argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _reason(run: SeedRun) -> str:
    lines = [line.strip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    code = run.code or 0
    ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    return f"{ended}: {lines[-1].removeprefix('srwm-rl: ').removeprefix('error: ')[:300]}" if lines else ended


@contextmanager
def _stopping(runs: list[SeedRun]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the running processes, as SIGTERM; give the list of those caught.

    Processes that still run when the block is left are killed.
    """
    caught: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for run in runs:
            if run.process is not None and run.code is None:
                run.process.send_signal(signal.SIGTERM)

    # An ignored signal stays ignored: nohup relies on it.
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for run in runs:
            if run.process is not None and run.code is None:
                run.process.kill()
                run.process.wait()
