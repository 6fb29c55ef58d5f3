"""`torchrun --nproc-per-node 2 -m tests.simulated_cuda.run train ...`: the command line on simulated CUDA.

`-m MODULE ARGUMENT...` runs a module. Gloo replaces NCCL, through the host. The exit code is an error if a hazard was
found, or if a graph was captured while another thread was in a collective operation: a capture waits for the device,
hence for the other processes, and these might wait for the thread that captures.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

from tests.simulated_cuda.plugin import GPU

import torch  # isort: skip  (the plugin loads it)
import torch.distributed as dist  # isort: skip
from srwm_rl.scripts.main import main  # isort: skip

in_operation: list[Any] = []  # tensors of the device with which an operation is under way
errors: set[str] = set()


class CompletedWork:
    """What an asynchronous operation returns, once it is done."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def through_the_host(operation: Callable[..., Any]) -> Callable[..., Any]:
    def on_host(tensor: Any, *arguments: Any, async_op: bool = False, **settings: Any) -> CompletedWork:
        on_device = [tensor] if tensor.is_cuda else []
        in_operation.extend(on_device)
        copy = tensor.cpu()
        operation(copy, *arguments, **settings)
        tensor.copy_(copy)
        del in_operation[: len(on_device)]
        return CompletedWork()

    return on_host


def by_gloo(begin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda backend, **settings: begin("gloo", **settings)


def noting_operations(graph: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*arguments: Any, **settings: Any) -> Any:
        if in_operation:
            errors.add("a graph was captured while another thread was in a collective operation")
        return graph(*arguments, **settings)

    return noting


def run_module(arguments: list[str]) -> int:
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    patched: Any = dist
    patched.init_process_group = by_gloo(dist.init_process_group)
    patched.all_reduce, patched.broadcast = through_the_host(dist.all_reduce), through_the_host(dist.broadcast)
    patched_cuda: Any = torch.cuda
    patched_cuda.graph = noting_operations(torch.cuda.graph)
    code = run_module(sys.argv[2:]) if sys.argv[1] == "-m" else main(sys.argv[1:])
    for error in sorted({*GPU.take_hazards(), *errors}):
        print(f"hazard: {error}", file=sys.stderr)
        code = code or 1
    sys.exit(code)
