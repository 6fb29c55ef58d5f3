"""Acting on a GPU as one captured graph: one launch for what would be a hundred and more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srwm_rl.policy import ActStep, Obs, SRWMPolicy

Work = Callable[[], ActStep]
logger = logging.getLogger(__name__)


class _Captured(NamedTuple):
    """A graph and the tensors that it reads and writes."""

    shape: tuple[int, ...]  # of the core state
    inputs: tuple[Obs, Tensor, Tensor]
    replay: Work


def capture(work: Work) -> Work:
    """Capture `work`, which must not depend on anything but the memory it reads, as a CUDA graph.

    Returns:
        What launches it; the result is in the same tensors every time.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries and the allocator settle before the capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another thread may be learning meanwhile: what it launches is no part of this.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def replay() -> ActStep:
        graph.replay()
        return result

    return replay


class GraphedActing:
    """Call it like `policy.act`: the same results, by a graph that is captured at the first call for a batch size.

    The weights are read where they are, so that a policy may learn between two calls; it must not move to another
    device. A graph that cannot be captured, or whose first results are not the policy's, is given up with a line in the
    log, and the policy acts step by step.

    Args:
        policy: that acts, sampling its actions.
        capture: makes the graph; another one is for tests.
    """

    def __init__(self, policy: SRWMPolicy, capture: Callable[[Work], Work] = capture) -> None:
        self.policy, self.capture = policy, capture
        self._captured: _Captured | None = None
        self.given_up = False

    @torch.no_grad()
    def __call__(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        """Choose actions; arguments and result as in `SRWMPolicy.act`, the result in memory of its own."""
        given = (obs, core_state, episode_starts)
        if not self.given_up and (self._captured is None or self._captured.shape != core_state.shape):
            self._try_to_capture(given)
        if self._captured is None:
            return self.policy.act(*given)
        _copy(self._captured.inputs, given)
        # The next replay writes over these tensors, while a rollout may still hold them.
        return ActStep(*(each.clone() for each in self._captured.replay()))

    def _try_to_capture(self, given: tuple[Obs, Tensor, Tensor]) -> None:
        self._captured = None
        inputs = _like(given)
        _copy(inputs, given)
        try:
            replay = self.capture(lambda: self.policy.act(*inputs))
            wrong = self._difference(replay(), given)
        except RuntimeError as error:
            wrong = str(error).partition("\n")[0]
        if wrong:
            self.given_up = True
            logger.warning("acting goes on without a CUDA graph: %s", wrong)
            return
        self._captured = _Captured(tuple(given[1].shape), inputs, replay)

    def _difference(self, found: ActStep, given: tuple[Obs, Tensor, Tensor]) -> str:
        """Say in what a graph's result differs from the policy's own, apart from chance."""
        expected = self.policy.act(*given)
        for name in ("values", "core_state"):
            one, other = getattr(found, name), getattr(expected, name)
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True):
                return f"its {name} differ from those of the policy"
        return ""


def _like(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _like(each) for key, each in given.items()}
    if isinstance(given, tuple):
        return tuple(_like(each) for each in given)
    return torch.empty_like(given)


def _copy(into: Any, given: Any) -> None:
    if isinstance(into, dict):
        for key, each in into.items():
            each.copy_(given[key])
    elif isinstance(into, tuple):
        for each, source in zip(into, given, strict=True):
            _copy(each, source)
    else:
        into.copy_(given)
