"""`srwm-rl train --supervise`: train in a process of its own, and start it again when something ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from srwm_rl.scripts.cli import peek, warn
from srwm_rl.scripts.training.watchdog import HUNG, STATUS
from srwm_rl.storage.run_folder import Run

# What the child decided itself: done, wrong input, a fault that playing on would only repeat, stopped by a signal.
FINAL = {0, 2, 3, 130, 141}
TRIES = 3
GRACE = 30.0  # seconds beyond the child's own limit before it is taken for dead


def supervise(argv: list[str], hang_seconds: int) -> int:
    """Run `srwm-rl train` without --supervise until it ends by itself; return its exit code.

    After an abort, a kill (such as the kernel's when memory runs out) or a hang it goes on from the last checkpoint.
    It gives up when three starts in a row make no progress.

    Args:
        argv: the words after `train`.
        hang_seconds: how long a step may take; 0: for ever.
    """
    words = [word for word in argv if word != "--supervise"]
    with tempfile.TemporaryDirectory(prefix="srwm-rl-") as folder:
        status = Path(folder) / "status"
        best, fruitless = -1, 0
        while True:
            code = _run_once(words, status, hang_seconds)
            if code in FINAL:
                return code
            run = _run_of(status)
            steps = _steps(run)
            fruitless = 0 if steps > best else fruitless + 1
            best = max(best, steps)
            why = _why(code)
            if fruitless >= TRIES:
                warn(f"the trainer {why}; {TRIES} starts in a row got nowhere, giving up at {max(best, 0)} steps")
                return 1
            warn(f"the trainer {why} at {max(steps, 0)} saved steps; starting it again")
            if run is not None and steps >= 0:
                words = _resumed(words, run)


def _run_once(words: list[str], status: Path, hang_seconds: int) -> int:
    environment = {**os.environ, STATUS: str(status)}
    child = subprocess.Popen([sys.executable, "-X", "faulthandler", "-m", "srwm_rl", "train", *words], env=environment)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    try:
        started = time.time()
        while True:
            try:
                return child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                heard = status.stat().st_mtime if status.exists() else started
                if hang_seconds and time.time() - max(heard, started) > hang_seconds + GRACE:
                    child.kill()  # it cannot even say so itself: a simulator holds the interpreter
                    child.wait()
                    return HUNG
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()


def _run_of(status: Path) -> Run | None:
    path = Path(status.read_text()) if status.exists() else None
    return Run.open(path) if path is not None and path.exists() else None


def _steps(run: Run | None) -> int:
    """Return the steps of the newest checkpoint; -1: there is none."""
    files = [] if run is None else run.files("checkpoint")
    return int(files[-1].stem.rpartition("-")[2]) if files else -1


def _why(code: int) -> str:
    if code == HUNG:
        return "hung"
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _resumed(words: list[str], run: Run) -> list[str]:
    """Return the command that goes on with a run; what may differ from its settings is kept."""
    kept = [word for word in words if word in ("--no-progress", "--progress", "-P")]
    for name in ("--core", "--env", "--verbose", "--save-freq", "--n-threads", "--hang-seconds"):
        value = peek(words, name)
        # Code of one's own is imported only where the command line names it; other names are the run's settings.
        if value is not None and (name not in ("--core", "--env") or ":" in value):
            kept += [name, value]
    return ["--resume", str(run.path), *kept]
