"""Charts of few-shot evaluations: accuracy by examples seen, or by position around the switch of two data sets."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import write_output
from srwm_rl.scripts.evaluation.few_shot_tables import (
    N_BEFORE_END,
    AccuracyInterval,
    AccuracyRow,
    order_name,
    orders,
)
from srwm_rl.scripts.reports.charts import COLOURS, INK, RANDOM, STYLE, Charts

HIDDEN = ("labels alone",)  # nothing to learn from, and it needs an explanation
REFERENCES = {"chance": ":", "nearest pixels": "--", "blurred cosine": "-."}
SIZE = (6.4, 3.8)  # inches, of a file
PAGE_SIZE = (5.2, 2.6)
LINE_HEIGHT = 6.0  # of a line's name, in percent


def write_chart(path: Path, rows: Sequence[AccuracyRow], over: str | None = None) -> None:
    """Draw the held-out classes of the first setting into an SVG or PNG file.

    `over` says what the intervals are over; None: episodes.

    Raises:
        UserError: there is nothing to draw: questions of one kind only.
        OSError: the file cannot be written.
    """
    shown = [row for row in first_setting(rows) if row["split"] != "train"]
    pairs = orders(shown)
    if not shown or (not pairs and len(shown[0]["by_seen"]) < 2):
        raise UserError("--chart needs questions after different numbers of examples: use --env-kwargs shots:1:5")
    with rc_context({**STYLE, "font.size": 10, "axes.titlesize": 11, "svg.fonttype": "path"}):
        n = len({order_name(*pair) for pair in pairs}) or 1
        figure = Figure((SIZE[0], SIZE[1] * n), layout="constrained")
        axes = list(figure.subplots(n, squeeze=False)[:, 0])
        if pairs:
            draw_switch(axes, shown)
        else:
            draw_seen(axes[0], shown)
        what = "classes of test images" if pairs else "classes never trained on"
        setting = f"{shown[0]['ways'].replace(':', ' to ')} {what}, no gradient at run time"
        axes[0].set_title(f"{setting}\n{axes[0].get_title(loc='left')}".rstrip(), loc="left")
        own = [row["episodes"] for row in shown if (row["name"], row["part"]) == (shown[0]["name"], 0)]
        axes[-1].set_xlabel(f"{axes[-1].get_xlabel()}\n95% intervals over {over or f'{sum(own):,} episodes'}")
        metadata: Any = {"Date": None} if path.suffix.lower() == ".svg" else {}
        picture, form = BytesIO(), path.suffix.lower().removeprefix(".")
        figure.savefig(picture, format=form, dpi=160, facecolor="white", metadata=metadata)
    write_output(path, picture.getvalue())


def page_charts(charts: Charts, rows: Sequence[AccuracyRow]) -> list[Markup]:
    """Return the charts of the held-out classes for a page; none where there is one kind of question only."""
    shown = [row for row in first_setting(rows) if row["split"] != "train"]
    pairs = orders(shown)
    if not shown or (not pairs and len(shown[0]["by_seen"]) < 2):
        return []
    with rc_context(STYLE):
        names = dict.fromkeys(order_name(*pair) for pair in pairs)
        axes = [Figure(PAGE_SIZE, layout="constrained").add_subplot() for _ in names or [""]]
        if pairs:
            draw_switch(axes, shown)
            return [charts.svg(of, f"{name}: accuracy by position") for of, name in zip(axes, names, strict=True)]
        draw_seen(axes[0], shown)
        ends = (f"{row['name']} {(row['by_seen'][-1] or {}).get('mean') or 0:.3g}" for row in shown)
        return [charts.svg(axes[0], f"accuracy by examples seen, at the end {', '.join(ends)}")]


def first_setting(rows: Sequence[AccuracyRow]) -> list[AccuracyRow]:
    """Return the rows of the setting of the run itself, without what is not drawn."""
    first = rows[:1]
    return [
        row
        for row in rows
        if row["name"] not in HIDDEN and all(row[key] == of[key] for of in first for key in ("ways", "shots"))
    ]


def draw_seen(axes: Axes, rows: Sequence[AccuracyRow]) -> None:
    """Draw a line per agent over the number of examples seen, with its name at the end."""
    ends = {}
    for row, style in zip(rows, _styles(rows), strict=True):
        start = 1 if row["name"] in REFERENCES and row["name"] != "chance" else 0  # they know no class before
        marker = "" if row["name"] in REFERENCES else "o"
        ends[row["name"]] = _line(axes, start, row["by_seen"][start:], style, marker), style["color"]
    axes.set(xlabel="examples of the class seen in the episode", ylabel="accuracy, %", ylim=(0, 102))
    axes.set_xticks(range(max(len(row["by_seen"]) for row in rows)))
    _name_ends(axes, ends)


def draw_switch(axes: Sequence[Axes], rows: Sequence[AccuracyRow]) -> None:
    """Draw a chart for each order of two data sets: a line per agent over the positions around the switch."""
    pairs = orders(rows)
    for of_order, name in zip(axes, dict.fromkeys(order_name(*pair) for pair in pairs), strict=True):
        of_name = [pair for pair in pairs if order_name(*pair) == name]
        ends = {}
        for (first, second), style in zip(of_name, _styles([first for first, _ in of_name]), strict=True):
            _line(of_order, -len(first["before_end"]), first["before_end"], style)
            end = _line(of_order, 0, second["by_position"][:31], style)
            ends[first["name"]] = end, style["color"]
        of_order.axvline(-0.5, color=INK, linewidth=0.8)
        of_order.set(xlabel="example, from the switch of data sets", ylabel="accuracy, %", ylim=(0, 102))
        of_order.set_xlim(left=-N_BEFORE_END - 0.5)
        of_order.set_title(name, loc="left")
        _name_ends(of_order, ends)


def _styles(rows: Sequence[AccuracyRow]) -> list[dict[str, Any]]:
    colours, styles = cycle(COLOURS), []
    for row in rows:
        if row["name"] in REFERENCES:
            styles.append({"color": RANDOM, "linestyle": REFERENCES[row["name"]], "linewidth": 1.1})
        else:
            styles.append({"color": next(colours), "linestyle": "-", "linewidth": 1.8})
    return styles


def _line(
    axes: Axes, start: int, intervals: Sequence[AccuracyInterval | None], style: dict[str, Any], marker: str = ""
) -> float:
    """Draw accuracies at `start`, `start + 1`, ... in percent; return the last one."""
    ends = [[np.nan] * 3 if of is None else [of[end] for end in ("mean", "low", "high")] for of in intervals]
    mean, low, high = 100 * np.array(ends, np.float64).reshape(-1, 3).T
    x = np.arange(start, start + len(mean))
    axes.plot(x, mean, marker=marker, markersize=4, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    known = mean[np.isfinite(mean)]
    return float(known[-1]) if len(known) else 0.0


def _name_ends(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Write each line's name on the right of its end, without overlaps."""
    names = sorted(ends, key=lambda name: ends[name][0])
    ys = np.array([ends[name][0] for name in names])
    for i in range(1, len(ys)):  # move groups of names that are too close apart, around their middle
        first = i
        while first > 0 and ys[first] - ys[first - 1] < LINE_HEIGHT - 1e-6:
            first -= 1
            of_group = np.array([ends[name][0] for name in names[first : i + 1]])
            ys[first : i + 1] = of_group.mean() + LINE_HEIGHT * (np.arange(i + 1 - first) - (i - first) / 2)
    below_title = 100 - LINE_HEIGHT * np.arange(len(ys))[::-1]
    ys = np.minimum(ys, below_title)
    for name, y in zip(names, ys, strict=True):
        place = (1.015, y)
        axes.annotate(
            name, place, xycoords=("axes fraction", "data"), color=ends[name][1], va="center", annotation_clip=False
        )
