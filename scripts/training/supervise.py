"""`srwm-rl train --supervise`: train in a child process and restart it when it crashes or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from srwm_rl.scripts.cli import INTERRUPTED, peek, warn
from srwm_rl.storage.run_folder import Run, steps_of

HUNG = 75  # exit code of a trainer that hangs (EX_TEMPFAIL of sysexits.h)
STATUS = "SRWM_RL_STATUS"  # environment variable: path of a file that the trainer touches at every step
# Exit codes after which a restart would not help: done, wrong input, a training fault, interrupted, stdout closed.
FINAL = {0, 2, 3, INTERRUPTED, 141}
MAX_RESTARTS = 3  # in a row without progress
GRACE = 30.0  # seconds that the trainer's own watchdog has before the supervisor kills it


def supervise(argv: list[str], hang_seconds: int) -> int:
    """Run `srwm-rl train` without --supervise, restarted from its last checkpoint until it ends by itself.

    `argv` are the arguments after `train`. Returns the trainer's exit code, 1 after too many restarts without progress.

    It is restarted after an abort, a kill (such as the kernel's when memory runs out) or a hang, unless the last
    `MAX_RESTARTS` starts made no progress.
    """
    argv = [word for word in argv if word != "--supervise"]
    with tempfile.TemporaryDirectory(prefix="srwm-rl-") as folder:
        status = Path(folder) / "status"
        most_steps, restarts = -1, 0
        while True:
            code = _run_once(argv, status, hang_seconds)
            if code in FINAL:
                return code
            path = Path(status.read_text()) if status.exists() else None
            run = Run.open(path) if path is not None and path.exists() else None
            checkpoints = run.files("checkpoint") if run else []
            steps = steps_of(checkpoints[-1]) if checkpoints else -1
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


def _run_once(argv: list[str], status: Path, hang_seconds: int) -> int:
    environment = {**os.environ, STATUS: str(status)}
    child = subprocess.Popen([sys.executable, "-X", "faulthandler", "-m", "srwm_rl", "train", *argv], env=environment)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    try:
        started = time.time()
        while True:
            try:
                return child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                last_beat = max(started, status.stat().st_mtime if status.exists() else 0.0)
                if hang_seconds and time.time() - last_beat > hang_seconds + GRACE:
                    child.kill()  # its watchdog is stuck too: a simulator holds the GIL
                    child.wait()
                    return HUNG
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()


def _reason(code: int) -> str:
    if code == HUNG:
        return "hung"
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _resume_arguments(argv: list[str], run: Run) -> list[str]:
    """Return the arguments that resume a run, with those options that are not stored with it."""
    kept = [word for word in argv if word in ("--no-progress", "--progress", "-P")]
    for name in ("--core", "--env", "--verbose", "--save-freq", "--n-threads", "--hang-seconds"):
        value = peek(argv, name)
        # A user's own module is imported only if the command line names it; other names come from the run's settings.
        if value is not None and (name not in ("--core", "--env") or ":" in value):
            kept += [name, value]
    return ["--resume", str(run.path), *kept]
