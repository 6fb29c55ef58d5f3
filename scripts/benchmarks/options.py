"""What every benchmark is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from srwm_rl.errors import UserError


@dataclass(frozen=True)
class Common:
    """Options of every benchmark."""

    rounds: int = 5
    """Measurements of each side, in turn; medians and ranges are printed."""
    threads: int | None = None
    """Threads of torch; None: one per core, where a whole policy of vectors is trained one."""
    json: Path | None = None
    """Write the results to this file too."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads", "n_envs", "n_steps", "batch_size", "n_epochs", "micro_batch"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
