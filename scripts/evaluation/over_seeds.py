"""Evaluations of runs that differ in their seed: means over the runs with t-intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from srwm_rl.agents.evaluation.statistics import t_interval
from srwm_rl.scripts.evaluation.table import aligned, text


def over_seeds(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each split and game that all evaluations have, the mean return over runs with its 95% t-interval."""
    means: dict[tuple[str, str], list[float]] = {}
    for report in reports:
        parts = [report, *report.get("baselines", ()), *report.get("interventions", ())]
        for row in (row for part in parts for row in part["rows"]):
            means.setdefault((row["split"], row["game"]), []).append(row["return"]["mean"])
    return [
        {"split": split, "game": game, "runs": len(values), "return": t_interval(np.array(values)).to_json()}
        for (split, game), values in means.items()
        if len(values) == len(reports)
    ]


def render_over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over seeds as text."""
    table = [["over seeds", "game", "runs", "mean return [95% t-interval]"]]
    table += [[row["split"], row["game"], str(row["runs"]), text(row["return"])] for row in rows]
    return "\n".join(aligned(table))
