"""Data-parallel training: the processes that `torchrun` started, and their collective operations.

Every process has its own environments; gradients, statistics and checkpoints go through a `ProcessGroup`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor

from srwm_rl.errors import FaultError, UserError
from srwm_rl.storage.safe_file import pack, unpack

TIMEOUT = timedelta(minutes=30)  # long enough for an evaluation or a video that process 0 makes meanwhile
MAX_POLL_SECONDS = 1e-3


class LostProcessError(FaultError):
    """Another process of the run has ended or cannot be reached."""


class RankInfo(NamedTuple):
    """The rank of a process and the number of processes, in the run and on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Read torchrun's environment variables; without WORLD_SIZE, or with 1, it is a single process.

        Raises:
            UserError: they are missing or contradict each other, as when another program set some of them.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        texts = {name: environment.get(name, "") for name in names}
        try:
            info = cls(*(int(texts[name]) for name in names[:4]))
        except ValueError:
            info = cls(-1)
        in_range = 0 <= info.rank < info.size and 0 <= info.local_rank < info.local_size <= info.size
        if not (in_range and texts["MASTER_ADDR"] and texts["MASTER_PORT"]):
            values = " ".join(f"{name}={text}" for name, text in texts.items())
            raise UserError(
                f"several processes are started with torchrun, which did not set {values}; unset WORLD_SIZE"
            )
        return info


class ProcessGroup:
    """The processes that train together; a single one, the default, does not communicate.

    There are two `torch.distributed` groups, because a learner's thread and the main thread may each be in an
    operation at the same time: NCCL (on GPUs, else Gloo) for gradients and what else the learner sums, Gloo for the
    main thread's trees (states, episodes, evaluations).

    Args:
        info: this process's rank.
        device: of its network.

    Attributes:
        rank: of this process; process 0 writes the run's files and its log.
        size: number of processes.

    Raises:
        UserError: the other processes could not be reached.
    """

    def __init__(self, info: RankInfo, device: torch.device | str) -> None:
        self.rank, self.size = info.rank, info.size
        self._abandoned = Event()
        if self.size == 1:
            return
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            self._tree_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {info.rank} of {info.size} could not reach the others at {os.environ['MASTER_ADDR']}: {error}"
            ) from error

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of any shapes by their sums over all processes, in one message."""
        self._flattened(tensors, lambda flat: dist.all_reduce(flat, async_op=True))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of process 0."""
        self._flattened(tensors, lambda flat: dist.broadcast(flat, 0, async_op=True))

    def _flattened(self, tensors: Sequence[Tensor], start: Callable[[Tensor], Any]) -> None:
        """Run an operation in place on the concatenation of tensors."""
        if self.size == 1:
            return
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._run(lambda: start(flat))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def means_and_stds(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        """Return mean and standard deviation (n - 1) of each batch over all processes; None for a batch of one number.

        In one message every process sends the number of its values, their mean and the sum of their squared distances
        from it, in float64, so that no large numbers are subtracted (Chan, Golub and LeVeque, 1983,
        https://doi.org/10.1080/00031305.1983.10483115).
        """
        if self.size == 1:
            return [torch.std_mean(batch)[::-1] if batch.numel() > 1 else None for batch in batches]
        own = []
        for batch in batches:
            values = batch.detach().double()
            mean = values.mean()
            own.append(torch.stack((values.new_tensor(values.numel()), mean, (values - mean).square().sum())))
        stats = torch.zeros(self.size, len(batches), 3, dtype=torch.float64, device=own[0].device)
        stats[self.rank] = torch.stack(own)
        self.sum_([stats])
        counts, means, squares = stats.unbind(-1)  # [processes, batches]
        n = counts.sum(0)
        mean = (counts * means).sum(0) / n
        std = ((squares + counts * (means - mean).square()).sum(0) / (n - 1)).sqrt()
        return [(mean[i].to(batch.dtype), std[i].to(batch.dtype)) for i, batch in enumerate(batches)]

    def gather(self, tree: Any) -> list[Any]:
        """Return every process's tree (see `safe_file.pack`) by rank to process 0, and to others their own."""
        return self._exchange(tree, to_all=False)

    def all_gather(self, tree: Any) -> list[Any]:
        """Return every process's tree by rank, to all of them."""
        return self._exchange(tree, to_all=True)

    def _exchange(self, tree: Any, to_all: bool) -> list[Any]:
        if self.size == 1:
            return [tree]
        data, group = to_bytes(tree), self._tree_group
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self._run(lambda: dist.all_reduce(sizes, group=group, async_op=True))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)] if to_all or self.first else None
        if to_all:
            self._run(lambda: dist.all_gather(parts, padded, group=group, async_op=True))
        else:
            self._run(lambda: dist.gather(padded, parts, dst=0, group=group, async_op=True))
        if parts is None:
            return [tree]
        return [
            tree if rank == self.rank else from_bytes(part.numpy()[:n].tobytes())
            for rank, (part, n) in enumerate(zip(parts, sizes.tolist(), strict=True))
        ]

    def _run(self, start: Callable[[], Any]) -> None:
        """Start an asynchronous operation and wait for it; unlike `Work.wait`, signals and `abandon` end the wait.

        Raises:
            LostProcessError: another process has ended, or `abandon` was called.
        """
        work, seconds = None, 0.0
        try:
            while work is None or not work.is_completed():
                if self._abandoned.wait(seconds):
                    raise LostProcessError("this process has left the others")
                work = start() if work is None else work
                seconds = min(2 * seconds + 1e-5, MAX_POLL_SECONDS)
            work.wait()
        except LostProcessError:
            raise
        except RuntimeError as error:
            raise LostProcessError("another process of this run has ended or cannot be reached") from error

    def abandon(self) -> None:
        """Raise `LostProcessError` in every thread that waits for other processes: this one is about to end."""
        self._abandoned.set()

    def close(self) -> None:
        """Leave the group once all processes have finished their operations."""
        if self.size == 1:
            return
        self._run(lambda: dist.barrier(group=self._tree_group, async_op=True))
        # Without a reference to it, the group joins its threads: one that still releases a tensor while the interpreter
        # is being finalized aborts the process.
        del self._tree_group
        dist.destroy_process_group()


def to_bytes(tree: Any) -> bytearray:
    """Return a tree as safetensors, its JSON text among the arrays: numbers and text only, nothing executable."""
    arrays, json_tree = pack(tree)
    arrays["json"] = np.frombuffer(json.dumps(json_tree).encode(), np.uint8)
    return bytearray(save_safetensors({name: np.require(array, requirements="C") for name, array in arrays.items()}))


def from_bytes(data: bytes) -> Any:
    """Undo `to_bytes`; tuples come back as lists."""
    arrays = load_safetensors(data)
    return unpack(arrays, json.loads(arrays.pop("json").tobytes()))


SINGLE = ProcessGroup(RankInfo(), "cpu")


def init_processes(info: RankInfo, device: torch.device | str) -> ProcessGroup:
    """Return the group of processes that torchrun started, once all of them are connected.

    Raises:
        UserError: the other processes could not be reached.
    """
    return SINGLE if info.size == 1 else ProcessGroup(info, device)
