"""How many processors this process may use."""

from __future__ import annotations

import os
from collections.abc import Mapping


def usable_processors() -> int:
    """Return the number of processors that this process may run on: its CPU affinity, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_processors(environment: Mapping[str, str] = os.environ) -> int:
    """Return a process's share, at least 1, of `usable_processors` among those that torchrun started on this machine.

    torchrun gives their number in LOCAL_WORLD_SIZE (https://docs.pytorch.org/docs/stable/elastic/run.html).
    """
    local = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, usable_processors() // max(1, int(local) if local.isdecimal() else 1))
