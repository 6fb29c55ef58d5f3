"""Charts as SVG inside a page: small, in the page's font, with a description for screen readers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srwm_rl.scripts.reports.curves import Band, Curve

# Okabe and Ito's colours, safe for colour-blind readers; the style sheet has the same.
TRAIN, HELD_OUT, RANDOM, INK = "#0072b2", "#d55e00", "#767676", "#333333"
COLOURS = (TRAIN, HELD_OUT, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 3.5, 2.15  # inches; 8 points are 11 to 12 pixels at a column's width on the page
FRAME = (0.15, 0.19, 0.82, 0.69)
"""Position of the axes in small charts, as fractions of the chart; the same in all, so that they are aligned."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "text.color": INK,
    **{f"{axis}tick.color": INK for axis in "xy"},
    **{f"{axis}tick.major.width": 0.6 for axis in "xy"},
    **{f"{axis}tick.major.size": 2.5 for axis in "xy"},
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # names may contain dollars
    "svg.hashsalt": "srwm-rl",  # the same data give the same file
    "svg.fonttype": "none",  # text stays text: searchable, readable by screen readers
    "path.simplify_threshold": 0.5,
}

Interval = dict[str, Any]
"""The `mean` of an evaluation, and the ends of its interval, `low` and `high`, None if unknown."""


class Charts:
    """Draws the charts of one page; their ids differ, since the page has one namespace."""

    def __init__(self) -> None:
        self.count = 0

    def svg(self, axes: Axes, description: str) -> Markup:
        """Return the figure of a chart as an element of the page."""
        self.count += 1
        text, figure = io.StringIO(), axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        return clean_svg(text.getvalue(), f"f{self.count}", description)

    @rc_context(STYLE)
    def curve(
        self,
        band: Band,
        title: str,
        unit: str,
        held_out: tuple[float, Interval] | None = None,
        random: float | None = None,
        test: Curve | None = None,
    ) -> Markup:
        """Draw a value over training: the seeds' curves, the returns on held-out levels during training (`test`) and
        at `held_out[0]` steps, and a line for random play.
        """
        (steps, values), axes = band.mean, _axes()
        for seed in band.seeds:
            axes.plot(*seed, color=TRAIN, linewidth=0.5, alpha=0.5)
        if band.seeds:
            shade(axes, band, TRAIN, 0.18)
        axes.plot(steps, values, color=TRAIN, linewidth=1.5)
        if test is not None:
            axes.plot(*test, color=HELD_OUT, linewidth=1.2)
        if random is not None:
            axes.axhline(random, color=RANDOM, linewidth=1, dashes=(4, 2.5))
        if held_out is not None:
            mean, errors = _dots([held_out[1]])
            axes.errorbar([held_out[0]], mean, errors, fmt="o", color=HELD_OUT)
        _label(axes, title, "environment steps", unit)
        ends = f"{values[0]:.3g} at first, {values[-1]:.3g} at {steps[-1]:,.0f} steps"
        return self.svg(axes, f"{title}: {unit}, {ends}")

    @rc_context(STYLE)
    def lines(self, curves: dict[str, Curve], title: str) -> Markup:
        """Draw several values over training, with their names at the ends of the lines."""
        axes = _axes()
        for curve, colour in zip(curves.values(), cycle(COLOURS), strict=False):
            axes.plot(*curve, color=colour, linewidth=1.2)
        _label(axes, title, "environment steps", "")
        if len(curves) > 1:
            _name_ends(axes, {name: float(curve.values[-1]) for name, curve in curves.items()})
        ends = (f"{name} {curve.values[0]:.3g} to {curve.values[-1]:.3g}" for name, curve in curves.items())
        return self.svg(axes, f"{title} over training: {', '.join(ends)}")

    @rc_context(STYLE)
    def intervals(self, intervals: dict[str, Interval], unit: str, middle: float = 0.0) -> Markup:
        """Draw estimates with their intervals, one per row, and a vertical line at `middle`."""
        n_rows = len(intervals)
        axes = _axes((WIDTH, 0.6 + 0.2 * n_rows))
        axes.axvline(middle, color="#888888", linewidth=0.8)
        means, errors = _dots(intervals.values())
        axes.errorbar(means, range(n_rows), xerr=errors, fmt="o", color=TRAIN)
        axes.set(yticks=range(n_rows), yticklabels=intervals, ylim=(n_rows - 0.5, -0.5), xlabel=unit)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        named = (f"{name} {mean:.3g}" for name, mean in zip(intervals, means, strict=True))
        return self.svg(axes, f"{unit}: {', '.join(named)}")

    @rc_context(STYLE)
    def profiles(self, thresholds: list[float], profiles: dict[str, dict[str, list[float]]], unit: str) -> Markup:
        """Draw performance profiles by their names: the `fractions` above the thresholds, between `low` and `high`."""
        axes = _axes((WIDTH, HEIGHT))
        for (name, profile), colour in zip(profiles.items(), (TRAIN, HELD_OUT), strict=True):
            axes.fill_between(thresholds, profile["low"], profile["high"], color=colour, alpha=0.18, linewidth=0)
            axes.plot(thresholds, profile["fractions"], color=colour, linewidth=1.5, label=name)
        axes.set_ylim(-0.02, 1.02)
        _label(axes, "", unit, "fraction of runs above")
        axes.legend(frameon=False)
        return self.svg(axes, f"performance profiles of {' and '.join(profiles)}")

    @rc_context(STYLE)
    def history(self, scores: dict[int, float], unit: str) -> Markup:
        """Draw the scores of numbered trials, and the best one so far."""
        axes, numbers = _axes(), sorted(scores)
        values = np.array([scores[number] for number in numbers])
        axes.plot(numbers, values, "o", color=TRAIN, alpha=0.7)
        axes.plot(numbers, np.maximum.accumulate(values), color=HELD_OUT, drawstyle="steps-post", linewidth=1.2)
        _label(axes, "", "trial", unit)
        return self.svg(axes, f"{unit} of {len(numbers)} trials, at best {values.max():.3g}")

    @rc_context(STYLE)
    def bars(self, shares: dict[str, float], unit: str) -> Markup:
        """Draw one horizontal bar per name."""
        axes = _axes((WIDTH, 0.6 + 0.2 * len(shares)))
        axes.barh(range(len(shares)), list(shares.values()), color=TRAIN, height=0.6)
        axes.set(yticks=range(len(shares)), yticklabels=shares, ylim=(len(shares) - 0.5, -0.5), xlabel=unit)
        axes.tick_params(axis="y", length=0)
        return self.svg(axes, f"{unit}: {', '.join(f'{name} {share:.2g}' for name, share in shares.items())}")


def _axes(size: tuple[float, float] | None = None) -> Axes:
    """Return an empty chart: of a given size in inches, or a small one whose axes are aligned with the others."""
    if size:
        return Figure(size, layout="constrained").add_subplot()
    return Figure((WIDTH, HEIGHT)).add_axes(FRAME)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.locator_params(axis="both", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))


def _name_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Write each line's name beside its end, without overlaps."""
    left, bottom, width, height = FRAME
    axes.set_position((left, bottom, width - 0.19, height))
    low, high = axes.get_ylim()
    colours = dict(zip(ends, cycle(COLOURS), strict=False))
    y = -1.0
    for name, value in sorted(ends.items(), key=lambda end: end[1]):
        y = max(y + 0.1, (value - low) / (high - low))
        axes.text(1.02, y, name, color=colours[name], transform=axes.transAxes, va="center")


def shade(axes: Axes, band: Band, colour: Any, alpha: float) -> None:
    """Shade a band's interval; the axes make room for its seeds' curves alone, as that of two seeds can be huge."""
    for seed in band.seeds:
        axes.update_datalim(np.column_stack(seed))
    limits = axes.dataLim.frozen()
    axes.fill_between(band.mean.steps, band.low, band.high, color=colour, alpha=alpha, linewidth=0)
    axes.dataLim.set(limits)


def _dots(intervals: Iterable[Interval]) -> tuple[Any, Any]:
    """Return means `[n]` and, for `errorbar`, their distances from the ends of their intervals, `[2, n]`."""
    ends = [[interval[end] for end in ("mean", "low", "high")] for interval in intervals]
    mean, low, high = np.array(ends, np.float64).T  # unknown ends are NaN, which is not drawn
    return mean, [(mean - low).tolist(), (high - mean).tolist()]


def short_number(value: float) -> str:
    """Format a count: 0, 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def clean_svg(text: str, prefix: str, description: str) -> Markup:
    """Convert an SVG file of matplotlib to an element of a page.

    Unused ids are removed, the others get `prefix`; fonts and style rules are removed, so that the page's apply.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}-", body)
    body = re.sub(r"font-family: [^;\"]+; ?", "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"(\d+\.\d\d)\d+", r"\1", body)  # a hundredth of a point is enough
    body = re.sub(r"\s+", " ", body).replace("> <", "><")
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(description)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, body, count=1))
