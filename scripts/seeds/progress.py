"""One line per seed while a group trains, from what the runs write to their metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_end
from srwm_rl.storage.run_folder import METRICS
from srwm_rl.storage.strict_json import parse_json

LINE_SECONDS = 60.0  # between lines of a log file
TAIL = 2**16  # bytes
WAITING, RUNNING = "waiting", "running"  # states of a run


class SeedProgress:
    """Bars on a terminal; else a line per running seed every minute, and one where a run ends.

    Args:
        runs: seed and run folder of each run.
        total: steps of each run.
        shown: whether to show anything.
    """

    def __init__(self, runs: Sequence[tuple[int, Path]], total: int, shown: bool) -> None:
        self.paths, self.total = dict(runs), total
        self.states = dict.fromkeys(self.paths, WAITING)
        console = Console(stderr=True)
        self.lines = shown and not console.is_terminal
        columns = (
            TextColumn("seed {task.fields[seed]}"),
            BarColumn(),
            TextColumn("{task.completed:,} of {task.total:,} steps  {task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=console, disable=not shown or self.lines)
        self.tasks: dict[int, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> SeedProgress:
        self.bars.start()
        for seed, path in self.paths.items():
            # The steps of a resumed run say nothing about its speed.
            steps = min(latest(path)[0], self.total)
            self.tasks[seed] = self.bars.add_task("", total=self.total, completed=steps, seed=seed, state=WAITING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def update(self, states: Mapping[int, str]) -> None:
        """Show how far the runs are; `states` are `WAITING`, `RUNNING` or how the run ended, by seed."""
        is_due = time.monotonic() - self._last_line > LINE_SECONDS
        for seed, state in states.items():
            ends = state not in (self.states[seed], RUNNING)
            if self.lines and not ends and not (is_due and state == RUNNING):
                continue
            steps, result = latest(self.paths[seed])
            text = ", ".join(part for part in (result, "" if state == RUNNING else state) if part)
            if self.lines:
                comma = ", " * bool(text)
                print(f"seed {seed}: {steps:,} of {self.total:,} steps{comma}{text}", file=sys.stderr, flush=True)
            else:
                self.bars.update(self.tasks[seed], completed=min(steps, self.total), state=text)
        self.states |= states
        if is_due:
            self._last_line = time.monotonic()


def latest(run: Path) -> tuple[int, str]:
    """Return a run's steps and its mean training return as text, from the end of its metrics; 0 and "" before them."""
    try:
        lines = read_end(run / METRICS, TAIL).splitlines()
    except UserError:
        return 0, ""
    for line in reversed(lines):
        try:
            row: dict[str, Any] = parse_json(line)
            value = row.get("rollout/ep_rew_mean")
            return int(row["step"]), "" if value is None else f"return {value:.3g}"
        except (ValueError, KeyError, TypeError, AttributeError):  # the line is being written, or cut
            continue
    return 0, ""
