"""Entry point of `srwm-rl`: run the command that the first argument names."""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module

import srwm_rl
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import INTERRUPTED, announce, drop_stdout, print_own_warnings, run_command, warn
from srwm_rl.scripts.signals import restore_handlers

COMMANDS = {
    "train": "train an agent, or resume a run",
    "fewshot": "train an agent that learns new classes of images from a few examples, by its memory alone",
    "tune": "search for settings of the trainer and the core, over seeds, on levels of their own",
    "eval": "play every training and held-out level and print the returns",
    "report": "write a page on runs: curves, returns per game and level, settings",
    "plot": "draw learning curves of runs over their seeds",
    "compare": "play the same held-out levels with two agents, level by level",
    "watch": "make a video of an agent that plays, beside its network that edits itself",
    "replay": "play a recorded episode again and check that it is the same",
    "share": "write an agent as one file with its card: how it was trained, what it scores",
    "zoo": "list the agents that come with the package, or print a card",
    "export": "write an agent for other programs: ONNX, or a Stable-Baselines3 zip",
    "import-official": "convert a checkpoint of the SRWM authors' code to a run",
    "controls": "train a task with and without each part that could explain the result",
    "bench": "time the recurrence, training and the environments (srwm-rl bench op)",
    "doctor": "check the installation and print how to fix each problem",
}
HELP = f"""usage: srwm-rl COMMAND [options]

Agents whose memory is a network that rewrites its own weights, for ProcGen and any Gymnasium environment.

commands:
{chr(10).join(f"  {name:<15}  {summary}" for name, summary in COMMANDS.items())}

srwm-rl COMMAND --help lists a command's options; srwm-rl --version prints the version.
First steps: srwm-rl train --preset quickstart"""

# Commands that load torch, and options with which they do not, or with which nothing is shown.
LOADING = COMMANDS.keys() - {"zoo", "doctor", "plot"}
QUICK = {"-h", "--help", "--no-progress", "--env-list", "--print-config"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Without `argv` it runs this process's arguments, and an interrupted process ends at once. Returns the exit code: 0,
    1 (a check failed), 2 (wrong input), 3 (training failed), 130 (interrupted), 141 (the reader of stdout closed it).
    """
    arguments = sys.argv[1:] if argv is None else argv
    # Torch's OpenMP threads spin while they wait, 300,000 turns by default, which slows other busy processes several
    # times. No spinning at all halves the speed on an idle machine; 10,000 turns cost little in both cases.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if argv is None:
        _open_streams()
    try:
        try:
            with print_own_warnings() if argv is None else restore_handlers():
                code = _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # such as from `| head`
        drop_stdout()
        return 141
    except OSError as error:  # such as a full disk's
        drop_stdout()
        warn(f"error: stdout: {error.strerror}")
        return 2
    if argv is None and code == INTERRUPTED:
        # Skip the interpreter's teardown: with torch it can take longer than the ten seconds that containers and batch
        # systems wait between SIGTERM and SIGKILL.
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    return code


def _open_streams() -> None:
    """Open /dev/null in the place of standard streams that are closed: else the next file would be one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"srwm-rl {srwm_rl.__version__}")
        return 0
    return run_command(argv, lambda: _command(*argv))


def _command(name: str, *argv: str) -> int:
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    if name in LOADING and not QUICK & set(argv) and sys.stderr.isatty():
        announce("loading torch")  # which takes seconds
    code: int = import_module(f"srwm_rl.scripts.commands.{name.replace('-', '_')}").main([*argv])
    return code


if __name__ == "__main__":
    sys.exit(main())
