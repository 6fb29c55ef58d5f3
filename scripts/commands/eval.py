"""`srwm-rl eval`: every training and every held-out level, exactly k times each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from srwm_rl.scripts.cli import check_writable, parse, write_json
from srwm_rl.scripts.evaluation.few_shot_tables import AccuracyRow
from srwm_rl.scripts.evaluation.protocol import PAPER, EvalConfig, with_own_draws
from srwm_rl.scripts.evaluation.table import render_evaluation, render_few_shot
from srwm_rl.storage.run_group import expand_groups


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = read(argv)
    if config.protocol == "paper":
        config = replace(config, protocol=None, **PAPER)
    check_writable(config.json, "--json")
    check_writable(config.chart, "--chart")
    from srwm_rl.scripts.evaluation.runner import evaluate

    runs = expand_groups([config.run])
    if runs == (config.run,):
        report = evaluate(config)
        print(render_evaluation(report))
        write_json(config.json, report)
        _draw(config, report.get("few_shot", []))
        return 0
    from srwm_rl.scripts.evaluation.few_shot import over_runs
    from srwm_rl.scripts.evaluation.over_seeds import over_seeds, render_over_seeds

    reports = []
    for of_run in with_own_draws(replace(config, run=run) for run in runs):
        reports.append(evaluate(of_run))
        print(f"{of_run.run}: {render_evaluation(reports[-1])}\n")
    means = over_seeds(reports)
    few_shot = over_runs([report["few_shot"] for report in reports]) if "few_shot" in reports[0] else []
    print("\n".join([render_over_seeds(means), "", *render_few_shot(few_shot, f"{len(reports)} runs (t)")]).rstrip())
    together = {"over_seeds": means, **({"few_shot": few_shot} if few_shot else {})}
    write_json(config.json, {"group": config.run, **together, "runs": reports})
    _draw(config, few_shot, f"{len(reports)} training seeds")
    return 0


def _draw(config: EvalConfig, rows: Sequence[AccuracyRow], over: str | None = None) -> None:
    """Draw the chart of a few-shot evaluation, if it is wanted."""
    if config.chart is not None:
        from srwm_rl.scripts.reports.few_shot_charts import write_chart

        write_chart(Path(config.chart), rows, over)


def read(argv: list[str]) -> EvalConfig:
    """Parse the command line; tyro has no option whose value may be left out, such as that of --freeze-edits."""
    option = r"(^|\0)--freeze[-_]edits(?:[=\0](?:after=)?(\d+))?(?=\0|$)"
    words = re.sub(option, r"\1--freeze-edits=0\2", "\0".join(argv))  # 0, or a number with one more leading 0
    return parse(EvalConfig, words.split("\0") if argv else [], "srwm-rl eval")
