"""Ratios measured in alternation, so that whatever else the machine does falls on both sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

# For which a trainer, or a part of its work, is timed in a round: shorter, and what it meets by chance decides.
SECONDS = 1.0


class Rate(NamedTuple):
    """Things per second, over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show the median and the range."""
        return f"{self.median:,.0f} [{self.low:,.0f}, {self.high:,.0f}]"


def alternate(sides: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Run every side once per round, in turn, and return its rates.

    Args:
        sides: by name, does some work and returns how many things it did.
        rounds: how often; one more, not counted, goes first.

    Returns:
        By name, things per second of wall time, one number per round.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            done = work()
            rate = done / (time.perf_counter() - start)
            if number:
                rates[name].append(rate)
    return rates


def summary(rates: list[float]) -> Rate:
    """Return the median and the range of rates."""
    return Rate(statistics.median(rates), min(rates), max(rates))


def ratio(mine: list[float], theirs: list[float]) -> Rate:
    """Return the median and the range of the ratios of rounds that ran side by side."""
    return summary([a / b for a, b in zip(mine, theirs, strict=True)])


def show_ratio(value: Rate) -> str:
    """Show a ratio with its range."""
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


def long_enough(seconds: float) -> bool:
    """Return whether a round of a trainer, or of a part of its work, may end."""
    return seconds >= SECONDS


def device_clock(device: torch.device) -> Callable[[], float]:
    """Return what tells the time in seconds once a device has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def done() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return done
