"""`srwm-rl train --supervise`: the trainer as a process that is restarted after aborts, kills, hangs and full disks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.cli import INTERRUPTED, drop, own_code_options, warn
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.signals import catch_signals
from srwm_rl.scripts.training.launch import NOT_SAVED
from srwm_rl.scripts.training.resume import FREE
from srwm_rl.storage.run_folder import Run, steps_of

HUNG = 75  # exit code of a trainer that hangs (EX_TEMPFAIL of sysexits.h)
STATUS = "SRWM_RL_STATUS"  # environment variable: path of a file that the trainer touches at every step
# Exit codes after which a restart would not help: done, wrong input, a training fault, interrupted, stdout closed.
FINAL = {0, 2, 3, INTERRUPTED, 141}
# Options that a restart does not repeat, although the run does not store them: what they ask for is done, or stored.
OF_THE_FIRST = {
    "n_timesteps", "resume", "override", "verify", "supervise", "dry_run", "env_list", "log_folder", "preset", "seeds",
    "jobs", "print_config", "profile",
}  # fmt: skip
MAX_RESTARTS = 3  # in a row without progress
DISK_SECONDS = 10.0  # before a trainer whose files could not be written is restarted
GRACE = 30.0  # seconds that the trainer's own watchdog has before the supervisor kills it
MAX_PATH_BYTES = 2**16


class AwakeTimer:
    """Seconds since the last `restart`, without those in which this process was stopped, or the machine asleep.

    `tick` is called at short intervals. An interval longer than `longest_tick` counts as that: the caller could not
    run.
    """

    def __init__(self, longest_tick: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest_tick, self._clock = longest_tick, clock
        self._last = clock()
        self.seconds = 0.0

    def tick(self) -> float:
        """Count the time since the last call; return the seconds since `restart`."""
        now = self._clock()
        self.seconds += min(now - self._last, self.longest_tick)
        self._last = now
        return self.seconds

    def restart(self) -> None:
        """Count from 0 again."""
        self.seconds = 0.0


def supervise(argv: list[str], hang_seconds: int) -> int:
    """Run `srwm-rl train` without --supervise, restarted from its last checkpoint until it ends by itself.

    `argv` are the arguments after `train`. Returns the trainer's exit code, 1 after too many restarts without progress.

    It is restarted after an abort, a kill (such as the kernel's when memory runs out), a hang or files that could not
    be written, unless the last `MAX_RESTARTS` starts made no progress, or a signal asked this process to stop.
    """
    argv = [word for word in argv if word != "--supervise"]
    signals: list[int] = []
    with tempfile.TemporaryDirectory(prefix="srwm-rl-", ignore_cleanup_errors=True) as folder:
        status = Path(folder) / "status"
        most_steps, restarts = -1, 0
        while (code := _run_once(argv, status, hang_seconds, signals)) not in FINAL:
            if signals:
                return INTERRUPTED if code < 0 else code
            run = _run_of(status)
            steps = max(map(steps_of, run.files("checkpoint")), default=-1) if run else -1
            restarts = 0 if steps > most_steps else restarts + 1
            most_steps = max(most_steps, steps)
            if restarts >= MAX_RESTARTS:
                warn(
                    f"the trainer {_reason(code)}; {restarts} starts in a row made no progress, stopping at "
                    f"{max(most_steps, 0)} steps"
                )
                return 1
            warn(f"the trainer {_reason(code)} at {max(steps, 0)} saved steps; restarting it")
            if run is not None and steps >= 0:
                argv = _resume_arguments(argv, run)
            if code == NOT_SAVED:
                time.sleep(DISK_SECONDS)
    return code


def _run_of(status: Path) -> Run | None:
    """Return the run that the trainer wrote into its status file; None: it came to none, or the run is gone."""
    try:
        path = os.fsdecode(read_small(status, MAX_PATH_BYTES))
        return Run.open(Path(path)) if path else None
    except UserError:
        return None


def _run_once(argv: list[str], status: Path, hang_seconds: int, signals: list[int]) -> int:
    """Run the trainer until it ends or hangs; return its exit code. Signals that this process gets join `signals`."""
    environment = {**os.environ, STATUS: str(status)}
    command = [sys.executable, "-X", "faulthandler", "-m", "srwm_rl", "train", *argv]
    child: subprocess.Popen[bytes] | None = None
    is_asked = False  # whether the child has been asked to stop

    def stop(number: int) -> None:
        nonlocal is_asked
        signals.append(number)
        if number != signal.SIGINT and child is not None:  # a terminal sends that to the child as well
            child.send_signal(number)
            is_asked = True

    with catch_signals(stop):
        try:
            child = subprocess.Popen(command, env=environment)
            for number in signals:  # it came while the process was made
                child.send_signal(number)
                is_asked = True
            timer, last_beat = AwakeTimer(longest_tick=2.0), _beat(status)
            while True:
                try:
                    return child.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    idle = timer.tick()
                if signals and not is_asked:  # a SIGINT perhaps to this process alone; a child that saves ignores this
                    child.send_signal(signal.SIGTERM)
                    is_asked = True
                beat = _beat(status)
                if beat != last_beat or _is_stopped(child):
                    last_beat = beat
                    timer.restart()
                elif hang_seconds and idle > hang_seconds + GRACE:
                    child.kill()  # its watchdog is stuck too: a simulator holds the GIL
                    child.wait()
                    return HUNG
        finally:
            if child is not None and child.poll() is None:
                child.kill()


def _beat(status: Path) -> int:
    """Return when the trainer touched its file last; only changes count, as a clock may be set."""
    try:
        return status.stat().st_mtime_ns
    except OSError:
        return 0


def _is_stopped(child: subprocess.Popen[bytes]) -> bool:
    """Return whether a signal, such as SIGSTOP, has stopped a child process: it neither runs nor hangs."""
    if not hasattr(os, "waitid"):
        return False
    flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, child.pid, flags) is not None
    except ChildProcessError:
        return False


def _reason(code: int) -> str:
    if code == HUNG:
        return "hung"
    if code == NOT_SAVED:
        return "could not write its files"
    if code >= 0:
        return f"failed with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"


def _resume_arguments(argv: list[str], run: Run) -> list[str]:
    """Return the arguments that resume a run, with those options that are not stored with it."""
    stored = (field.name for field in fields(TrainConfig) if field.name not in FREE - OF_THE_FIRST)
    kept = drop(TrainConfig, argv, *(f"--{name.replace('_', '-')}" for name in stored))
    return ["--resume", str(run.path), *kept, *shlex.split(own_code_options(run.config["train"]))]
