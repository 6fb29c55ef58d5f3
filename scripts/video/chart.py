"""Charts over time that fill up from the left: drawn once full and once empty; each frame combines both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from srwm_rl.scripts.video.canvas import SMALLEST, Canvas
from srwm_rl.scripts.video.colours import BLUE, DIM, EMPTY, INK, ORANGE, PAPER, RULE, Bytes, Colour, paint

Array = npt.NDArray
# Heights in pixels: of a title, between plots, between sections, of the time axis.
HEADER, GAP, SPACE, AXIS = 19, 3, 9, 20


@dataclass(frozen=True)
class Heat:
    """A heat map over time."""

    values: Array
    """`[T, R]`."""
    low: float
    high: float
    colours: str
    """Name of the colour map."""
    labels: Sequence[str]
    """One per row, of which as many are written as fit; or one for all rows."""
    height: float
    """Relative to the other plots."""
    bands: Sequence[int] = ()
    """Rows with a line above."""
    marks: Array | None = None
    """`[T, R]` bool: cells with a dot."""


@dataclass(frozen=True)
class Curve:
    """A line over time."""

    values: Array
    """`[T]`; the line is interrupted where an episode starts."""
    low: float
    high: float
    colour: Colour
    height: float
    bars: Array | None = None
    """`[T]`: bars from 0, on the same scale."""


@dataclass(frozen=True)
class Section:
    """A title and the plots below it; heat maps of one section have the same scale."""

    title: str
    plots: Sequence[Heat | Curve]
    current: Callable[[int], str] = lambda t: ""
    """Returns the text on the right of the title at step t."""


def format_number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


class Chart:
    """Sections below each other with one time axis.

    `gutters` are the pixels for the labels on the left and for the scales on the right.
    """

    def __init__(
        self, size: tuple[int, int], sections: Sequence[Section], starts: Array, gutters: tuple[int, int] = (64, 52)
    ) -> None:
        self.sections, self.n_steps = sections, len(starts)
        self.left, self.right = gutters[0], size[0] - gutters[1]
        self._starts = [int(t) for t in np.flatnonzero(starts)]
        self._title_ys: list[int] = []
        self._plot_ys: list[tuple[int, int]] = []  # top and bottom
        self._size = size
        self.empty, self.full = self._draw(full=False), self._draw(full=True)

    def edge(self, t: int) -> int:
        """Return where step t begins, in pixels from the left."""
        return self.left + (self.right - self.left) * t // self.n_steps

    def at(self, t: int) -> Bytes:
        """Return the picture with the data of steps 0 .. t."""
        end = max(self.edge(t + 1), self.left + 1)
        canvas = Canvas(self._size)
        canvas.paste(self.empty, 0, 0)
        canvas.paste(self.full[:, self.left : end], self.left, 0)
        for y, section in zip(self._title_ys, self.sections, strict=True):
            canvas.text(self.right, y, section.current(t), 13, INK, "r")
        if t + 1 < self.n_steps:
            for top, bottom in self._plot_ys:
                canvas.draw.line((end, top, end, bottom - 1), DIM)
        return canvas.pixels()

    def _draw(self, full: bool) -> Bytes:
        """Draw all sections, with or without their data."""
        canvas = Canvas(self._size)
        plots = [plot for section in self.sections for plot in section.plots]
        n = len(self.sections)
        fixed = AXIS + n * HEADER + (len(plots) - n) * GAP + (n - 1) * SPACE
        unit = (self._size[1] - fixed) / sum(plot.height for plot in plots)
        self._title_ys, self._plot_ys, y = [], [], 0.0
        for section in self.sections:
            self._title_ys.append(round(y) + HEADER // 2 - 2)
            canvas.text(self.left, self._title_ys[-1], section.title, 13, DIM)
            y += HEADER
            first_top = round(y)
            for plot in section.plots:
                top, bottom = round(y), round(y + plot.height * unit)
                self._plot_ys.append((top, bottom))
                self._plot(canvas, plot, top, bottom, full)
                y += plot.height * unit + GAP
            if isinstance(section.plots[0], Heat):
                self._colour_bar(canvas, section.plots[0], first_top, bottom)
            y += SPACE - GAP
        self._axis(canvas, round(y - SPACE))
        return canvas.pixels()

    def _plot(self, canvas: Canvas, plot: Heat | Curve, top: int, bottom: int, full: bool) -> None:
        canvas.draw.rectangle((self.left, top, self.right - 1, bottom - 1), EMPTY)
        if isinstance(plot, Heat):
            self._heat(canvas, plot, top, bottom, full)
        else:
            self._curve(canvas, plot, top, bottom, full)
        for t in self._starts[1:] if full else ():
            # Dark beside light: visible on every background.
            for x, colour in ((self.edge(t) - 1, PAPER), (self.edge(t), INK)):
                canvas.draw.line((x, top, x, bottom - 1), colour)

    def _heat(self, canvas: Canvas, plot: Heat, top: int, bottom: int, full: bool) -> None:
        n_rows = plot.values.shape[1]
        edges = np.linspace(top, bottom, n_rows + 1).tolist()
        if full:
            cells = Image.fromarray(plot.values.T.astype(np.float32))
            shown = cells.resize((self.right - self.left, bottom - top), Image.Resampling.BOX)  # means where it shrinks
            canvas.paste(paint(np.asarray(shown), plot.low, plot.high, plot.colours), self.left, top)
            self._dots(canvas, plot, edges)
        for row in plot.bands:
            canvas.draw.line((self.left, round(edges[row]), self.right - 1, round(edges[row])), PAPER)
        self._labels(canvas, plot, edges)

    def _dots(self, canvas: Canvas, plot: Heat, edges: list[float]) -> None:
        radius = min(0.22 * (self.edge(1) - self.left), 0.22 * (edges[1] - edges[0]), 5)
        if plot.marks is None or radius < 1.2:  # too small to see
            return
        for t, row in np.argwhere(plot.marks):
            centre = ((self.edge(t) + self.edge(t + 1)) / 2, (edges[row] + edges[row + 1]) / 2)
            canvas.draw.circle(centre, radius, ORANGE, PAPER, 1)

    def _labels(self, canvas: Canvas, plot: Heat, edges: list[float]) -> None:
        x, n_rows = self.left - 8, len(edges) - 1
        if len(plot.labels) < n_rows:
            canvas.text(x, (edges[0] + edges[-1]) / 2, plot.labels[0], 13, DIM, "r")
            return
        row_height = edges[1] - edges[0]
        # Labels in two columns have twice the space.
        n_columns = 2 if 2 * row_height >= SMALLEST > row_height and not plot.bands else 1
        # One interval for all bands: heads of different layers get the same labels.
        interval = 1
        while interval * n_columns * row_height < SMALLEST:
            interval *= 2
        for first, last in pairwise([0, *plot.bands, n_rows]):
            for row in range(first, last, interval):
                shift = 15 * (row // interval % n_columns)
                canvas.text(x - shift, (edges[row] + edges[row + 1]) / 2, plot.labels[row], SMALLEST, DIM, "r")

    def _colour_bar(self, canvas: Canvas, plot: Heat, top: int, bottom: int) -> None:
        x = self.right + 8
        colours = paint(np.linspace(1, 0, bottom - top), 0, 1, plot.colours)[:, None].repeat(7, 1)
        canvas.paste(colours, x, top)
        self._limits(canvas, x + 11, plot, top, bottom)

    def _limits(self, canvas: Canvas, x: int, plot: Heat | Curve, top: int, bottom: int) -> None:
        canvas.text(x, top + 4, format_number(plot.high), SMALLEST, DIM)
        canvas.text(x, bottom - 5, format_number(plot.low), SMALLEST, DIM)

    def _curve(self, canvas: Canvas, plot: Curve, top: int, bottom: int, full: bool) -> None:
        spread = plot.high - plot.low or 1.0

        def y(value: float) -> float:
            return bottom - 2 - (float(value) - plot.low) / spread * (bottom - top - 4)

        if plot.low < 0 < plot.high:
            canvas.draw.line((self.left, y(0), self.right - 1, y(0)), RULE)
        self._limits(canvas, self.right + 8, plot, top, bottom)
        if not full:
            return
        if plot.bars is not None:
            for t in np.flatnonzero(plot.bars):
                low, high = sorted((y(0), y(plot.bars[t])))
                last = max(self.edge(t + 1) - 1, self.edge(t) + 1)
                canvas.draw.rectangle((self.edge(t), low, last, high), BLUE)
        for first, end in pairwise([*self._starts, self.n_steps]):
            points = []
            for t in range(first, end):
                points += [(x, y(plot.values[t])) for x in (self.edge(t), max(self.edge(t + 1) - 1, self.edge(t)))]
            canvas.draw.line(points, plot.colour, 2)

    def _axis(self, canvas: Canvas, y: int) -> None:
        ticks = MaxNLocator(9, steps=[1, 2, 5, 10], integer=True).tick_values(0, self.n_steps)
        for t in (int(tick) for tick in ticks if 0 <= tick < self.n_steps):
            canvas.draw.line((self.edge(t), y + 2, self.edge(t), y + 5), DIM)
            canvas.text(self.edge(t), y + 12, str(t), SMALLEST, DIM, "m" if t else "l")
        canvas.text(self.right + 8, y + 12, "step", SMALLEST, DIM)
