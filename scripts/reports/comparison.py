"""The charts and maps of a comparison's page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from srwm_rl.agents.evaluation.comparison import Profiles
from srwm_rl.scripts.evaluation.paired import ComparedRuns
from srwm_rl.scripts.evaluation.table import warnings_of
from srwm_rl.scripts.reports.charts import Charts, estimate
from srwm_rl.scripts.reports.render import render_page
from srwm_rl.scripts.reports.sections import FREE
from srwm_rl.scripts.reports.tables import difference_maps


def comparison_page(sides: Sequence[ComparedRuns], report: dict[str, Any], command: str) -> str:
    """Return a comparison of A and B as a page; `report` is from `paired.compare`."""
    charts, rows, seeds = Charts(), report["rows"], report["seeds"]
    improvement = profiles = None
    if len(rows) > 1:
        estimates = [estimate(row["improvement"]) for row in rows]
        label = "probability that A does better on a level"
        improvement = charts.intervals([row["game"] for row in rows], estimates, label, 0.5)
    if seeds is not None:
        named = [(f"{side}: {report[side]['core']}", _profile(seeds, side)) for side in "AB"]
        profiles = charts.profiles(named, f"{seeds['unit']} on held-out levels")
    differences: dict[str, dict[int, float]] = {}
    for game, level, a, b in report["returns"]:
        differences.setdefault(game, {})[level] = a - b
    return render_page(
        "compare.html",
        title=f"{sides[0].title} against {sides[1].title}",
        subtitle=f"on {report['env']}",
        written=time.strftime("%Y-%m-%d", time.gmtime()),
        report=report,
        command=command,
        improvement=improvement,
        profiles=profiles,
        maps=difference_maps(differences),
        differences=_setting_differences(*sides),
        warnings=warnings_of(report),
    )


def _profile(seeds: dict[str, Any], side: str) -> Profiles:
    arrays = {name: np.array(values) for name, values in seeds[side]["profile"].items()}
    return Profiles(np.array(seeds["thresholds"]), **arrays)


def _setting_differences(first: ComparedRuns, second: ComparedRuns) -> list[tuple[str, Any, Any]]:
    """Return the settings that differ between A's and B's runs: name, A's value, B's value."""
    a, b = first.trained[0].to_json(), second.trained[0].to_json()
    return [(name, a[name], b[name]) for name in a if name not in FREE and a[name] != b[name]]
