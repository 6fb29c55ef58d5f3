"""The run's log: metrics as JSON lines, one per update, without gaps or repetitions after a resume or a full disk."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter

from srwm_rl.storage.safe_file import write_whole

RETRY_SECONDS = 30.0  # after a row could not be written
MAX_UNWRITTEN = 2**20  # bytes of rows that are kept for when they can be written


class MetricsFile(KVWriter):
    """An SB3 logger output that appends a JSON object per update and can be truncated to a checkpoint's position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: what a full disk refuses must not be kept, and raise an error again when the file is closed.
        self.file = path.open("a+b", buffering=0)
        self._unwritten = b""  # rows

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append `{"step": step, ...}`; numbers only, non-finite ones as null.

        Raises:
            OSError: it cannot be written; a later call writes it too.
        """
        numbers: dict[str, float | None] = {}
        for key, value in sorted(key_values.items()):
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                plain = value.item() if isinstance(value, np.number) else value
                numbers[key] = plain if math.isfinite(plain) else None
        self._unwritten += json.dumps({"step": step, **numbers}).encode() + b"\n"
        self._write_rows()

    def _write_rows(self) -> None:
        """Write the rows that are not in the file, all or none."""
        before, rest = self.file.seek(0, os.SEEK_END), memoryview(self._unwritten)
        try:
            while rest:  # a part, where the disk has no room for more; the next call then raises the error
                rest = rest[self.file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self.file.truncate(before)
            if len(self._unwritten) > MAX_UNWRITTEN:  # the oldest rows are lost
                self._unwritten = self._unwritten[-MAX_UNWRITTEN // 2 :].partition(b"\n")[2]
            raise
        self._unwritten = b""

    def position(self) -> int:
        """Return the length of the file in bytes, with the rows that could not be written before if they can be now."""
        with suppress(OSError):
            self._write_rows()
        return self.file.seek(0, os.SEEK_END)

    def cut(self, position: int) -> None:
        """Remove what was written after a `position()` that a checkpoint holds."""
        self._unwritten = b""
        if position < self.position():
            self.file.truncate(position)

    def restore(self) -> bool:
        """Write the log again at its path if it was moved or deleted; return whether it was.

        Raises:
            OSError: it cannot be written.
        """
        with suppress(OSError):
            if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                return False
        self.file.seek(0)
        write_whole(self.path, self.file.read())
        file, self.file = self.file, self.path.open("a+b", buffering=0)
        file.close()
        return True

    def close(self) -> None:
        """Close the file."""
        self.position()
        self.file.close()


class OptionalOutput(KVWriter):
    """An output of SB3's logger whose errors, such as a full disk's, cost rows and nothing else.

    Args:
        make_output: makes the output.
        on_error: called with an error unless the row before it could not be written either.
        reopen: after an error, drop rows for `RETRY_SECONDS` and make the output anew.
    """

    def __init__(
        self, make_output: Callable[[], KVWriter], on_error: Callable[[OSError], None], reopen: bool = True
    ) -> None:
        self.make_output, self.on_error, self.reopen = make_output, on_error, reopen
        self.output: KVWriter | None = None
        self.failed = False
        self._failed_time = 0.0

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write to the output, or drop the row."""
        if self.failed and self.reopen and monotonic() - self._failed_time < RETRY_SECONDS:
            return
        try:
            if self.output is None:
                self.output = self.make_output()
            self.output.write(key_values, key_excluded, step)
            self.failed = False
        except OSError as error:
            if not self.failed:
                self.on_error(error)
            self.failed, self._failed_time = True, monotonic()
            if self.reopen:
                self.close()

    def close(self) -> None:
        """Close the output; another row makes it anew."""
        output, self.output = self.output, None
        if output is not None:
            with suppress(OSError):
                output.close()


def silence_tensorboard() -> None:
    """Print no traceback of TensorBoard's thread, whose error the next write raises again."""
    hook = threading.excepthook

    def print_others(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
            hook(args)

    if getattr(hook, "__name__", None) != print_others.__name__:
        threading.excepthook = print_others
