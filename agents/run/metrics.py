"""The run's metrics as JSON lines, one per update, without gaps or repetitions after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter


class MetricsFile(KVWriter):
    """An SB3 logger output that appends a JSON object per update and can be truncated to a checkpoint's position."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append `{"step": step, ...}`; numbers only, non-finite ones as null."""
        numbers: dict[str, float | None] = {}
        for key, value in sorted(key_values.items()):
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                plain = value.item() if isinstance(value, np.number) else value
                numbers[key] = plain if math.isfinite(plain) else None
        self.file.write(json.dumps({"step": step, **numbers}).encode() + b"\n")
        self.file.flush()

    def cut(self, position: int) -> None:
        """Remove what was written after a `file.tell()` that a checkpoint holds."""
        if position < self.file.tell():
            self.file.truncate(position)
            self.file.seek(position)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
