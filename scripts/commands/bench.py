"""`srwm-rl bench op|env|encoder|train|suite`: ratios measured in alternation; wrong results are not timed."""

from __future__ import annotations

PROG = "srwm-rl bench"
KINDS = {
    "op": "the recurrence by backend, and the bound of its arithmetic",
    "env": "our ProcGen environments and ProcGen itself",
    "encoder": "the CNN, by layout and precision",
    "train": "a trainer, its upper bound, and sb3-contrib's",
    "suite": "all benchmarks of docs/results",
}


def main(argv: list[str]) -> int:
    """Run a benchmark; return 1 if some results were wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        kinds = "\n".join(f"  {kind:<8} {summary}" for kind, summary in KINDS.items())
        print(f"usage: {PROG} KIND [options]\n\n{kinds}")
        return 0 if argv else 2
    from srwm_rl.scripts.benchmarks.run import run_benchmark

    return run_benchmark(argv, PROG)
