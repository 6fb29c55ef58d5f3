"""`srwm-rl train --profile`: a table of where the time of an update went, and a trace for the browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.profiling import Path as Parts
from srwm_rl.agents.run.profiling import Spent, Stopwatch, time_parts
from srwm_rl.scripts.cli import warn

WARM_UP, TIMED = 1, 3  # updates; the one after them is traced
TRACE = "profile.json.gz"
ALL_THREADS = _ExperimentalConfig(profile_all_threads=True)  # the CNN runs in several, a learner in its own


class Profile(BaseCallback):
    """Time the parts of three updates, trace one, say so, and let the training go on as if nothing had been.

    Args:
        folder: where the trace goes.
        say: called with the table.
    """

    model: RecurrentAlgorithm

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__()
        self.folder, self.say = folder, say
        self.rollouts = 0
        self.watch: Stopwatch | None = None
        self.tracer: Any = None
        self.timed: dict[Parts, Spent] | None = None

    def _on_training_start(self) -> None:
        self.watch = time_parts(self.model, self._mark)

    def _mark(self, name: str) -> AbstractContextManager[Any]:
        return record_function(name)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.rollouts += 1
        if self.watch is None:
            return
        if self.rollouts == 1 + WARM_UP:
            self.watch.reset()
            self.began, self.steps = time.perf_counter(), self.num_timesteps
        elif self.rollouts == 1 + WARM_UP + TIMED:
            self._stop_the_clock()
            on_gpu = [ProfilerActivity.CUDA] if self.model.device.type == "cuda" else []
            self.tracer = profile(activities=[ProfilerActivity.CPU, *on_gpu], experimental_config=ALL_THREADS)
            self.tracer.start()
        elif self.rollouts == 2 + WARM_UP + TIMED:
            self._finish()

    def _on_training_end(self) -> None:
        if self.watch is not None:
            if self.rollouts > WARM_UP and self.timed is None:
                self._stop_the_clock()
            self._finish()

    def _stop_the_clock(self) -> None:
        assert self.watch is not None
        self.seconds = time.perf_counter() - self.began
        self.steps = self.num_timesteps - self.steps
        self.updates = min(TIMED, self.rollouts - WARM_UP)
        self.timed = dict(self.watch.spent)

    def _finish(self) -> None:
        assert self.watch is not None
        self.watch.unwrap()
        self.watch = None
        if self.timed is None:
            warn("no profile: the run ended within its first update, which only warms up; give it more steps with -n")
            return
        lines = [table(self.timed, self.seconds, self.updates, self.steps)]
        if self.model.device.type == "cuda":
            lines.append("Every part waited for the GPU, which costs time: without --profile the run is faster.")
        if self.tracer is not None:
            self.tracer.stop()
            lines.append(self._write_trace())
            self.tracer = None
        self.say("\n".join(lines))

    def _write_trace(self) -> str:
        path = self.folder / TRACE
        try:
            self.tracer.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a full disk costs the trace, not the run
            return f"no trace: {path} could not be written ({error})"
        return f"A trace of one update is in {path}: open it at https://ui.perfetto.dev"


def table(spent: dict[Parts, Spent], seconds: float, updates: int, steps: int) -> str:
    """Return where the time went, per update.

    Args:
        spent: by path, of all updates together.
        seconds: that passed meanwhile.
        updates: how many.
        steps: environment steps that they took.
    """
    rows: list[tuple[str, str, str, str]] = [("part", "ms", "share", "calls")]

    def add(name: str, depth: int, time_spent: float, calls: float | None) -> None:
        counted = "" if calls is None else f"{calls:,.0f}"
        shown = f"{1e3 * time_spent / updates:,.1f}"
        rows.append(("  " * depth + name, shown, f"{time_spent / seconds:.1%}", counted))

    def below(path: Parts) -> list[Parts]:
        inside = [each for each in spent if each[:-1] == path]
        return sorted(inside, key=lambda each: -spent[each].seconds)

    def show(path: Parts) -> None:
        add(path[-1], len(path) - 1, spent[path].seconds, spent[path].calls / updates)
        inside = below(path)
        for each in inside:
            show(each)
        if inside:
            rest = spent[path].seconds - sum(spent[each].seconds for each in inside)
            add("the rest of it", len(path), rest, None)

    for root in below(()):
        show(root)
    top = sum(spent[path].seconds for path in (("collect",), ("learn",)) if path in spent)
    add("between (logs, callbacks, checkpoints)", 0, max(0.0, seconds - top), None)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    head = f"An update of {steps / updates:,.0f} steps takes {seconds / updates:.3f} s"
    return "\n".join([f"{head} ({steps / seconds:,.0f} steps/s):", *("  ".join(cells).rstrip() for cells in lines)])
