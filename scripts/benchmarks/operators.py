"""`srwm-rl bench op`: the recurrence by backend and size, and the lower bound of its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from srwm_rl.errors import UserError
from srwm_rl.ops import bench, cpu
from srwm_rl.scripts.benchmarks.options import BenchOptions


@dataclass(frozen=True)
class OperatorBench(BenchOptions):
    """Time the recurrence: `srwm-rl bench op`."""

    rounds: int = 7
    """Measurements of each time; the median is printed."""
    threads: int | None = 1
    """Threads of torch."""
    device: str = "cpu"
    """cpu or cuda."""


def run(config: OperatorBench) -> dict[str, Any]:
    """Print the table and return it; a backend with wrong results is not timed.

    Raises:
        UserError: no such device.
    """
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    clock = "CPU time" if (config.device, config.threads) == ("cpu", 1) else "wall time"
    print(f"torch {torch.__version__}, {config.device}, {torch.get_num_threads()} thread(s)")
    print(f"ns per head and step, medians, {clock}")
    print(
        f"{'work':<17} {'T,B,H,D':<14} {'backend':<10} {'ns':>9} {'bound':>7} {'x ref':>7} {'x loop':>7} {'error':>8}"
    )
    rows = []
    for group in bench.measure(_backends(config.device), config.device, config.rounds):
        rows += group
        for row in group:
            print(_line(row), flush=True)
    print(
        "loop: the recurrence step by step, as the authors wrote it; bound: its multiply-adds, as fast as torch.matmul"
    )
    wrong = any(row.ns is None for row in rows)
    return {"bench": "op", "threads": config.threads, "rows": [row._asdict() for row in rows], "wrong": wrong}


def _backends(device: str) -> tuple[str, ...]:
    if device == "cuda":
        return ("triton",)
    reason = cpu.why_not(device, torch.float32, 16)
    if reason:
        print(f"no cpu backend: {reason}")
    return () if reason else ("cpu",)


def _line(row: bench.Row) -> str:
    size = ",".join(map(str, row.size))
    head = f"{row.work:<17} {size:<14} {row.backend:<10}"
    if row.ns is None:
        return f"{head} wrong results (relative error {row.error:.1e}): not timed"
    ratios = f"{row.vs_reference:>7.1f} {row.vs_loop:>7.1f}"
    return f"{head} {row.ns:>9.1f} {row.bound_ns:>7.1f} {ratios} {row.error:>8.0e}"
