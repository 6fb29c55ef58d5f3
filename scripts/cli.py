"""Reading a command line into a dataclass, with one clear line where it cannot be read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from srwm_rl.errors import UserError, did_you_mean

Config = TypeVar("Config")


@dataclass(frozen=True)
class OptionalValue:
    """Mark an option of a dataclass (by `Annotated`) that may stand alone on the command line.

    Attributes:
        value: what it then stands for.
        given: pattern of a value; its first group is what is read.
    """

    value: str
    given: str


def parse(config: type[Config], argv: list[str], prog: str, default: Config | None = None) -> Config:
    """Read `argv` into `config`, starting from `default`.

    Raises:
        UserError: an unknown option (the nearest one is suggested), one given twice, or a value that cannot be read.
        SystemExit: 0 after --help.
    """
    argv = _fill(config, argv)
    _check_flags(config, argv, prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                config,
                args=argv,
                prog=prog,
                default=default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(errors.getvalue())}; see {prog} --help") from stop
    assert parsed is not None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    return parsed


def _fill(config: Any, argv: list[str]) -> list[str]:
    """Give the options marked `OptionalValue` their values."""
    hints = get_type_hints(config, include_extras=True)
    marks = {
        f"--{field.name.replace('_', '-')}": mark
        for field in fields(config)
        for mark in getattr(hints[field.name], "__metadata__", ())
        if isinstance(mark, OptionalValue)
    }
    filled: list[str] = []
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        flag, equals, value = word.partition("=")
        mark = marks.get(flag.replace("_", "-"))
        if mark is not None and equals:
            match = re.fullmatch(mark.given, value)
            word = f"{flag}={match[1] if match else value}"
        elif mark is not None:
            match = re.fullmatch(mark.given, rest[0]) if rest else None
            word = f"{flag}={match[1] if match else mark.value}"
            if match:
                rest.popleft()
        filled.append(word)
    return filled


def peek(argv: list[str], *names: str) -> str | None:
    """Return the value given to an option, before the defaults of the others are known."""
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in names:
            if equals:
                return value
            return argv[position + 1] if position + 1 < len(argv) else None
    return None


def check_device(name: str) -> str:
    """Return the device that `name` ("auto", "cpu", "cuda", "cuda:1") stands for.

    Raises:
        UserError: it is none, or not there; Stable-Baselines3 would silently take the CPU.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if n_gpus else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or index.isdecimal()):
        raise UserError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:1")
    if not n_gpus:
        raise UserError(f"--device {name}: torch finds no GPU here; use --device cpu, and see srwm-rl doctor")
    if int(index or 0) >= n_gpus:
        raise UserError(f"--device {name}: the GPUs here are cuda:0 to cuda:{n_gpus - 1}")
    return name


def _check_flags(config: Any, argv: list[str], prog: str) -> None:
    # Before tyro, which keeps the last of two values in silence and blames an unknown flag on its neighbours.
    known, repeatable = _flags(config)
    seen: set[str] = set()
    for word in argv:
        if not re.match(r"--[A-Za-z]|-[A-Za-z](=|$)", word):
            continue
        given = word.partition("=")[0]
        flag = known.get(given.replace("_", "-"))
        if flag is None:
            names = [name for name in known if name.startswith("--") and not name.startswith("--no-")]
            hint = did_you_mean(given.replace("_", "-"), names)
            raise UserError(f"unknown option {given!r}{hint if 'did you mean' in hint else ''}; see {prog} --help")
        if flag in seen and flag not in repeatable:
            raise UserError(f"{flag} is given twice; give it once, with all its values")
        seen.add(flag)


def _flags(config: Any) -> tuple[dict[str, str], set[str]]:
    """Return the options by every spelling, and those that may be repeated."""
    known, repeatable = {"-h": "--help", "--help": "--help"}, set()
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        marks = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional in marks:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        known |= dict.fromkeys([flag, *aliases], flag)
        if isinstance(field.default, bool):
            known[f"--no-{flag[2:]}"] = flag
        if tyro.conf.UseAppendAction in marks:
            repeatable.add(flag)
    return known, repeatable


INT, FLOAT = "takes a whole number", "takes a number"
REPHRASED = (
    (r"Error parsing \w+Config: (.*)", r"\1"),  # a UserError of ours
    (
        r"Error parsing (?:-\w/)?(\S+): invalid literal for int\(\) with base 10: (.*)",
        rf"\1 {INT}, not \2",
    ),
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
    # tyro draws a box with a title around its message, and below a rule repeats where help is to be had.
    lines = [re.sub(r"[│╭╮╰╯]+", " ", line).strip() for line in text.splitlines()[1:]]
    kept = " ".join("\n".join(lines).partition("─")[0].split())
    for pattern, plain in REPHRASED:
        if re.fullmatch(pattern, kept):
            return re.sub(pattern, plain, kept)
    return kept or "the options cannot be read"


def check_writable(path: Path, option: str) -> None:
    """Raise a `UserError` unless a file can be written at `path`: before work whose results would be lost."""
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder to write in")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"cannot write {path}: give {option} the name of a file")


def warn(message: str) -> None:
    """Print one line on stderr; of several processes, all but the first say which they are."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    print(f"srwm-rl: {message}" if rank == "0" else f"srwm-rl: process {rank}: {message}", file=sys.stderr)


def allow_core(core: str, named: str | None) -> None:
    """Import a core of the user's own, `my_module:MyCore`, if the command line itself names it.

    A run folder's settings alone never decide what code is imported.

    Raises:
        UserError: the core is the user's own and `named` is not it, or it cannot be imported.
    """
    if ":" not in core:
        return
    if named != core:
        raise UserError(f"core {core!r} is code of your own, which no file can start: add --core {core}")
    from srwm_rl import import_core

    import_core(core)
