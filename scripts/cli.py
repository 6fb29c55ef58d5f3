"""Parse a command line into a dataclass, run a command, and print errors in one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from srwm_rl.errors import UserError, did_you_mean

Config = TypeVar("Config")
INTERRUPTED = 130  # exit code after Ctrl-C


@dataclass(frozen=True)
class OptionalValue:
    """Mark an option of a dataclass (by `Annotated`) whose value may be left out on the command line.

    Attributes:
        default: the value of an option without one.
        pattern: regular expression of a value; its first group is the value that is parsed.
    """

    default: str
    pattern: str


def run_command(argv: list[str], command: Callable[[], int]) -> int:
    """Run a command and return its exit code; print errors that a user can cause in one line.

    Args:
        argv: the command line, starting with the command's name.
        command: returns the exit code.
    """
    try:
        return command()
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if "--verbose=2" in argv or ("--verbose", "2") in pairwise(argv):
            traceback.print_exc()
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or argv[0]}: {error.strerror or error}"
        print(f"srwm-rl: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("srwm-rl: interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(config: type[Config], argv: list[str], prog: str, default: Config | None = None) -> Config:
    """Parse `argv` into `config`, starting from `default`.

    Raises:
        UserError: an unknown option (the nearest one is suggested), a repeated one, or a value that cannot be parsed.
        SystemExit: 0 after --help.
    """
    argv = _fill_optional_values(config, argv)
    _check_flags(config, argv, prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(config, args=argv, prog=prog, default=default, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(errors.getvalue())}; see {prog} --help") from stop
    assert parsed is not None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    return parsed


def _metadata(config: Any) -> dict[str, tuple[Any, ...]]:
    """Return what `Annotated` adds to each field of a dataclass."""
    hints = get_type_hints(config, include_extras=True)
    return {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(config)}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fill_optional_values(config: Any, argv: list[str]) -> list[str]:
    """Write the options marked `OptionalValue` as `--option=value`."""
    marks = {
        _flag(name): mark for name, marks in _metadata(config).items() for mark in marks if type(mark) is OptionalValue
    }
    filled: list[str] = []
    pending = deque(argv)
    while pending:
        word = pending.popleft()
        flag, equals, value = word.partition("=")
        mark = marks.get(flag.replace("_", "-"))
        if mark is not None:
            match = re.fullmatch(mark.pattern, value if equals else pending[0] if pending else "")
            word = f"{flag}={match[1] if match else value if equals else mark.default}"
            if match and not equals:
                pending.popleft()
        filled.append(word)
    return filled


def peek(argv: list[str], *names: str) -> str | None:
    """Return the value of an option before the command line is parsed; None: not there."""
    for word, next_word in pairwise([*argv, None]):
        flag, equals, value = (word or "").partition("=")
        if flag in names:
            return value if equals else next_word
    return None


def check_device(name: str) -> str:
    """Return the device for `name` ("auto", "cpu", "cuda", "cuda:1").

    Raises:
        UserError: an unknown device, or one that is not available; Stable-Baselines3 would silently use the CPU.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if n_gpus else "cpu"
    if name == "cpu":
        return name
    index = re.fullmatch(r"cuda(?::(\d+))?", name)
    if index is None:
        raise UserError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:1")
    if not n_gpus:
        raise UserError(f"--device {name}: torch finds no GPU here; use --device cpu, and see srwm-rl doctor")
    if int(index[1] or 0) >= n_gpus:
        raise UserError(f"--device {name}: the GPUs here are cuda:0 to cuda:{n_gpus - 1}")
    return name


def _check_flags(config: Any, argv: list[str], prog: str) -> None:
    """Refuse unknown and repeated options: tyro keeps the last of two values, and blames an option's neighbours."""
    known, repeatable = _flags(config)
    seen: set[str] = set()
    for word in argv:
        if not re.match(r"--[A-Za-z]|-[A-Za-z](=|$)", word):
            continue
        option = word.partition("=")[0]
        flag = known.get(option.replace("_", "-"))
        if flag is None:
            names = [name for name in known if name.startswith("--") and not name.startswith("--no-")]
            hint = did_you_mean(option.replace("_", "-"), names)
            raise UserError(f"unknown option {option!r}{hint if 'did you mean' in hint else ''}; see {prog} --help")
        if flag in seen and flag not in repeatable:
            raise UserError(f"{flag} is given twice; give it once, with all its values")
        seen.add(flag)


def _flags(config: Any) -> tuple[dict[str, str], set[str]]:
    """Return the options by every spelling, and those that may be repeated."""
    known, repeatable = {"-h": "--help", "--help": "--help"}, set()
    metadata = _metadata(config)
    for field in fields(config):
        marks = metadata[field.name]
        if tyro.conf.Positional in marks:
            continue
        flag = _flag(field.name)
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        known |= dict.fromkeys([flag, *aliases], flag)
        if isinstance(field.default, bool):
            known[f"--no-{flag[2:]}"] = flag
        if tyro.conf.UseAppendAction in marks:
            repeatable.add(flag)
    return known, repeatable


INT, FLOAT = "takes a whole number", "takes a number"
TYRO_ERRORS = (  # tyro's messages, and ours
    (r"Error parsing \w+Config: (.*)", r"\1"),  # a UserError
    (r"Error parsing (?:-\w/)?(\S+): invalid literal for int\(\) with base 10: (.*)", rf"\1 {INT}, not \2"),
    (r"Error parsing (?:-\w/)?(\S+): could not convert string to float: (.*)", rf"\1 {FLOAT}, not \2"),
    (r"Error parsing (\S+): no type matching {None}\|INT could be instantiated from \[(.*?)\].*", rf"\1 {INT}, not \2"),
    (
        r"Error parsing (\S+): no type matching {None}\|FLOAT could be instantiated from \[(.*?)\].*",
        rf"\1 {FLOAT}, not \2",
    ),
    (r"Missing value for argument '(?:-\w/)?(\S+)'.*", r"\1 needs a value"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\)\.", r"\2 takes one of \3, not \1"),
    (r"Missing from [^:]*: [A-Z]+ (.*?)\.? \(required\)", r"something is missing: \1"),
)


def _one_line(text: str) -> str:
    """Return tyro's message without its title, frame and footer."""
    lines = [re.sub(r"[│╭╮╰╯]+", " ", line).strip() for line in text.splitlines()[1:]]
    message = " ".join("\n".join(lines).partition("─")[0].split())
    for pattern, replacement in TYRO_ERRORS:
        if re.fullmatch(pattern, message):
            return re.sub(pattern, replacement, message)
    return message or "the options cannot be read"


def check_writable(path: Path, option: str) -> None:
    """Raise a `UserError` unless a file can be written at `path`: before work whose results would be lost."""
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder to write in")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"cannot write {path}: give {option} the name of a file")


def warn(message: str) -> None:
    """Print one line on stderr; processes of a distributed run other than 0 print their rank, too."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    print(f"srwm-rl: {message}" if rank == "0" else f"srwm-rl: process {rank}: {message}", file=sys.stderr)


def allow_core(core: str, named: str | None) -> None:
    """Import a user's core, `my_module:MyCore`, if the command line names it: a file must not choose imported code.

    Args:
        core: the core's name, from the command line or a file.
        named: the value of --core on the command line.

    Raises:
        UserError: `core` is a user's and `named` is not it, or it cannot be imported.
    """
    if ":" not in core:
        return
    if named != core:
        raise UserError(f"core {core!r} is code of your own, which no file can start: add --core {core}")
    from srwm_rl import import_core

    import_core(core)
