"""Profiling of training: time per named part of collecting and learning, measured by wrapping methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from threading import Lock, local
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.collector import groups_of

Path = tuple[str, ...]


class Spent(NamedTuple):
    """Time in one part, everything inside it included."""

    seconds: float
    calls: int


class Stopwatch:
    """Time methods of objects, each below the part that called it.

    `synchronize` is called at both ends of every part; on a GPU, where calls return early, it waits for the GPU. `mark`
    makes a context for a part's name, for a trace of the same time.

    Every thread has its own path: the parts of a learner beside the actors are at the top level.

    Attributes:
        spent: time by path.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        mark: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> None:
        self.synchronize, self.mark = synchronize, mark
        self.spent: dict[Path, Spent] = {}
        self._thread = local()
        self._lock = Lock()
        self._patches = ExitStack()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block to `name`, below this thread's present part."""
        outer: Path = getattr(self._thread, "path", ())
        path = self._thread.path = (*outer, name)
        with self.mark(name):
            self.synchronize()
            start = time.perf_counter()
            try:
                yield
            finally:
                self.synchronize()
                seconds = time.perf_counter() - start
                self._thread.path = outer
                with self._lock:
                    before = self.spent.get(path, Spent(0.0, 0))
                    self.spent[path] = Spent(before.seconds + seconds, before.calls + 1)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time `owner.method` as `name` until `unwrap`."""
        timed = getattr(owner, method)

        @wraps(timed)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return timed(*args, **kwargs)

        self._patches.enter_context(patch.object(owner, method, wrapper))

    def unwrap(self) -> None:
        """Restore all methods."""
        self._patches.close()

    def reset(self) -> None:
        """Clear the times; parts that are running are counted when they end."""
        with self._lock:
            self.spent = {}


def time_parts(model: RecurrentAlgorithm, mark: Callable[[str], AbstractContextManager[Any]]) -> Stopwatch:
    """Return a stopwatch that times the parts of a trainer's work until it is unwrapped."""
    on_gpu = model.device.type == "cuda"
    watch = Stopwatch((lambda: _wait_for(model.device)) if on_gpu else (lambda: None), mark)
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


def _wait_for(device: torch.device) -> None:
    if not torch.cuda.is_current_stream_capturing():  # what is being captured does not run yet
        # Not for the device: while another thread captures, that is forbidden.
        torch.cuda.current_stream(device).synchronize()
