"""The run's log: metrics as JSON lines, one per update, without gaps or repetitions after a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter

from srwm_rl.storage.safe_file import write_whole


class MetricsFile(KVWriter):
    """An SB3 logger output that appends a JSON object per update and can be truncated to a checkpoint's position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: what a full disk refuses must not be kept, and raise an error again when the file is closed.
        self.file = path.open("a+b", buffering=0)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append `{"step": step, ...}`; numbers only, non-finite ones as null.

        Raises:
            OSError: it cannot be written; nothing of this row is in the file.
        """
        numbers: dict[str, float | None] = {}
        for key, value in sorted(key_values.items()):
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                plain = value.item() if isinstance(value, np.number) else value
                numbers[key] = plain if math.isfinite(plain) else None
        line = json.dumps({"step": step, **numbers}).encode() + b"\n"
        before = self.position()
        try:
            rest = memoryview(line)
            while rest:  # a part, where the disk has no room for more; the next call then raises the error
                rest = rest[self.file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self.file.truncate(before)
            raise

    def position(self) -> int:
        """Return the length of the file in bytes."""
        return self.file.seek(0, os.SEEK_END)

    def cut(self, position: int) -> None:
        """Remove what was written after a `position()` that a checkpoint holds."""
        if position < self.position():
            self.file.truncate(position)

    def restore(self) -> None:
        """Write the log again at its path, from which it was moved or deleted.

        Raises:
            OSError: it cannot be written.
        """
        if self.path.exists():
            return
        self.file.seek(0)
        write_whole(self.path, self.file.read())
        file, self.file = self.file, self.path.open("a+b", buffering=0)
        file.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class OptionalOutput(KVWriter):
    """An output of SB3's logger whose errors, such as a full disk's, cost rows and nothing else.

    Args:
        make_output: makes the output.
        on_error: called with an error unless the row before it could not be written either.
        reopen: make the output anew after an error; what it has not written is lost.
    """

    def __init__(
        self, make_output: Callable[[], KVWriter], on_error: Callable[[OSError], None], reopen: bool = True
    ) -> None:
        self.make_output, self.on_error, self.reopen = make_output, on_error, reopen
        self.output: KVWriter | None = None
        self.failed = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write to the output, or drop the row."""
        try:
            if self.output is None:
                self.output = self.make_output()
            self.output.write(key_values, key_excluded, step)
            self.failed = False
        except OSError as error:
            if not self.failed:
                self.on_error(error)
            self.failed = True
            if self.reopen:
                self.close()

    def close(self) -> None:
        """Close the output."""
        output, self.output = self.output, None
        if output is not None:
            with suppress(OSError):
                output.close()
