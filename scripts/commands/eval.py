"""`srwm-rl eval`: every training and every held-out level, exactly k times each."""

from __future__ import annotations

import re
from dataclasses import replace

from srwm_rl.scripts.cli import check_writable, parse, write_json
from srwm_rl.scripts.evaluation.protocol import PAPER, EvalConfig
from srwm_rl.scripts.evaluation.table import render_evaluation
from srwm_rl.storage.run_group import expand_groups


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = read(argv)
    if config.protocol == "paper":
        config = replace(config, protocol=None, **PAPER)
    check_writable(config.json, "--json")
    from srwm_rl.scripts.evaluation.runner import evaluate

    runs = expand_groups([config.run])
    if runs == (config.run,):
        report = evaluate(config)
        print(render_evaluation(report))
        write_json(config.json, report)
        return 0
    from srwm_rl.scripts.seeds.summary import over_seeds, render_over_seeds

    reports = []
    for run in runs:
        reports.append(evaluate(replace(config, run=run)))
        print(f"{run}: {render_evaluation(reports[-1])}\n")
    means = over_seeds(reports)
    print(render_over_seeds(means))
    write_json(config.json, {"group": config.run, "over_seeds": means, "runs": reports})
    return 0


def read(argv: list[str]) -> EvalConfig:
    """Parse the command line; tyro has no option whose value may be left out, such as that of --freeze-edits."""
    option = r"(^|\0)--freeze[-_]edits(?:[=\0](?:after=)?(\d+))?(?=\0|$)"
    words = re.sub(option, r"\1--freeze-edits=0\2", "\0".join(argv))  # 0, or a number with one more leading 0
    return parse(EvalConfig, words.split("\0") if argv else [], "srwm-rl eval")
