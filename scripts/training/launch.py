"""The processes of a training run: started by torchrun, stopped by signals, restarted by `--supervise`.

Each of those that torchrun started (`torchrun ... -m srwm_rl train`) makes its own environments and trainer. Process 0
also does what a single process does beside that; the others write no files and print nothing that process 0 prints.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import INTERRUPTED, own_code_options, peek, quoted_path, run_command, warn
from srwm_rl.storage.run_folder import Run, steps_of

# Seconds before a process other than 0 prints an error: process 0 usually prints the same one, and torchrun then ends
# the others.
ERROR_DELAY = 20.0
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
NOT_SAVED = 74  # exit code of a trainer whose files cannot be written (EX_IOERR of sysexits.h)
HUNG = 75  # exit code of a trainer that hangs (EX_TEMPFAIL of sysexits.h)
STATUS = "SRWM_RL_STATUS"  # environment variable: path of a file that the trainer touches at every step
FOLDER = "SRWM_RL_RUN_FOLDER"  # environment variable: path of the folder of a new run, in the place of a numbered one
# Exit codes after which a restart would not help: done, wrong input, a training fault, interrupted, stdout closed.
FINAL = {0, 2, 3, INTERRUPTED, 141}
MAX_RESTARTS = 3  # in a row without progress
GRACE = 30.0  # seconds that the trainer's own watchdog has before the supervisor kills it


def is_distributed() -> bool:
    """Return whether torchrun started this process together with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def run_rank(command: Callable[[], int], argv: list[str]) -> NoReturn:
    """Run a command as one of several processes and end this process with its exit code.

    The interpreter's teardown is skipped: it would wait for threads that wait for other processes, and a thread of
    `torch.distributed` that still releases a tensor aborts the process while the interpreter is finalized.
    """
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def delaying_errors() -> int:
        try:
            return command()
        except (UserError, OSError):
            time.sleep(0.0 if first else ERROR_DELAY)
            raise

    try:
        code = run_command(argv, delaying_errors)
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        code = 141
    except BaseException:
        traceback.print_exc()
        code = 1
    if code == 0:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command_to_resume(run: Run) -> str:
    """Return the command that resumes a run in as many processes as there are now."""
    arguments = f"train --resume {quoted_path(run.path)}{own_code_options(run.config['train'])}"
    if not is_distributed():
        return f"srwm-rl {arguments}"
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    several_machines = f"--nnodes {size // local} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    machines = "--standalone" if size == local else several_machines
    return f"torchrun {machines} --nproc-per-node {local} -m srwm_rl {arguments}"


class StopSignal(BaseException):
    """A signal asked the run to stop; raised between any two bytecodes."""


@contextmanager
def raise_on_signals(ignore_signals_after: bool = False) -> Iterator[None]:
    """Raise `StopSignal` at the first SIGINT, SIGTERM or SIGHUP inside the block; restore the handlers after it.

    `ignore_signals_after` ignores them once an exception has ended the block: for process 0 of several, which still
    saves the run, as torchrun signals all processes as soon as one has ended.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # An ignored signal stays ignored: nohup relies on it.
    previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore(ignore: bool) -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)

    def stop(number: int, frame: object) -> None:
        restore(ignore_signals_after)
        raise StopSignal(signal.Signals(number).name)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    except BaseException:
        restore(ignore_signals_after)
        raise
    restore(ignore=False)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP after the block, which an exception must not leave half done."""
    held: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in held:
            signal.raise_signal(caught)


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
        while (code := _run_once(argv, status, hang_seconds)) not in FINAL:
            run = None
            if status.exists() and (path := Path(status.read_text())).exists():
                run = Run.open(path)
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
    return code


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
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"


def _resume_arguments(argv: list[str], run: Run) -> list[str]:
    """Return the arguments that resume a run, with those options that are not stored with it."""
    kept = [word for word in argv if word in ("--no-progress", "--progress", "-P")]
    for name in ("--verbose", "--save-freq", "--n-threads", "--hang-seconds"):
        value = peek(argv, name)
        if value is not None:
            kept += [name, value]
    # A user's own module is imported only if the command line names it.
    return ["--resume", str(run.path), *shlex.split(own_code_options(run.config["train"])), *kept]
