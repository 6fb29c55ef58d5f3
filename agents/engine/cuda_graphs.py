"""CUDA graphs: many kernel launches as one; and graphs that are checked when captured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils import _pytree as pytree

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
# Held while capturing and while actions are sampled: a capture swaps the random generator's state, and sampling from it
# in another thread meanwhile fails.
CAPTURING = RLock()


def capture(work: Callable[[], Result], stream: Any, pool: Any = None, draws: bool = True) -> Callable[[], Result]:
    """Capture `work`, which must depend only on the memory it reads, as a CUDA graph.

    Args:
        work: called four times, three of them to warm up.
        stream: to capture on, of the device that does the work. One stream per owner of graphs: torch's default for
            this belongs to the device of its first use, and libraries keep memory per stream for all later graphs.
        pool: `torch.cuda.graph_pool_handle()` shared by graphs that are replayed one at a time; None: a new one.
        draws: whether it draws random numbers.

    Returns:
        What launches the graph; its result is in the same tensors every time.

    Raises:
        RuntimeError: it cannot be captured; the state of torch is as before.
    """
    with torch.cuda.device(stream.device):
        outer_stream = torch.cuda.current_stream()
        stream.wait_stream(outer_stream)
        try:
            with torch.cuda.stream(stream):  # libraries and the allocator settle before the capture
                for _ in range(3):
                    work()
        finally:  # also on errors such as out of memory: kernels already launched still read and write
            outer_stream.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        # `stream(outer_stream)`: a failed capture leaves its own stream current. "thread_local": another thread may be
        # learning meanwhile, and its launches are no part of the capture.
        capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with CAPTURING, _restored_after_failure(pool, draws), torch.cuda.stream(outer_stream), capturing:
            result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@contextmanager
def _restored_after_failure(pool: Any, draws: bool) -> Iterator[None]:
    """Restore the random generator and the allocator after a failed capture, which leaves both in capture mode.

    A graph draws from the generator state at its capture. A graph that draws nothing is captured with a copy of the
    state, which may be lost, so that the state of graphs that do draw is not.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    before, copy = generator.graphsafe_get_state(), generator.clone_state()
    if not draws:
        generator.graphsafe_set_state(copy)
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(copy if draws else before)
        with suppress(RuntimeError, AttributeError):  # some versions of torch do it themselves
            torch._C._cuda_endAllocateToPool(device, pool)
        raise
    if not draws:
        generator.graphsafe_set_state(before)


class CheckedGraphs:
    """A function's CUDA graphs, for different arguments.

    If a capture fails or a graph's first results differ from the function's, a warning is logged and all goes on
    without graphs.

    Attributes:
        disabled: whether graphs are no longer used.
    """

    what: ClassVar[str]  # goes on without graphs
    priority: ClassVar[int] = 0  # of the stream on which graphs are captured, which their kernels keep
    draws: ClassVar[bool]  # whether the function draws random numbers

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None
        self.disabled = False

    def _try_to_capture(
        self, work: Callable[[], Result], device: torch.device, difference: Callable[[Callable[[], Result]], str]
    ) -> Callable[[], Result] | None:
        """Return what launches `work` as a graph; None: that is not possible, and graphs are disabled from now on.

        Args:
            work: see `capture`.
            device: on which it runs.
            difference: names what is wrong with the graph's results, if anything.
        """
        try:
            replay = self._make_graph(work, device)
            problem = difference(replay)
        except RuntimeError as error:
            problem = first_line(error)
        if problem:
            self.disabled = True
            logger.warning("%s goes on without CUDA graphs: %s", self.what, problem)
            return None
        return replay

    def _make_graph(self, work: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device, priority=self.priority)
            # One pool: graphs are replayed one at a time and may share the memory of what is not their result.
            self._pool = torch.cuda.graph_pool_handle()
        return capture(work, self._stream, self._pool, self.draws)


def first_line(error: BaseException) -> str:
    """Return the first line of the first error of a chain: a failed capture ends with a second, uninformative one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def empty_like_args(args: Any, device: torch.device) -> Any:
    """Return uninitialised tensors shaped as those in `args` (nested tuples and dicts); `[]` of float64 for a float."""

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, float):
            return torch.empty((), dtype=torch.float64, device=device)
        return None if leaf is None else torch.empty_like(leaf)

    return pytree.tree_map(empty, args)


def copy_into(buffers: Any, args: Any) -> None:
    """Copy `args` into what `empty_like_args` returned for them, without waiting for the device; dicts key by key."""

    def copy(buffer: Any, leaf: Any) -> None:
        if isinstance(leaf, float):
            buffer.fill_(leaf)
        elif leaf is not None:
            buffer.copy_(leaf)

    pytree.tree_map(copy, buffers, args)
