"""`srwm-rl train --profile`: a table of where the time of an update goes, and a trace for the browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.collector import groups_of
from srwm_rl.agents.run.callbacks import RolloutCallback
from srwm_rl.scripts.cli import warn

WARM_UP, TIMED = 1, 3  # updates; the one after them is traced
TRACE = "profile.json.gz"
ALL_THREADS = _ExperimentalConfig(profile_all_threads=True)  # the CNN's, and the learner's beside its actors
Parts = tuple[str, ...]  # a part's name, after those of the parts that called it


class Spent(NamedTuple):
    """Time in one part, everything inside it included."""

    seconds: float
    calls: int


class Stopwatch:
    """Time methods of objects, each below the part that called it, and mark them in a trace.

    On a GPU, where calls return early, both ends of every part wait for it. Every thread has its own path: the parts of
    a learner beside the actors are at the top level.

    Attributes:
        spent: time by path.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.spent: dict[Parts, Spent] = {}
        self._thread, self._lock, self._patches = local(), Lock(), ExitStack()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block to `name`, below this thread's present part."""
        outer: Parts = getattr(self._thread, "path", ())
        path = self._thread.path = (*outer, name)
        with record_function(name):
            self._synchronize()
            start = time.perf_counter()
            try:
                yield
            finally:
                self._synchronize()
                seconds = time.perf_counter() - start
                self._thread.path = outer
                with self._lock:
                    before = self.spent.get(path, Spent(0.0, 0))
                    self.spent[path] = Spent(before.seconds + seconds, before.calls + 1)

    def _synchronize(self) -> None:
        if self.device is not None and self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            # Not with the device: while another thread captures, that is forbidden.
            torch.cuda.current_stream(self.device).synchronize()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time `owner.method` as `name` until `unwrap`."""
        self._patches.enter_context(patch.object(owner, method, self.part(name)(getattr(owner, method))))

    def unwrap(self) -> None:
        """Restore all methods."""
        self._patches.close()

    def reset(self) -> None:
        """Clear the times; parts that are running are counted when they end."""
        with self._lock:
            self.spent = {}


def time_parts(model: RecurrentAlgorithm) -> Stopwatch:
    """Return a stopwatch that times the parts of a trainer's work until it is unwrapped."""
    watch = Stopwatch(model.device)
    watch.wrap(model, "collect_rollouts", "collect")
    watch.wrap(model, "train", "learn")
    watch.wrap(model.nan_guard, "act", "act")  # however it is done: step by step, as a graph, in C
    for policy in dict.fromkeys((model.policy, model.acting_policy)):
        watch.wrap(policy.features_extractor, "forward", "encoder")  # these two: where they are not part of a whole
        watch.wrap(policy.core, "forward", "core")
        for network in policy.features_extractor.images.values():
            watch.wrap(network, "forward", "images")
    watch.wrap(model.engine, "add_gradient", "gradient")  # in C, or forward and backward
    watch.wrap(model.engine, "evaluate_sequence", "forward")
    watch.wrap(torch.autograd, "backward", "backward")
    watch.wrap(model.policy.optimizer, "step", "optimizer")
    assert model.env is not None
    groups = groups_of(model.env)
    for group in groups:
        watch.wrap(group.env, "step", "environments")
    if len(groups) > 1:  # which step in threads of their own
        watch.wrap(model, "_finish_step", "waiting for environments")
    if hasattr(model, "_update"):
        watch.wrap(model, "_update", "update")
    if hasattr(model.rollout_buffer, "_gather_sequences"):
        watch.wrap(model.rollout_buffer, "_gather_sequences", "minibatch")
    return watch


class Profile(RolloutCallback):
    """Time the parts of three updates, trace one, and print a report; training then continues without overhead."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / TRACE
        self.updates = -1  # that have ended
        self.report: list[str] = []
        self.tracer: profile | None = None

    def _on_training_start(self) -> None:
        self.stopwatch = time_parts(self.model)

    def _on_rollout_start(self) -> None:
        self.updates += 1
        if self.updates == WARM_UP:
            self.stopwatch.reset()
            self.start, self.start_steps = time.perf_counter(), self.num_timesteps
        elif self.updates == WARM_UP + TIMED:
            self._stop_timing()
            on_gpu = [ProfilerActivity.CUDA] if self.model.device.type == "cuda" else []
            self.tracer = profile(activities=[ProfilerActivity.CPU, *on_gpu], experimental_config=ALL_THREADS)
            self.tracer.start()
        elif self.updates == WARM_UP + TIMED + 1:
            self._finish()

    def _on_training_end(self) -> None:
        self.updates += 1
        if WARM_UP < self.updates <= WARM_UP + TIMED:
            self._stop_timing()
        if self.updates <= WARM_UP + TIMED + 1:
            self._finish()

    def _stop_timing(self) -> None:
        seconds, steps = time.perf_counter() - self.start, self.num_timesteps - self.start_steps
        self.report.append(table(dict(self.stopwatch.spent), seconds, self.updates - WARM_UP, steps))
        if self.model.device.type == "cuda":
            self.report.append("Every part waited for the GPU, which takes time: without --profile the run is faster.")

    def _finish(self) -> None:
        self.stopwatch.unwrap()
        if not self.report:
            warn("no profile: the run ended within its first update, which only warms up; give it more steps with -n")
            return
        if self.tracer is not None:
            self.tracer.stop()
            try:
                self.tracer.export_chrome_trace(str(self.path))
                self.report.append(f"A trace of one update is in {self.path}: open it at https://ui.perfetto.dev")
            except (OSError, RuntimeError) as error:  # such as a full disk
                self.report.append(f"no trace: {self.path} could not be written ({error})")
            self.tracer = None
        print("\n".join(self.report), flush=True)


def table(spent: dict[Parts, Spent], seconds: float, updates: int, steps: int) -> str:
    """Return the times of all parts as a text table, per update.

    `spent` holds the sums over all updates by path, `seconds` their wall-clock time, `steps` their environment steps.
    """
    rows = [("part", "ms", "share", "calls")]

    def add_row(name: str, depth: int, part_seconds: float, calls: str = "") -> None:
        milliseconds = f"{1e3 * part_seconds / updates:,.1f}"
        rows.append(("  " * depth + name, milliseconds, f"{part_seconds / seconds:.1%}", calls))

    def add_children(parent: Parts, total: float) -> None:
        children = sorted((path for path in spent if path[:-1] == parent), key=lambda path: -spent[path].seconds)
        for path in children:
            add_row(path[-1], len(parent), spent[path].seconds, f"{spent[path].calls / updates:,.0f}")
            add_children(path, spent[path].seconds)
        if children and parent:
            add_row("other", len(parent), total - sum(spent[path].seconds for path in children))

    add_children((), seconds)
    top = sum(spent[path].seconds for path in (("collect",), ("learn",)) if path in spent)
    add_row("between (logs, callbacks, checkpoints)", 0, max(0.0, seconds - top))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))).rstrip() for row in rows]
    title = (
        f"An update of {steps / updates:,.0f} steps takes {seconds / updates:.3f} s ({steps / seconds:,.0f} steps/s):"
    )
    return "\n".join([title, *lines])
