"""Options of every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from srwm_rl.errors import UserError


@dataclass(frozen=True)
class BenchOptions:
    """Options of every benchmark."""

    rounds: int = 5
    """Measurements of each side, in alternation; medians and ranges are printed."""
    threads: int | None = None
    """Threads of torch; None: one per core, or one to train a policy without a CNN."""
    json: Path | None = None
    """Write the results to this file too."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads", "n_envs", "n_steps", "batch_size", "n_epochs", "micro_batch"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
