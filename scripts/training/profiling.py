"""`srwm-rl train --profile`: a table of where the time of an update goes, and a trace for the browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from srwm_rl.agents.run.callbacks import RolloutCallback
from srwm_rl.agents.run.profiling import Path as Parts
from srwm_rl.agents.run.profiling import Spent, Stopwatch, time_parts
from srwm_rl.scripts.cli import warn

WARM_UP, TIMED = 1, 3  # updates; the one after them is traced
TRACE = "profile.json.gz"
ALL_THREADS = _ExperimentalConfig(profile_all_threads=True)  # the CNN's, and the learner's beside its actors


class Profile(RolloutCallback):
    """Time the parts of three updates, trace one, and report; training then continues without overhead."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        super().__init__()
        self.folder, self.report = folder, report
        self.rollouts = 0
        self.stopwatch: Stopwatch | None = None
        self.tracer: profile | None = None
        self.spent: dict[Parts, Spent] | None = None

    def _on_training_start(self) -> None:
        self.stopwatch = time_parts(self.model, record_function)

    def _on_rollout_start(self) -> None:
        self.rollouts += 1
        if self.stopwatch is None:
            return
        if self.rollouts == 1 + WARM_UP:
            self.stopwatch.reset()
            self.start, self.start_steps = time.perf_counter(), self.num_timesteps
        elif self.rollouts == 1 + WARM_UP + TIMED:
            self._stop_timing(self.stopwatch)
            on_gpu = [ProfilerActivity.CUDA] if self.model.device.type == "cuda" else []
            self.tracer = profile(activities=[ProfilerActivity.CPU, *on_gpu], experimental_config=ALL_THREADS)
            self.tracer.start()
        elif self.rollouts == 2 + WARM_UP + TIMED:
            self._finish(self.stopwatch)

    def _on_training_end(self) -> None:
        if self.stopwatch is not None:
            if self.rollouts > WARM_UP and self.spent is None:
                self._stop_timing(self.stopwatch)
            self._finish(self.stopwatch)

    def _stop_timing(self, stopwatch: Stopwatch) -> None:
        self.seconds = time.perf_counter() - self.start
        self.steps = self.num_timesteps - self.start_steps
        self.updates = min(TIMED, self.rollouts - WARM_UP)
        self.spent = dict(stopwatch.spent)

    def _finish(self, stopwatch: Stopwatch) -> None:
        stopwatch.unwrap()
        self.stopwatch = None
        if self.spent is None:
            warn("no profile: the run ended within its first update, which only warms up; give it more steps with -n")
            return
        lines = [table(self.spent, self.seconds, self.updates, self.steps)]
        if self.model.device.type == "cuda":
            lines.append("Every part waited for the GPU, which takes time: without --profile the run is faster.")
        if self.tracer is not None:
            self.tracer.stop()
            lines.append(self._write_trace(self.tracer))
            self.tracer = None
        self.report("\n".join(lines))

    def _write_trace(self, tracer: profile) -> str:
        path = self.folder / TRACE
        try:
            tracer.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # such as a full disk
            return f"no trace: {path} could not be written ({error})"
        return f"A trace of one update is in {path}: open it at https://ui.perfetto.dev"


def table(spent: dict[Parts, Spent], seconds: float, updates: int, steps: int) -> str:
    """Return the times of all parts as a text table, per update.

    `spent` holds the sums over all updates by path, `seconds` their wall-clock time, `steps` their environment steps.
    """
    rows = [("part", "ms", "share", "calls")]

    def add_row(name: str, depth: int, part_seconds: float, calls: str = "") -> None:
        milliseconds = f"{1e3 * part_seconds / updates:,.1f}"
        rows.append(("  " * depth + name, milliseconds, f"{part_seconds / seconds:.1%}", calls))

    def add_children(parent: Parts) -> float:
        """Add the rows below a path; return the sum of its children."""
        children = sorted((path for path in spent if path[:-1] == parent), key=lambda path: -spent[path].seconds)
        for path in children:
            add_row(path[-1], len(parent), spent[path].seconds, f"{spent[path].calls / updates:,.0f}")
            inside = add_children(path)
            if inside:
                add_row("other", len(path), spent[path].seconds - inside)
        return sum(spent[path].seconds for path in children)

    add_children(())
    top = sum(spent[path].seconds for path in (("collect",), ("learn",)) if path in spent)
    add_row("between (logs, callbacks, checkpoints)", 0, max(0.0, seconds - top))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))).rstrip() for row in rows]
    title = (
        f"An update of {steps / updates:,.0f} steps takes {seconds / updates:.3f} s ({steps / seconds:,.0f} steps/s):"
    )
    return "\n".join([title, *lines])
