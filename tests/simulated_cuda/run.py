"""`torchrun --nproc-per-node 2 -m tests.simulated_cuda.run train ...`: the command line where there are pretended GPUs.

What NCCL would send between them goes through the host, by Gloo. It ends with an error where a hazard was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.simulated_cuda.plugin import GPU

import torch.distributed as dist  # isort: skip  (the plugin loads torch)
from srwm_rl.scripts.main import main  # isort: skip


def through_the_host(operation: Callable[..., Any]) -> Callable[..., Any]:
    def done(tensor: Any, *arguments: Any, **settings: Any) -> None:
        there = tensor.cpu()
        operation(there, *arguments, **settings)
        tensor.copy_(there)

    return done


def by_gloo(begin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda backend, **settings: begin("gloo", **settings)


if __name__ == "__main__":
    changed: Any = dist
    changed.init_process_group = by_gloo(dist.init_process_group)
    changed.all_reduce, changed.broadcast = through_the_host(dist.all_reduce), through_the_host(dist.broadcast)
    code = main(sys.argv[1:])
    for hazard in sorted(set(GPU.take_hazards())):
        print(f"hazard: {hazard}", file=sys.stderr)
        code = code or 1
    sys.exit(code)
