"""A batch through a network in parts that fit the processor's cache, one thread per part.

Torch divides every operation among its threads, which then synchronise a hundred times in a pass. Here they synchronise
once, at its end; docs/results has the speed-up, most of which is gained beside another busy process.
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

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Own(local):
    """The workers of each calling thread: actors do not wait for a learner's parts."""

    workers: ThreadPoolExecutor | None = None
    n_workers = 0


_own = _Own()
if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=lambda: setattr(_own, "n_workers", 0))


def parallel_batch(network: Callable[[Tensor], Tensor], parts: Sequence[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Return the concatenated outputs of a network for the parts `[N_i, ...]` of a batch; it depends on `weights`.

    If torch has several threads and there are at least as many parts, each part is computed by one thread. Gradients
    are summed in the order of the parts: their bits do not depend on the number of threads. Such an output supports one
    backward pass, without second derivatives.
    """
    threads, learned = torch.get_num_threads(), [weight for weight in weights if weight.requires_grad]
    if threads == 1 or len(parts) < threads or not _can_run_in_threads(parts, learned):
        return torch.cat([network(part) for part in parts])
    if learned and torch.is_grad_enabled():
        joined: Tensor = _ParallelBatch.apply(network, parts, *learned)
        return joined
    return torch.cat(_map_in_threads(lambda part: _outputs(network, part, False), parts))


def _can_run_in_threads(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether other threads compute the same: autocast is per thread, hooks would run once per part."""
    return (
        all(has_memory(part) and not part.requires_grad for part in parts)
        and not torch.is_autocast_enabled("cpu")
        and not any(weight._backward_hooks for weight in weights)
    )


class _ParallelBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: Callable[[Tensor], Tensor], parts: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.outputs = _map_in_threads(lambda part: _outputs(network, part, True), parts)
        return torch.cat([output.detach() for output in ctx.outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weights = ctx.outputs, ctx.weights
        if outputs is None:
            raise RuntimeError("parallel_batch supports one backward pass per output; compute it again")
        ctx.outputs = None  # their graphs are large
        grads = grad.split([len(output) for output in outputs])

        def part_gradients(number: int) -> tuple[Tensor | None, ...]:
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs[number], weights, grads[number], allow_unused=True
            )
            return gradients

        return None, None, *_sums(_map_in_threads(part_gradients, range(len(outputs))))


def _outputs(network: Callable[[Tensor], Tensor], part: Tensor, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad):  # a thread does not inherit the grad mode
        return network(part)


def _sums(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Add up rows in order; weights that the network does not depend on are None in all of them."""
    first, second, *others = ([grad for grad in row if grad is not None] for row in rows)
    sums = torch._foreach_add(first, second)  # not in place: two weights may share a gradient
    for row in others:
        torch._foreach_add_(sums, row)
    left = iter(sums)
    return [None if grad is None else next(left) for grad in rows[0]]


def _map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map `work` over items on as many threads as torch has; return the results in order."""
    n = torch.get_num_threads()
    if _own.workers is None or _own.n_workers != n:
        _own.workers, _own.n_workers = _start_workers(n), n
    return list(_own.workers.map(work, items))


def _start_workers(n: int) -> ThreadPoolExecutor:
    """Start n threads, each with one torch thread."""
    barrier = Barrier(n)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes this thread's number, which torch sets at its first use
        barrier.wait()

    workers = ThreadPoolExecutor(n, "srwm-part", initializer=begin)
    try:
        for _ in workers.map(lambda _: None, range(n)):
            pass
    except BaseException:  # no more threads, or a signal: a thread left waiting would keep the process alive
        barrier.abort()
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(n)  # of this thread and of threads started later
    return workers
