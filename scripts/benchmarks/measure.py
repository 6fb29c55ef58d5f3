"""Speeds measured in alternation, so that other load of the machine affects all sides alike."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from srwm_rl.scripts.config.settings import Count, check_bounds

SECONDS = 1.0  # that a trainer or a component of it is timed for in each round, at least
Clock = Callable[[], float]
Rates = dict[str, dict[str, list[float]]]  # by side and part, one for each round


@dataclass(frozen=True)
class BenchOptions:
    """Options of every benchmark."""

    rounds: Count = 5
    """Measurements of each side, in alternation; medians and ranges are printed."""
    threads: Count | None = None
    """Threads of torch; None: one per core, or one to train a policy without a CNN."""
    json: str | None = None
    """Write the results to this file too."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Rate:
    """A speed or a ratio over the rounds."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return the median and the range, each formatted by `spec`."""
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def alternate(sides: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> Rates:
    """Call all `sides`, which return the speeds of their parts, in alternation; a first round is not counted."""
    rates: Rates = {name: defaultdict(list) for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            for part, rate in run().items():
                if number:
                    rates[name][part].append(rate)
    return rates


def speeds(
    parts: Mapping[str, Callable[[], Any]], n: int, clock: Clock = time.perf_counter, seconds: float = 0.0
) -> dict[str, float]:
    """Run the parts in turn, once and until `seconds` have passed; return what each processes per second.

    A run of a part processes `n` steps or frames.
    """
    spent, runs = dict.fromkeys(parts, 0.0), 0
    while not runs or sum(spent.values()) < seconds:
        for name, run in parts.items():
            start = clock()
            run()
            spent[name] += clock() - start
        runs += 1
    return {name: runs * n / time_spent for name, time_spent in spent.items()}


def summary(rates: list[float]) -> Rate:
    """Return the median and the range of rates."""
    return Rate(statistics.median(rates), min(rates), max(rates))


def ratio(mine: list[float], theirs: list[float]) -> Rate:
    """Return the median and the range of the ratios of corresponding rounds."""
    return summary([a / b for a, b in zip(mine, theirs, strict=True)])


def device_clock(device: torch.device) -> Clock:
    """Return a clock, in seconds, that waits for the device first."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
