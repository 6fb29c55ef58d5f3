"""The one way in which files that a user names are read: regular files only, with a bound on what is read of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from srwm_rl.errors import UserError

MAX_LINE_BYTES = 2**20


def read_small(path: Path, most_bytes: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        UserError: it cannot be read, is no regular file (reading a pipe might never end), or is too long.
    """
    with _open_regular(path, most_bytes) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_start(path: Path, n_bytes: int) -> bytes:
    """Return the first `n_bytes` of a regular file of any size, or all of a shorter one.

    Raises:
        UserError: it cannot be read, or is no regular file.
    """
    with _open_regular(path, None) as file:
        return file.read(n_bytes)


def read_end(path: Path, n_bytes: int) -> bytes:
    """Return the last `n_bytes` of a regular file of any size, or all of a shorter one.

    Raises:
        UserError: it cannot be read, or is no regular file.
    """
    with _open_regular(path, None) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - n_bytes))
        return file.read(n_bytes)


def read_lines(path: Path, most_bytes: int) -> Iterator[bytes]:
    """Yield the lines of a regular file, with their ends, without reading it as a whole.

    Raises:
        UserError: it cannot be read, is no regular file, is too long, or has a line of more than `MAX_LINE_BYTES`.
    """
    with _open_regular(path, most_bytes) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (line := file.readline(min(left, MAX_LINE_BYTES + 1))):
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"cannot read {path}: it has a line of more than {MAX_LINE_BYTES:,} bytes")
            left -= len(line)
            yield line


@contextmanager
def _open_regular(path: Path, most_bytes: int | None) -> Iterator[BinaryIO]:
    if "\0" in str(path):
        raise UserError(f"cannot read {path}: no file has such a name")
    try:
        _check(path, os.stat(path), most_bytes)  # opening a device can have effects
        # Without O_NONBLOCK, a pipe put there in between would be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            _check(path, os.fstat(file.fileno()), most_bytes)
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _check(path: Path, status: os.stat_result, most_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is no regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise UserError(
            f"cannot read {path}: it has {status.st_size:,} bytes, more than the {most_bytes:,} that are read"
        )
