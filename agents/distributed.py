"""Several processes that train one policy: who there is, and the few things that all of them do together.

`torchrun` starts the processes and tells each its number by environment variables. Every process plays its own
environments; what they share goes through a `ProcessGroup` object. The base class is one process alone, for which every
operation is there and does nothing; `TorchProcessGroup` carries them out with `torch.distributed`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as make_safetensors
from torch import Tensor

from srwm_rl.errors import FaultError, UserError
from srwm_rl.storage.safe_file import pack, unpack

# How long one process waits for the others: an evaluation or a film of one of them must fit in.
PATIENCE = timedelta(minutes=30)


class LostProcessError(FaultError):
    """Another process of the run has ended, or cannot be reached."""


class RankInfo(NamedTuple):
    """Where a process stands among those that torchrun started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its machine
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Read torchrun's variables; without WORLD_SIZE, or with one process, it is a process alone.

        Raises:
            UserError: they contradict each other, as when something else set one of them.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        texts = {name: environment.get(name, "") for name in names}
        try:
            place = cls(*(int(texts[name]) for name in names[:4]))
        except ValueError:
            place = cls(-1)
        whole = 0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size <= place.size
        if not whole or not texts["MASTER_ADDR"] or not texts["MASTER_PORT"]:
            said = " ".join(f"{name}={text}" for name, text in texts.items())
            raise UserError(f"several processes are started with torchrun, which did not set {said}; unset WORLD_SIZE")
        return place


class ProcessGroup:
    """One process alone: it has nobody to wait for, and every operation costs nothing.

    Attributes:
        rank: this process's number; process 0 keeps the run's files and speaks for all.
        size: how many there are.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Say whether this is process 0."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of any shapes by their sums over all processes, in one message."""

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of process 0."""

    def means_and_stds(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch its values' mean and standard deviation (n - 1) in all processes, in one message."""
        return [torch.std_mean(each)[::-1] for each in batches]

    def gather(self, tree: Any) -> list[Any]:
        """Return every process's tree (as `srwm_rl.storage.safe_file.pack` takes it) by rank to process 0, to others their own."""
        return [tree]

    def all_gather(self, tree: Any) -> list[Any]:
        """Return every process's tree by rank, to all of them."""
        return [tree]

    def abandon(self) -> None:
        """Wake whoever waits for the other processes, by a `LostProcessError`: this one is about to end."""

    def close(self) -> None:
        """Part from the other processes when all of them have done everything together."""


SINGLE = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """This process among those of torchrun.

    Gradients and whatever else the learner sums go through one group (NCCL on GPUs, else Gloo); states, episodes and
    evaluations, which the main thread sends, through a second one (Gloo): a learner's thread and the main thread may
    be amid an operation each, and the two cannot be mistaken for each other.

    Args:
        place: this process's.
        device: where its network lives.

    Raises:
        UserError: the others could not be met.
    """

    def __init__(self, place: RankInfo, device: torch.device | str) -> None:
        import torch.distributed as dist

        self.rank, self.size = place.rank, place.size
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            table = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = os.environ["MASTER_ADDR"]
            raise UserError(
                f"process {place.rank} of {place.size} could not meet the others at {where}: {error}"
            ) from error
        self._table = table
        self._learning = CommThread("srwm-learning", device)
        self._talking = CommThread("srwm-talking", torch.device("cpu"))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of any shapes by their sums over all processes, in one message."""
        import torch.distributed as dist

        self._in_one(tensors, dist.all_reduce)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of process 0."""
        import torch.distributed as dist

        self._in_one(tensors, lambda flat: dist.broadcast(flat, 0))

    def _in_one(self, tensors: Sequence[Tensor], operation: Callable[[Tensor], Any]) -> None:
        with torch.no_grad():
            flat = torch.cat([each.reshape(-1) for each in tensors])
            self._learning.run(lambda: operation(flat))
            for each, part in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
                each.copy_(part.view_as(each))

    def means_and_stds(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch its values' mean and standard deviation (n - 1) in all processes, in one message.

        Every process says how many values it has, their mean, and their squared distances from it, in float64: no
        difference of large numbers (Chan, Golub and LeVeque, 1983, https://doi.org/10.1080/00031305.1983.10483115).
        """
        own = []
        for each in batches:
            wide = each.detach().double()
            mean = wide.mean()
            own.append(torch.stack((wide.new_full((), wide.numel()), mean, (wide - mean).square().sum())))
        said = torch.zeros(self.size, len(batches), 3, dtype=torch.float64, device=own[0].device)
        said[self.rank] = torch.stack(own)
        self.sum_([said])
        n, means, squares = said.unbind(-1)  # [processes, batches]
        mean = (n * means).sum(0) / n.sum(0)
        total = (squares + n * (means - mean).square()).sum(0)
        std = (total / (n.sum(0) - 1)).sqrt()
        dtypes = [each.dtype for each in batches]
        return [(one.to(dtype), other.to(dtype)) for one, other, dtype in zip(mean, std, dtypes, strict=True)]

    def gather(self, tree: Any) -> list[Any]:
        """Return every process's tree by rank to process 0, to others their own."""
        found = self._exchange(tree, everyone=False)
        return [tree, *found[1:]] if self.first else [tree]

    def all_gather(self, tree: Any) -> list[Any]:
        """Return every process's tree by rank, to all of them."""
        found = self._exchange(tree, everyone=True)
        return [tree if rank == self.rank else each for rank, each in enumerate(found)]

    def _exchange(self, tree: Any, everyone: bool) -> list[Any]:
        """Send a tree and return those of the others, None in this process's own place."""
        import torch.distributed as dist

        own = to_bytes(tree)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self._talking.run(lambda: dist.all_reduce(sizes, group=self._table))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(own, dtype=torch.uint8)
        wanted = everyone or self.first
        parts = [torch.empty_like(padded) for _ in range(self.size)] if wanted else None
        if everyone:
            self._talking.run(lambda: dist.all_gather(parts, padded, group=self._table))
        else:
            self._talking.run(lambda: dist.gather(padded, parts, dst=0, group=self._table))
        return [
            None if rank == self.rank else from_bytes(part.numpy()[:n].tobytes())
            for rank, (part, n) in enumerate(zip(parts or [], sizes.tolist(), strict=wanted))
        ]

    def abandon(self) -> None:
        """Wake whoever waits for the other processes, by a `LostProcessError`: this one is about to end."""
        self._learning.abandon()
        self._talking.abandon()

    def close(self) -> None:
        """Part from the other processes when all of them have done everything together."""
        import torch.distributed as dist

        self._talking.run(lambda: dist.barrier(group=self._table))  # nobody leaves while another still receives
        self._learning.close()
        self._talking.close()
        # Without a reference the group joins its threads: one that still releases a tensor while the interpreter is being
        # finalized aborts the process.
        del self._table
        dist.destroy_process_group()


class CommThread:
    """A thread that carries out one group's operations, in their order.

    A thread that waits inside `torch.distributed` hears no signal and cannot be woken; one that waits for this thread
    can.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device
        self._wanted: SimpleQueue[tuple[Callable[[], Any], Future[None], Any] | None] = SimpleQueue()
        self._lock = Lock()
        self._waiting: Future[None] | None = None
        self._over = False
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, operation: Callable[[], Any]) -> None:
        """Carry out an operation that all processes take part in, and wait for it.

        Raises:
            LostProcessError: another process has ended, or `abandon` was called.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._over:
                raise LostProcessError("this process has parted from the others")
            self._waiting = done
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._wanted.put((operation, done, stream))
        done.result()

    def abandon(self) -> None:
        """Wake whoever waits, and whoever comes later."""
        with self._lock:
            self._over = True
            waiting = self._waiting
        if waiting is not None:
            with suppress(InvalidStateError):  # it was done at this moment
                waiting.set_exception(LostProcessError("this process has parted from the others"))

    def close(self) -> None:
        """End the thread."""
        self._wanted.put(None)
        self._thread.join()

    def _serve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (wanted := self._wanted.get()) is not None:
            operation, done, stream = wanted
            error: BaseException | None = None
            try:
                if stream is None:
                    operation()
                else:
                    with torch.cuda.stream(stream):  # on which the caller has made what is to be sent
                        operation()
                    stream.synchronize()  # NCCL only queues it; to wait for it here keeps the others awake
            except Exception as found:
                error = LostProcessError("another process of this run has ended or cannot be reached")
                error.__cause__ = found
            with suppress(InvalidStateError):  # nobody waits any more
                done.set_result(None) if error is None else done.set_exception(error)


def to_bytes(tree: Any) -> bytearray:
    """Return a tree as bytes that hold numbers and text only: the length of a JSON text, the text, safetensors."""
    arrays, rest = pack(tree)
    text = json.dumps(rest).encode()
    blob = make_safetensors({name: np.require(each, requirements="C") for name, each in arrays.items()})
    return bytearray(len(text).to_bytes(8, "little") + text + blob)


def from_bytes(data: bytes) -> Any:
    """Undo `to_bytes`; tuples come back as lists."""
    start = 8 + int.from_bytes(data[:8], "little")
    return unpack(parse_safetensors(data[start:]), json.loads(data[8:start]))


def joined(place: RankInfo, device: torch.device | str) -> ProcessGroup:
    """Return the processes that torchrun started, once all of them are there; a process alone has met everybody.

    Raises:
        UserError: the others could not be met.
    """
    return SINGLE if place.size == 1 else TorchProcessGroup(place, device)
