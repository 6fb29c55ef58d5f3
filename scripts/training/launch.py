"""The processes of a training run: one, or those that torchrun started.

Each of those that torchrun started (`torchrun ... -m srwm_rl train`) makes its own environments and trainer. Process 0
also does what a single process does beside that; the others write no files and print nothing that process 0 prints.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import own_code_options, quoted_path, run_command
from srwm_rl.storage.run_folder import Run

# Seconds before a process other than 0 prints an error: process 0 usually prints the same one, and torchrun then ends
# the others.
ERROR_DELAY = 20.0
NOT_SAVED = 74  # exit code of a trainer whose files cannot be written (EX_IOERR of sysexits.h)
FOLDER = "SRWM_RL_RUN_FOLDER"  # environment variable: path of the folder of a new run, in the place of a numbered one


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
