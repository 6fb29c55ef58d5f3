"""A batch through a network in parts that stay in the processor's cache, each of them the work of one thread.

Torch would share every single operation among its threads, and all of them wait for the last one a hundred times in a
pass. Here they meet at its end: docs/results tells what that gave, most of it where another process wants a core too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.checks import has_memory

Given = TypeVar("Given")
Result = TypeVar("Result")


class _Own(local):
    """What each thread that calls has of its own: actors do not wait for a learner's parts."""

    workers: ThreadPoolExecutor | None = None
    n_workers = 0


_own = _Own()
if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=lambda: setattr(_own, "n_workers", 0))


def parallel_batch(network: Callable[[Tensor], Tensor], parts: Sequence[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Return what a network gives for the parts of a batch, joined.

    Where torch has several threads, and there are as many parts, each part is computed by one of them, and gradients
    are summed in the parts' order: how many threads there are then does not matter to the last bit. Such a result can
    go back once, to first derivatives.

    Args:
        network: maps `[N, ...]` to `[N, n]`; called from several threads at once.
        parts: of the batch, `[N_i, ...]`.
        weights: that the network depends on.
    """
    threads, learned = torch.get_num_threads(), [weight for weight in weights if weight.requires_grad]
    if threads == 1 or len(parts) < threads or not _may_be_shared(parts, learned):
        return torch.cat([network(part) for part in parts])
    if learned and torch.is_grad_enabled():
        joined: Tensor = _ParallelBatch.apply(network, parts, *learned)
        return joined
    return torch.cat(_shared(lambda part: _outputs(network, part, False), parts))


def _may_be_shared(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Say whether threads would do what this one does, which has modes of its own, and each weight's hooks act once."""
    return (
        all(has_memory(part) and not part.requires_grad for part in parts)
        and not torch.is_autocast_enabled("cpu")
        and not any(weight._backward_hooks for weight in weights)
    )


class _ParallelBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: Callable[[Tensor], Tensor], parts: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.outputs = _shared(lambda part: _outputs(network, part, True), parts)
        return torch.cat([each.detach() for each in ctx.outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weights = ctx.outputs, ctx.weights
        if outputs is None:
            raise RuntimeError("a network's output in parts goes back once; compute it again")
        ctx.outputs = None  # what they keep is large
        grads = grad.split([len(each) for each in outputs])

        def back(number: int) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs[number], weights, grads[number], allow_unused=True
            )
            return found

        return None, None, *_sums(_shared(back, range(len(outputs))))


def _outputs(network: Callable[[Tensor], Tensor], part: Tensor, to_learn: bool) -> Tensor:
    with torch.set_grad_enabled(to_learn):  # which a thread does not take over from another
        return network(part)


def _sums(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Add up rows in their order; what the network does not depend on is None in all of them."""
    first, second, *others = ([each for each in row if each is not None] for row in rows)
    sums = torch._foreach_add(first, second)  # not in place: two weights may share a gradient
    for row in others:
        torch._foreach_add_(sums, row)
    left = iter(sums)
    return [None if each is None else next(left) for each in rows[0]]


def _shared(work: Callable[[Given], Result], given: Iterable[Given]) -> list[Result]:
    """Do the work for all that is given, as many at a time as torch has threads; return the results in order."""
    n = torch.get_num_threads()
    if _own.workers is None or _own.n_workers != n:
        _own.workers, _own.n_workers = _started(n), n
    return list(_own.workers.map(work, given))


def _started(n: int) -> ThreadPoolExecutor:
    """Return n threads for each of which torch has one thread."""
    all_there = Barrier(n)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes over the number that is set at its first use; that is now
        all_there.wait()

    workers = ThreadPoolExecutor(n, "srwm-part", initializer=begin)
    try:
        for _ in workers.map(lambda _: None, range(n)):
            pass
    except BaseException:  # no more threads to be had, or a signal: none may be left waiting, or the process never ends
        all_there.abort()
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(n)  # of this thread, and of those that begin from now on
    return workers
