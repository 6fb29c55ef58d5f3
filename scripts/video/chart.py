"""Charts over time that fill up from the left: drawn once, whole and empty, and each frame shows a part of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

from srwm_rl.scripts.video.canvas import SMALLEST, Canvas
from srwm_rl.scripts.video.colours import BLUE, DIM, EMPTY, INK, ORANGE, PAPER, RULE, Bytes, Colour, paint

Array = npt.NDArray
HEADER, GAP, SPACE, AXIS = 19, 3, 9, 20  # heights: of a title, between plots, between sections, of the time axis


@dataclass(frozen=True)
class Heat:
    """A heat map over time."""

    values: Array
    """`[T, R]`."""
    low: float
    high: float
    ramp: str
    labels: Sequence[str]
    """Of the rows, as many as there is room for; or one for all of them."""
    height: float
    """In proportion to the others."""
    bands: Sequence[int] = ()
    """Rows above which a rule is drawn."""
    marks: Array | None = None
    """`[T, R]` bool: cells with a dot."""


@dataclass(frozen=True)
class Curve:
    """A line over time."""

    values: Array
    """`[T]`; the line is broken where an episode starts."""
    low: float
    high: float
    colour: Colour
    height: float
    bars: Array | None = None
    """`[T]`: bars from 0, on the same scale."""


@dataclass(frozen=True)
class Section:
    """A title and the plots below it; heat maps of one section are on one scale."""

    title: str
    plots: Sequence[Heat | Curve]
    now: Callable[[int], str] = lambda t: ""
    """What to say of step t, on the right of the title."""


def number(value: float) -> str:
    """Write a number in three figures."""
    return f"{value:.3g}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


class Chart:
    """Sections below each other with one time axis.

    Args:
        size: width and height in pixels.
        sections: what to draw.
        starts: `[T]`, the steps with which episodes begin.
        gutters: pixels for the labels on the left and for the scales on the right.
    """

    def __init__(
        self, size: tuple[int, int], sections: Sequence[Section], starts: Array, gutters: tuple[int, int] = (64, 52)
    ) -> None:
        self.sections, self.n_steps = sections, len(starts)
        self.left, self.right = gutters[0], size[0] - gutters[1]
        self._starts = [int(t) for t in np.flatnonzero(starts)]
        self._titles: list[int] = []  # where the sections' titles stand
        self._plots: list[tuple[int, int]] = []  # top and bottom of every plot
        empty, full = Canvas.blank(size), Canvas.blank(size)
        for canvas, whole in ((empty, False), (full, True)):
            self._titles, self._plots = self._draw(canvas, size[1], whole)
        self.empty, self.full = np.asarray(empty.image), np.asarray(full.image)

    def edge(self, t: int) -> int:
        """Return where step t begins, in pixels from the left."""
        return self.left + (self.right - self.left) * t // self.n_steps

    def at(self, t: int) -> Bytes:
        """Return the picture once steps 0 .. t are known."""
        shown = self.empty.copy()
        end = max(self.edge(t + 1), self.left + 1)
        shown[:, self.left : end] = self.full[:, self.left : end]
        canvas = Canvas(Image.fromarray(shown))
        for y, section in zip(self._titles, self.sections, strict=True):
            canvas.text(self.right, y, section.now(t), 13, INK, "r")
        if t + 1 < self.n_steps:
            for top, bottom in self._plots:
                canvas.draw.line([(end, top), (end, bottom - 1)], DIM, 1)
        return np.asarray(canvas.image)

    def _draw(self, canvas: Canvas, height: int, whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Draw all sections, with or without what they show; return where titles and plots are."""
        plots = [plot for section in self.sections for plot in section.plots]
        fixed = AXIS + sum(HEADER + GAP * (len(s.plots) - 1) for s in self.sections) + SPACE * (len(self.sections) - 1)
        unit = (height - fixed) / sum(plot.height for plot in plots)
        y, titles, places = 0.0, [], []
        for section in self.sections:
            titles.append(round(y) + HEADER // 2 - 2)
            canvas.text(self.left, titles[-1], section.title, 13, DIM)
            y += HEADER
            first = round(y)
            for plot in section.plots:
                places.append((round(y), round(y + plot.height * unit)))
                self._plot(canvas, plot, *places[-1], whole)
                y += plot.height * unit + GAP
            if isinstance(section.plots[0], Heat):
                self._scale(canvas, section.plots[0], first, places[-1][1])
            y += SPACE - GAP
        self._axis(canvas, round(y - SPACE))
        return titles, places

    def _plot(self, canvas: Canvas, plot: Heat | Curve, top: int, bottom: int, whole: bool) -> None:
        canvas.draw.rectangle((self.left, top, self.right - 1, bottom - 1), EMPTY)
        if isinstance(plot, Heat):
            self._heat(canvas, plot, top, bottom, whole)
        else:
            self._curve(canvas, plot, top, bottom, whole)
        for t in self._starts[1:] if whole else ():
            # Dark beside light: seen on whatever is below.
            for x, colour in ((self.edge(t) - 1, PAPER), (self.edge(t), INK)):
                canvas.draw.line([(x, top), (x, bottom - 1)], colour, 1)

    def _heat(self, canvas: Canvas, plot: Heat, top: int, bottom: int, whole: bool) -> None:
        n_rows = plot.values.shape[1]
        edges = [top + (bottom - top) * row / n_rows for row in range(n_rows + 1)]
        if whole:
            colours = paint(
                _columns(plot.values, self.right - self.left).T, plot.low, plot.high, plot.ramp
            )  # [R, W, 3]
            rows = ((np.arange(bottom - top) + 0.5) * n_rows / (bottom - top)).astype(np.int64)
            canvas.image.paste(Image.fromarray(colours[rows]), (self.left, top))
            self._dots(canvas, plot, edges)
        for row in plot.bands:
            canvas.draw.line([(self.left, round(edges[row])), (self.right - 1, round(edges[row]))], PAPER, 1)
        self._labels(canvas, plot, edges)

    def _dots(self, canvas: Canvas, plot: Heat, edges: list[float]) -> None:
        if plot.marks is None:
            return
        size = min(self.edge(1) - self.left, edges[1] - edges[0])
        radius = min(size * 0.22, 5)
        if radius < 1.2:  # too small to see
            return
        for t, row in np.argwhere(plot.marks):
            x = (self.edge(t) + self.edge(t + 1)) / 2
            middle = (x, (edges[row] + edges[row + 1]) / 2)
            canvas.draw.circle(middle, radius, ORANGE, PAPER, 1)

    def _labels(self, canvas: Canvas, plot: Heat, edges: list[float]) -> None:
        x, n_rows = self.left - 8, len(edges) - 1
        if len(plot.labels) < n_rows:
            canvas.text(x, (edges[0] + edges[-1]) / 2, plot.labels[0], 13, DIM, "r")
            return
        row_height = edges[1] - edges[0]
        # Short signs in two columns have twice the room.
        columns = 2 if 2 * row_height >= SMALLEST > row_height and not plot.bands else 1
        # One step for all bands, so that equal heads of different layers have labels alike.
        every = next(n for n in _powers() if n * columns * row_height >= SMALLEST)
        bands = [0, *plot.bands, n_rows]
        for first, last in pairwise(bands):
            for row in range(first, last, every):
                shift = 15 * (row // every % columns)
                canvas.sign(x - shift, (edges[row] + edges[row + 1]) / 2, plot.labels[row], SMALLEST, DIM, "r")

    def _scale(self, canvas: Canvas, plot: Heat, top: int, bottom: int) -> None:
        x = self.right + 8
        shades = paint(np.linspace(1, 0, bottom - top), 0, 1, plot.ramp)[:, None].repeat(7, 1)
        canvas.image.paste(Image.fromarray(shades), (x, top))
        self._ends(canvas, x + 11, plot.low, plot.high, top, bottom)

    def _ends(self, canvas: Canvas, x: int, low: float, high: float, top: int, bottom: int) -> None:
        canvas.text(x, top + 4, number(high), SMALLEST, DIM)
        canvas.text(x, bottom - 5, number(low), SMALLEST, DIM)

    def _curve(self, canvas: Canvas, plot: Curve, top: int, bottom: int, whole: bool) -> None:
        spread = plot.high - plot.low or 1.0

        def place(value: float) -> float:
            return bottom - 2 - (value - plot.low) / spread * (bottom - top - 4)

        if plot.low < 0 < plot.high:
            canvas.draw.line([(self.left, place(0)), (self.right - 1, place(0))], RULE, 1)
        self._ends(canvas, self.right + 8, plot.low, plot.high, top, bottom)
        if not whole:
            return
        if plot.bars is not None:
            for t in np.flatnonzero(plot.bars):
                ends = sorted((place(0), place(float(plot.bars[t]))))
                last = max(self.edge(t + 1) - 1, self.edge(t) + 1)
                canvas.draw.rectangle((self.edge(t), ends[0], last, ends[1]), BLUE)
        for first, last in zip(self._starts, [*self._starts[1:], self.n_steps], strict=True):
            points = [(x, place(float(plot.values[t]))) for t in range(first, last) for x in self._sides(t)]
            canvas.draw.line(points, plot.colour, 2)

    def _sides(self, t: int) -> tuple[int, int]:
        return self.edge(t), max(self.edge(t + 1) - 1, self.edge(t))

    def _axis(self, canvas: Canvas, y: int) -> None:
        step = next(
            base * 10**power for power in range(9) for base in (1, 2, 5) if self.n_steps / 9 <= base * 10**power
        )
        for t in range(0, self.n_steps, step):
            x = self.edge(t)
            canvas.draw.line([(x, y + 2), (x, y + 5)], DIM, 1)
            canvas.text(x, y + 12, str(t), SMALLEST, DIM, "m" if t else "l")
        canvas.text(self.right + 8, y + 12, "step", SMALLEST, DIM)


def _nice(power: int) -> tuple[int, ...]:
    return 10**power, 2 * 10**power, 5 * 10**power


def _powers() -> Iterator[int]:
    return (1 << n for n in range(64))


def _columns(values: Array, n: int) -> Array:
    """Stretch, or average, `[T, R]` to n columns, `[n, R]`."""
    n_steps = len(values)
    if n_steps <= n:
        # As `Chart.edge` divides the width.
        edges = np.arange(n_steps + 1) * n // n_steps
        return values.repeat(np.diff(edges), axis=0)
    firsts = np.arange(n) * n_steps // n
    means: Array = np.add.reduceat(values, firsts) / np.diff([*firsts, n_steps])[:, None]
    return means
