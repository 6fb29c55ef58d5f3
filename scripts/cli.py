"""Reading a command line into a dataclass, with one clear line where it cannot be read."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

from srwm_rl.errors import UserError, did_you_mean

Config = TypeVar("Config")


def parse(config: type[Config], argv: list[str], prog: str, default: Config | None = None) -> Config:
    """Read `argv` into `config`, starting from `default`.

    Raises:
        UserError: an unknown option (the nearest one is suggested), or a value that cannot be read.
        SystemExit: 0 after --help.
    """
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
        flag = unknown[0].partition("=")[0]
        raise UserError(f"unknown option {flag!r}{_nearest_flag(flag, config)}; see {prog} --help")
    return parsed


def peek(argv: list[str], *names: str) -> str | None:
    """Return the value given to an option, before the defaults of the others are known."""
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in names:
            if equals:
                return value
            return argv[position + 1] if position + 1 < len(argv) else None
    return None


def _nearest_flag(flag: str, config: Any) -> str:
    if not is_dataclass(config):
        return ""
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(config)]
    hint = did_you_mean(flag.replace("_", "-"), flags)
    return hint if "did you mean" in hint else ""


def _one_line(text: str) -> str:
    # tyro draws a box around its message and repeats where help is to be had.
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in text.splitlines()]
    kept = [
        line
        for line in lines
        if line and "full helptext" not in line and line not in ("Parsing error", "Required options")
    ]
    return " ".join(kept) or "the options cannot be read"


def warn(message: str) -> None:
    """Print one line on stderr."""
    print(f"srwm-rl: {message}", file=sys.stderr)
