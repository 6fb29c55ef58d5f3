"""`srwm-rl`: one word chooses the command, each in a file of its own; errors are one line and exit code 2."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import NoReturn

import srwm_rl
from srwm_rl.errors import UserError, did_you_mean

COMMANDS = {
    "train": "train an agent, or go on with a run",
    "eval": "play every training and held-out level and print the returns",
    "report": "write a page on runs: curves, returns per game and level, settings",
    "compare": "play the same held-out levels with two agents, level by level",
    "watch": "film an agent that plays, and beside it its network that edits itself",
    "replay": "play a recorded episode again and check that it is the same",
    "export": "write an agent for other programs: ONNX, or a Stable-Baselines3 zip",
    "import-official": "make a run of a checkpoint of the paper's authors' code",
    "controls": "train a task with and without each part that could explain the result",
    "bench": "time the recurrence, backend by backend (srwm-rl bench op)",
    "doctor": "check the installation and name each problem's fix",
}


INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `srwm-rl`; None: those of this process, which then ends at once if it is interrupted.

    Returns:
        The exit code: 0, 1 (a check failed), 2 (wrong input), 130 (interrupted), 141 (whoever read the output left).
    """
    words = sys.argv[1:] if argv is None else argv
    # Torch's OpenMP threads spin while they wait, 300,000 turns by default: beside another busy process that costs
    # several times the work itself. Hardly to spin halves a quiet machine's speed; some turns cost neither much.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        try:
            code = _main(words)
        finally:
            sys.stdout.flush()
        if argv is None and code == INTERRUPTED:
            _leave(code)
        return code
    except BrokenPipeError:  # `| head` has seen enough; without this, Python complains once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart.

    With torch in it that takes seconds beside busy processes, and whoever asked it to stop may not wait so long: ten
    seconds after SIGTERM, many a container or batch system kills.
    """
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"srwm-rl {srwm_rl.__version__}")
        return 0
    return run_command(words, lambda: _command(words))


def _command(words: list[str]) -> int:
    if words[0] not in COMMANDS:
        raise UserError(f"unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)}")
    result: int = import_module(f"srwm_rl.scripts.commands.{words[0].replace('-', '_')}").main(words[1:])
    return result


def run_command(words: list[str], command: Callable[[], int]) -> int:
    """Run a command and return its exit code; what a user can cause is said in one line.

    Args:
        words: the command line, its name first.
        command: does it.
    """
    try:
        return command()
    except UserError as error:
        if _wants_traceback(words):
            traceback.print_exc()
        print(f"srwm-rl: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        if _wants_traceback(words):
            traceback.print_exc()
        print(f"srwm-rl: error: {error.filename or words[0]}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("srwm-rl: interrupted", file=sys.stderr)
        return INTERRUPTED


def _wants_traceback(words: list[str]) -> bool:
    return "--verbose=2" in words or ("--verbose", "2") in pairwise(words)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: srwm-rl COMMAND [options]\n\n"
        "Agents whose memory is a network that rewrites its own weights, for ProcGen and any Gymnasium environment.\n\n"
        f"commands:\n{commands}\n\n"
        "srwm-rl COMMAND --help lists a command's options; srwm-rl --version prints the version.\n"
        "First steps: srwm-rl train --preset quickstart"
    )


if __name__ == "__main__":
    sys.exit(main())
