"""Work on a GPU as captured graphs, one launch for what would be a hundred and more; and acting by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from srwm_rl.nn.module_fingerprint import ModuleFingerprint
from srwm_rl.nn.policy import ActStep, Obs, SRWMPolicy

Result = TypeVar("Result")
Work = Callable[[], ActStep]
logger = logging.getLogger(__name__)
# Held by whoever captures, and by whoever draws actions: a capture sets the generator of random numbers apart, and what
# draws from it meanwhile in another thread fails.
CAPTURING = RLock()


class _Captured(NamedTuple):
    """A graph and the tensors that it reads and writes."""

    inputs: tuple[Obs, Tensor, Tensor]
    replay: Work


def capture(work: Callable[[], Result], stream: Any, pool: Any = None, draws: bool = True) -> Callable[[], Result]:
    """Capture `work`, which must not depend on anything but the memory it reads, as a CUDA graph.

    Args:
        work: done four times, three of them to warm up.
        stream: on which it is captured, of the device that does it. torch's own for this is of the device of its first
            use, and libraries keep memory of a stream's first graph for all that follow: one owner's graphs share one.
        pool: `torch.cuda.graph_pool_handle()` of graphs of which one is replayed at a time; None: memory of its own.
        draws: whether it draws random numbers.

    Returns:
        What launches it; the result is in the same tensors every time.

    Raises:
        RuntimeError: it cannot be captured; what is no part of the capture goes on as before.
    """
    with torch.cuda.device(stream.device):
        return _capture(work, stream, pool, draws)


def _capture(work: Callable[[], Result], stream: Any, pool: Any, draws: bool) -> Callable[[], Result]:
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):  # libraries and the allocator settle before the capture
            for _ in range(3):
                work()
    finally:  # also where it fails, as where memory is short: what it has begun still reads and writes
        here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # The outer stream: a capture that fails leaves its own behind as the current one. Another thread may be learning
    # meanwhile: what it launches is no part of this.
    capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    with CAPTURING, _cleared_up(pool, draws), _unchecked(), torch.cuda.stream(here), capturing:
        result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@contextmanager
def _cleared_up(pool: Any, draws: bool) -> Iterator[None]:
    """Undo what a capture that fails leaves behind: a generator and an allocator that believe it is still going on.

    A graph draws from the generator's state that was there when it was captured, as others do. One that draws nothing
    gets a copy, which may be lost: the state of the graphs that do draw is not.
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
        with suppress(RuntimeError, AttributeError):  # torch does it itself, or has no door to it
            torch._C._cuda_endAllocateToPool(device, pool)
        raise
    if not draws:
        generator.graphsafe_set_state(before)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Keep torch's distributions from checking what they are given, for which they wait for the device.

    What comes out of a graph is looked at in any case; see `srwm_rl.agents.engine.nan_guard.NanGuard`.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


class GraphedActing:
    """Call it like `policy.act`: the same results, by a graph that is captured at the first call for a batch size.

    The weights are read where they are, so that a policy may learn between two calls. Where weights or modules were
    replaced, moved or frozen (`ModuleFingerprint`), graphs are captured anew. A graph that cannot be captured, or whose first
    results are not the policy's, is given up with a line in the log, and the policy acts step by step.

    Args:
        policy: that acts, sampling its actions.
        capture: makes the graph; another one is for tests.
    """

    def __init__(self, policy: SRWMPolicy, capture: Callable[[Work], Work] | None = None) -> None:
        self.policy, self.capture = policy, capture
        self._stream: Any = None
        self._captured: dict[tuple[int, ...], _Captured] = {}  # by the core state's shape
        self._fingerprint: ModuleFingerprint | None = None
        self.disabled = False

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedActing:
        """Copy the policy; graphs hold places in memory, and are made anew."""
        return GraphedActing(deepcopy(self.policy, memo), self.capture)

    @torch.no_grad()
    def __call__(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        """Choose actions; arguments and result as in `SRWMPolicy.act`, the result in memory of its own."""
        given = (obs, core_state, episode_starts)
        with CAPTURING:
            if self._fingerprint is None or not self._fingerprint.matches():
                self._fingerprint, self._captured, self.disabled = ModuleFingerprint(self.policy), {}, False
            if not self.disabled and core_state.shape not in self._captured:
                self._try_to_capture(given)
            if self.disabled:
                return self.policy.act(*given)
            captured = self._captured[core_state.shape]
            copy_into(captured.inputs, given)
            # The next replay writes over these tensors, while a rollout may still hold them.
            return ActStep(*(each.clone() for each in captured.replay()))

    def _try_to_capture(self, given: tuple[Obs, Tensor, Tensor]) -> None:
        # A resumed run captures anew, and is to draw what it would have drawn.
        with torch.random.fork_rng([given[1].device] if given[1].is_cuda else []):
            self._capture_and_compare(given)

    def _capture_and_compare(self, given: tuple[Obs, Tensor, Tensor]) -> None:
        inputs = room_for(given, given[1].device)
        copy_into(inputs, given)
        try:
            replay = self._make(lambda: self.policy.act(*inputs))
            for each in replay()[1:]:  # which a graph that does nothing would leave as they are
                each.fill_(torch.nan)
            wrong = self._difference(replay(), given)
        except RuntimeError as error:
            wrong = first_line(error)
        if wrong:
            self.disabled, self._captured = True, {}
            logger.warning("acting goes on without a CUDA graph: %s", wrong)
            return
        self._captured[given[1].shape] = _Captured(inputs, replay)

    def _make(self, work: Work) -> Work:
        if self.capture is not None:
            return self.capture(work)
        if self._stream is None or self._stream.device != self.policy.device:
            # A graph's kernels keep the priority of the stream that it is captured on. These go before those of a
            # learner at work beside them, each of which is as long as all of a step's.
            self._stream = torch.cuda.Stream(self.policy.device, priority=-1)
        return capture(work, self._stream)

    def _difference(self, found: ActStep, given: tuple[Obs, Tensor, Tensor]) -> str:
        """Say in what a graph's result differs from the policy's own, apart from chance."""
        expected = self.policy.act(*given)
        for name in ("values", "core_state"):
            one, other = getattr(found, name), getattr(expected, name)
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True):
                return f"its {name} differ from those of the policy"
        return ""


def first_line(error: BaseException) -> str:
    """Return what the first error of a chain says, without torch's advice below it.

    A capture that went wrong ends with a second error, which says only that.
    """
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def room_for(given: Any, device: torch.device) -> Any:
    """Return tensors like those in `given`, of any (named) tuples and dicts; a number gets a tensor `[]` of float64."""
    if isinstance(given, dict):
        return {key: room_for(each, device) for key, each in given.items()}
    if isinstance(given, tuple):
        parts = [room_for(each, device) for each in given]
        return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
    if isinstance(given, float):
        return torch.full((), given, dtype=torch.float64, device=device)
    return None if given is None else torch.empty_like(given)


def copy_into(room: Any, given: Any) -> None:
    """Copy what is in `given` into what `room_for` made for it; nothing waits for the device."""
    if isinstance(room, dict):
        for key, each in room.items():
            copy_into(each, given[key])
    elif isinstance(room, tuple):
        for each, source in zip(room, given, strict=True):
            copy_into(each, source)
    elif isinstance(given, float):
        room.fill_(given)
    elif room is not None:
        room.copy_(given)
