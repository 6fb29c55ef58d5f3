"""`torchrun --nproc-per-node 2 -m tests.simulated_cuda.run train ...`: the command line on simulated CUDA.

Gloo replaces NCCL, through the host. The exit code is an error if a hazard was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.simulated_cuda.plugin import GPU

import torch.distributed as dist  # isort: skip  (the plugin loads torch)
from srwm_rl.scripts.main import main  # isort: skip


class CompletedWork:
    """What an asynchronous operation returns, once it is done."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def through_the_host(operation: Callable[..., Any]) -> Callable[..., Any]:
    def on_host(tensor: Any, *arguments: Any, async_op: bool = False, **settings: Any) -> CompletedWork:
        copy = tensor.cpu()
        operation(copy, *arguments, **settings)
        tensor.copy_(copy)
        return CompletedWork()

    return on_host


def by_gloo(begin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda backend, **settings: begin("gloo", **settings)


if __name__ == "__main__":
    patched: Any = dist
    patched.init_process_group = by_gloo(dist.init_process_group)
    patched.all_reduce, patched.broadcast = through_the_host(dist.all_reduce), through_the_host(dist.broadcast)
    code = main(sys.argv[1:])
    for hazard in sorted(set(GPU.take_hazards())):
        print(f"hazard: {hazard}", file=sys.stderr)
        code = code or 1
    sys.exit(code)
