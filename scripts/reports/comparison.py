"""What a page on a comparison shows beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from srwm_rl.agents.evaluation.comparison import Profiles
from srwm_rl.scripts.evaluation.paired import ComparedRuns
from srwm_rl.scripts.reports.charts import Pictures
from srwm_rl.scripts.reports.sections import FREE
from srwm_rl.scripts.reports.tables import LevelMap, difference_maps


@dataclass(frozen=True)
class ComparisonPictures:
    """The pictures of a comparison; a chart is None where there is nothing to draw."""

    improvement: Markup | None
    profiles: Markup | None
    maps: list[LevelMap]


def pictures(report: dict[str, Any]) -> ComparisonPictures:
    """Draw a comparison."""
    draw = Pictures()
    rows = report["rows"]
    names = [row["game"] for row in rows]
    chances = [(row["improvement"]["mean"], row["improvement"]["low"], row["improvement"]["high"]) for row in rows]
    improvement = draw.intervals(names, chances, "probability that A does better on a level", 0.5)
    seeds = report["seeds"]
    profiles = None
    if seeds is not None:
        both = [(f"{side}: {report[side]['core']}", _profile(seeds, side)) for side in "AB"]
        profiles = draw.profiles(both, f"{seeds['unit']} on held-out levels")
    return ComparisonPictures(improvement if len(rows) > 1 else None, profiles, _maps(report["returns"]))


def _profile(seeds: dict[str, Any], side: str) -> Profiles:
    parts = {name: np.array(values) for name, values in seeds[side]["profile"].items()}
    return Profiles(np.array(seeds["thresholds"]), **parts)


def _maps(returns: list[list[Any]]) -> list[LevelMap]:
    by_game: dict[str, tuple[list[int], list[float]]] = {}
    for game, level, a, b in returns:
        levels, differences = by_game.setdefault(game, ([], []))
        levels.append(level)
        differences.append(a - b)
    return difference_maps({game: (levels, np.array(of)) for game, (levels, of) in by_game.items()})


def setting_differences(first: ComparedRuns, second: ComparedRuns) -> list[tuple[str, Any, Any]]:
    """Return the settings in which A's runs are not B's: name, A's value, B's value."""
    a, b = first.trained[0].to_json(), second.trained[0].to_json()
    return [(name, a[name], b[name]) for name in a if name not in FREE and a[name] != b[name]]
