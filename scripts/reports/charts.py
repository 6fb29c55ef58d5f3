"""Pictures as SVG text for a page: small, in the page's own font, with a description for those who cannot see them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from srwm_rl.errors import UserError
from srwm_rl.scripts.reports.curves import Band, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from srwm_rl.agents.evaluation.comparison import Profiles

# Okabe and Ito's colours, which the colour-blind can tell apart; the style sheet has the same.
TRAIN, HELD_OUT, RANDOM, INK = "#0072b2", "#d55e00", "#767676", "#333333"
COLOURS = (TRAIN, HELD_OUT, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 3.5, 2.15  # inches; at a column's width on the page a letter of 8 points is one of 11 to 12 pixels
FRAME = (0.15, 0.19, 0.82, 0.69)
"""Where the axes of small pictures lie, as fractions of the whole; the same in all, so that they stand in line."""
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
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and selected
    "path.simplify_threshold": 0.5,
}


Estimate = tuple[float, float | None, float | None]
"""A mean and the ends of its interval, None where there is none."""


def require_matplotlib() -> None:
    """Raise a `UserError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pages are drawn with matplotlib, which is missing: pip install matplotlib") from error


class Drawing:
    """A picture being drawn; `svg` is there when it is finished."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.description = ""
        self.svg = Markup()


class Pictures:
    """Draw a page's pictures; each has ids of its own, for they all share the page's."""

    def __init__(self) -> None:
        require_matplotlib()
        self.count = 0

    @contextmanager
    def _drawing(self, size: tuple[float, float] | None = None) -> Iterator[Drawing]:
        """Yield what to draw on: of a given size, or one of many that are to stand in line."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

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
            title: above the picture.
            unit: of the value.
            held_out: the steps after which held-out levels were played, and what was earned there.
            random: what random play earns.
            test: what held-out levels earned now and then during training.
        """
        steps, values = band.mean
        with self._drawing() as drawing:
            axes = drawing.axes
            for each in band.seeds:
                axes.plot(each.steps, each.values, color=TRAIN, linewidth=0.5, alpha=0.5)
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
        """Draw several values over training, each with its name at its end."""
        with self._drawing() as drawing:
            axes = drawing.axes
            for curve, colour in zip(curves.values(), cycle(COLOURS), strict=False):
                axes.plot(*curve, color=colour, linewidth=1.2)
            _label(axes, title, "environment steps", "")
            axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
            if len(curves) > 1:
                _name_ends(axes, {name: float(curve.values[-1]) for name, curve in curves.items()})
            said = (f"{name} {curve.values[0]:.3g} to {curve.values[-1]:.3g}" for name, curve in curves.items())
            drawing.description = f"{title} over training: {', '.join(said)}"
        return drawing.svg

    def intervals(self, names: Sequence[str], values: Sequence[Estimate], unit: str, middle: float = 0.0) -> Markup:
        """Draw a column of estimates with their intervals about a line at `middle`."""
        with self._drawing((WIDTH, 0.6 + 0.2 * len(names))) as drawing:
            axes = drawing.axes
            axes.axvline(middle, color="#888888", linewidth=0.8)
            for row, value in enumerate(values):
                _dot(axes, value, y=row, colour=TRAIN)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(unit)
            said = (f"{name} {mean:.3g}" for name, (mean, *_) in zip(names, values, strict=True))
            drawing.description = f"{unit}: {', '.join(said)}"
        return drawing.svg

    def profiles(self, sides: Sequence[tuple[str, Profiles]], unit: str) -> Markup:
        """Draw the performance profiles of both sides."""
        with self._drawing((WIDTH, HEIGHT)) as drawing:
            axes = drawing.axes
            for (name, profile), colour in zip(sides, (TRAIN, HELD_OUT), strict=True):
                axes.fill_between(profile.thresholds, profile.low, profile.high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(profile.thresholds, profile.fractions, color=colour, linewidth=1.5, label=name)
            axes.set_ylim(-0.02, 1.02)
            _label(axes, "", unit, "fraction of runs above")
            axes.legend(frameon=False)
            drawing.description = f"performance profiles of {' and '.join(name for name, _ in sides)}"
        return drawing.svg


def _label(axes: Axes, title: str, below: str, beside: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.locator_params(axis="both", nbins=5)


def _name_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Write each line's name beside its end, from the lowest up, none upon another."""
    left, bottom, width, height = FRAME
    axes.set_position((left, bottom, width - 0.19, height))
    low, high = axes.get_ylim()
    colours = dict(zip(ends, cycle(COLOURS), strict=False))
    y = -1.0
    for name, value in sorted(ends.items(), key=lambda each: each[1]):
        y = max(y + 0.1, (value - low) / (high - low))
        axes.text(1.02, y, name, color=colours[name], transform=axes.transAxes, va="center")


def _dot(axes: Axes, value: Estimate, colour: str, x: float | None = None, y: float | None = None) -> None:
    """Draw an estimate at a given `x` with its interval upright, or at a given `y` with its interval level."""
    mean, low, high = value
    ends = [] if low is None or high is None else [low, high]
    across, up = ([x or 0.0] * len(ends), ends) if y is None else (ends, [y] * len(ends))
    axes.plot(across, up, color=colour, linewidth=1.6, clip_on=False)
    axes.plot(mean if x is None else x, mean if y is None else y, "o", color=colour, markersize=4.5, clip_on=False)


def short_number(value: float) -> str:
    """Return a count in few letters: 0, 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def clean_svg(text: str, prefix: str, description: str) -> Markup:
    """Make matplotlib's SVG fit to stand inside a page.

    Ids that nothing refers to are left out, the others get `prefix`; the page's font replaces matplotlib's; rules that
    would hold for the whole page go.

    Args:
        text: a whole SVG file.
        prefix: of the ids.
        description: what the picture shows; escaped here.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}-", body)
    body = re.sub(r"font-family: [^;\"]+; ?", "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"(\d+\.\d\d)\d+", r"\1", body)  # a hundredth of a point is enough
    body = re.sub(r"\s+", " ", body).replace("> <", "><")
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(description)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, body, count=1))
