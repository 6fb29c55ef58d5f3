"""Charts as SVG inside a page: small, in the page's font, with a description for screen readers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srwm_rl.agents.evaluation.comparison import Profiles
from srwm_rl.scripts.reports.curves import Band, Curve

# Okabe and Ito's colours, safe for colour-blind readers; the style sheet has the same.
TRAIN, HELD_OUT, RANDOM, INK = "#0072b2", "#d55e00", "#767676", "#333333"
COLOURS = (TRAIN, HELD_OUT, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 3.5, 2.15  # inches; 8 points are 11 to 12 pixels at a column's width on the page
FRAME = (0.15, 0.19, 0.82, 0.69)
"""Position of the axes in small charts, as fractions of the chart; the same in all, so that they are aligned."""
STYLE: dict[str, Any] = {
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
    "text.parse_math": False,  # names may contain dollars
    "svg.fonttype": "none",  # text stays text: searchable, readable by screen readers
    "path.simplify_threshold": 0.5,
}

Estimate = tuple[float, float | None, float | None]
"""A mean and the ends of its interval, None if unknown."""


class Drawing:
    """A chart; `svg` is set when the context of `Charts._draw` ends."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.description = ""
        self.svg = Markup()


class Charts:
    """Draws the charts of one page; their ids differ, since the page has one namespace."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def _draw(self, size: tuple[float, float] | None = None) -> Iterator[Drawing]:
        """Yield an empty chart: of a given size in inches, or a small one whose axes are aligned with the others."""
        self.count += 1
        style: Any = {**STYLE, "svg.hashsalt": str(self.count)}
        with rc_context(style):
            figure = Figure(figsize=size or (WIDTH, HEIGHT), layout="constrained" if size else None)
            drawing = Drawing(figure.add_subplot() if size else figure.add_axes(FRAME))
            yield drawing
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        drawing.svg = clean_svg(text.getvalue(), f"f{self.count}", drawing.description)

    def curve(
        self,
        band: Band,
        title: str,
        unit: str,
        held_out: tuple[float, Estimate] | None = None,
        random: float | None = None,
        test: Curve | None = None,
    ) -> Markup:
        """Draw a value over training.

        Args:
            band: the seeds' curves.
            title: above the chart.
            unit: of the value.
            held_out: environment steps of the evaluated agent, and its return on held-out levels.
            random: return of random play.
            test: returns on held-out levels during training.
        """
        steps, values = band.mean
        with self._draw() as drawing:
            axes = drawing.axes
            for seed in band.seeds:
                axes.plot(*seed, color=TRAIN, linewidth=0.5, alpha=0.5)
            if band.seeds:
                axes.fill_between(steps, band.low, band.high, color=TRAIN, alpha=0.18, linewidth=0)
            axes.plot(steps, values, color=TRAIN, linewidth=1.5)
            if test is not None:
                axes.plot(*test, color=HELD_OUT, linewidth=1.2)
            if random is not None:
                axes.axhline(random, color=RANDOM, linewidth=1, dashes=(4, 2.5))
            if held_out is not None:
                _dot(axes, held_out[1], x=held_out[0], colour=HELD_OUT)
            _label(axes, title, "environment steps", unit)
            axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
            ends = f"{values[0]:.3g} at first, {values[-1]:.3g} at {steps[-1]:,.0f} steps"
            drawing.description = f"{title}: {unit}, {ends}"
        return drawing.svg

    def lines(self, curves: dict[str, Curve], title: str) -> Markup:
        """Draw several values over training, with their names at the ends of the lines."""
        with self._draw() as drawing:
            axes = drawing.axes
            for curve, colour in zip(curves.values(), cycle(COLOURS), strict=False):
                axes.plot(*curve, color=colour, linewidth=1.2)
            _label(axes, title, "environment steps", "")
            axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
            if len(curves) > 1:
                _name_ends(axes, {name: float(curve.values[-1]) for name, curve in curves.items()})
            ends = (f"{name} {curve.values[0]:.3g} to {curve.values[-1]:.3g}" for name, curve in curves.items())
            drawing.description = f"{title} over training: {', '.join(ends)}"
        return drawing.svg

    def intervals(self, names: Sequence[str], values: Sequence[Estimate], unit: str, middle: float = 0.0) -> Markup:
        """Draw estimates with their intervals, one per row, and a vertical line at `middle`."""
        with self._draw((WIDTH, 0.6 + 0.2 * len(names))) as drawing:
            axes = drawing.axes
            axes.axvline(middle, color="#888888", linewidth=0.8)
            for row, value in enumerate(values):
                _dot(axes, value, y=row, colour=TRAIN)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(unit)
            means = (f"{name} {mean:.3g}" for name, (mean, *_) in zip(names, values, strict=True))
            drawing.description = f"{unit}: {', '.join(means)}"
        return drawing.svg

    def profiles(self, profiles: Sequence[tuple[str, Profiles]], unit: str) -> Markup:
        """Draw performance profiles, with their names."""
        with self._draw((WIDTH, HEIGHT)) as drawing:
            axes = drawing.axes
            for (name, profile), colour in zip(profiles, (TRAIN, HELD_OUT), strict=True):
                axes.fill_between(profile.thresholds, profile.low, profile.high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(profile.thresholds, profile.fractions, color=colour, linewidth=1.5, label=name)
            axes.set_ylim(-0.02, 1.02)
            _label(axes, "", unit, "fraction of runs above")
            axes.legend(frameon=False)
            drawing.description = f"performance profiles of {' and '.join(name for name, _ in profiles)}"
        return drawing.svg


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.locator_params(axis="both", nbins=5)


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


def _dot(axes: Axes, value: Estimate, colour: str, x: float | None = None, y: float | None = None) -> None:
    """Draw an estimate at `x` with a vertical interval, or at `y` with a horizontal one."""
    mean, low, high = value
    ends = [] if low is None or high is None else [low, high]
    xs, ys = ([x or 0.0] * len(ends), ends) if y is None else (ends, [y] * len(ends))
    axes.plot(xs, ys, color=colour, linewidth=1.6, clip_on=False)
    axes.plot(mean if x is None else x, mean if y is None else y, "o", color=colour, markersize=4.5, clip_on=False)


def short_number(value: float) -> str:
    """Format a count: 0, 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def clean_svg(text: str, prefix: str, description: str) -> Markup:
    """Convert an SVG file of matplotlib to an element of a page.

    Unused ids are removed, the others get `prefix`; fonts and style rules are removed, so that the page's apply.

    Args:
        text: an SVG file.
        prefix: of the ids.
        description: for screen readers; escaped here.
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
