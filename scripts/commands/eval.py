"""`srwm-rl eval`: every training and every held-out level, exactly k times each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.scripts.evaluation.protocol import PAPER, EvalConfig
from srwm_rl.scripts.evaluation.table import render_evaluation

PROG = "srwm-rl eval"


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(EvalConfig, argv, PROG)
    if config.protocol == "paper":
        config = replace(config, protocol=None, **PAPER)
    if config.json is not None:
        check_writable(Path(config.json), "--json")
    from srwm_rl.scripts.evaluation.runner import evaluate

    report = evaluate(config)
    print(render_evaluation(report))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0
