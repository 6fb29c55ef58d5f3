"""Charts over time that fill up from the left: drawn once without and once with data; each frame combines both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from srwm_rl.scripts.video.canvas import BLUE, DIM, EMPTY, INK, ORANGE, PAPER, RULE, SMALLEST, Canvas, font, paint

Array = npt.NDArray
# Heights in pixels: of a title, between plots, between sections, of the time axis.
HEADER, GAP, SPACE, AXIS = 19, 3, 9, 20
_DIMMED, _FAINT = 0.3, (95, 104, 113)  # contrast of a dimmed row, and its label's colour
_SCALE = 19  # pixels from a heat map to the numbers of its scale, with the colour bar between


@dataclass(frozen=True)
class Heat:
    """A heat map over time."""

    values: Array  # [T, R]
    low: float
    high: float
    colours: str  # name of the colour map
    labels: Sequence[str]  # one per row, of which as many are written as fit; or one for all rows
    height: float  # relative to the other plots
    bands: Sequence[int] = ()  # rows with a line above
    marks: Array | None = None  # [T, R] bool: cells with a dot
    dimmed: Array | None = None  # [R] bool: rows that are drawn darker


@dataclass(frozen=True)
class Curve:
    """A line over time, interrupted where an episode starts."""

    values: Array  # [T]
    low: float
    high: float
    colour: tuple[int, int, int]
    height: float
    bars: Array | None = None  # [T]: bars from 0, on the same scale


@dataclass(frozen=True)
class Section:
    """A title and the plots below it; heat maps of one section have the same scale."""

    title: str
    plots: Sequence[Heat | Curve]
    current: Callable[[int], str] = lambda t: ""  # returns the text on the right of the title at step t


def format_number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


class Chart(Canvas):
    """Sections below each other with one time axis.

    `gutters` are the pixels for the labels on the left and, at least, for the scales on the right.
    """

    def __init__(
        self, size: tuple[int, int], sections: Sequence[Section], starts: Array, gutters: tuple[int, int] = (64, 52)
    ) -> None:
        self.sections, self.n_steps = sections, len(starts)
        limits = [limit for section in sections for plot in section.plots for limit in (plot.low, plot.high)]
        widest = max(font(SMALLEST).getlength(format_number(limit)) for limit in limits)
        self.left, self.right = gutters[0], size[0] - max(gutters[1], _SCALE + round(widest) + 3)
        width = self.right - self.left
        self.edges = [self.left + width * t // self.n_steps for t in range(self.n_steps + 1)]  # of the steps, in pixels
        self._title_ys: list[int] = []
        self._plots: list[tuple[Heat | Curve, int, int]] = []  # with top and bottom
        super().__init__(size)
        self._draw_frame()
        self.empty = self.pixels()
        self._draw_data(np.flatnonzero(starts)[1:].tolist())
        self.full = self.pixels()

    def at(self, t: int) -> Array:
        """Return the picture with the data of steps 0 .. t."""
        end = max(self.edges[t + 1], self.left + 1)
        canvas = Canvas(self.image.size)
        canvas.paste(self.empty, 0, 0)
        canvas.paste(self.full[:, self.left : end], self.left, 0)
        for y, section in zip(self._title_ys, self.sections, strict=True):
            canvas.text(self.right, y, section.current(t), 13, INK, "r")
        for _, top, bottom in self._plots if t + 1 < self.n_steps else ():
            canvas.draw.line((end, top, end, bottom - 1), DIM)
        return canvas.pixels()

    def _draw_frame(self) -> None:
        """Draw everything but the data."""
        plots, n = [plot for section in self.sections for plot in section.plots], len(self.sections)
        fixed = AXIS + n * HEADER + (len(plots) - n) * GAP + (n - 1) * SPACE
        unit = (self.image.height - fixed) / sum(plot.height for plot in plots)
        y = 0.0
        for section in self.sections:
            self._title_ys.append(round(y) + HEADER // 2 - 2)
            self.text(self.left, self._title_ys[-1], section.title, 13, DIM)
            y += HEADER
            first_top = round(y)
            for plot in section.plots:
                top, bottom = round(y), round(y + plot.height * unit)
                self._plots.append((plot, top, bottom))
                self.draw.rectangle((self.left, top, self.right - 1, bottom - 1), EMPTY)
                if isinstance(plot, Heat):
                    self._labels(plot, top, bottom)
                    self._bands(plot, top, bottom)
                elif plot.low < 0 < plot.high:
                    zero = _y(plot, 0, top, bottom)
                    self.draw.line((self.left, zero, self.right - 1, zero), RULE)
                y += plot.height * unit + GAP
            self._scale(section.plots[0], first_top, bottom)
            y += SPACE - GAP
        self._axis(round(y - SPACE))

    def _labels(self, plot: Heat, top: int, bottom: int) -> None:
        row_height = (bottom - top) / len(plot.labels)
        # Labels in two columns have twice the space.
        n_columns = 2 if 2 * row_height >= SMALLEST > row_height and not plot.bands else 1
        # One interval for all bands: heads of different layers get the same labels.
        interval = 1
        while interval * n_columns * row_height < SMALLEST:
            interval *= 2
        for first, last in pairwise([0, *plot.bands, len(plot.labels)]):
            for row in range(first, min(last, len(plot.labels)), interval):
                x, y = self.left - 8 - 15 * (row // interval % n_columns), top + (row + 0.5) * row_height
                colour = _FAINT if plot.dimmed is not None and plot.dimmed[row] and len(plot.labels) > 1 else DIM
                self.text(x, y, plot.labels[row], 13 if len(plot.labels) == 1 else SMALLEST, colour, "r")

    def _bands(self, plot: Heat, top: int, bottom: int) -> None:
        for row in plot.bands:
            y = round(top + row * (bottom - top) / plot.values.shape[1])
            self.draw.line((self.left, y, self.right - 1, y), PAPER)

    def _scale(self, plot: Heat | Curve, top: int, bottom: int) -> None:
        x = self.right + 8
        if isinstance(plot, Heat):
            self.paste(paint(np.linspace(1, 0, bottom - top), 0, 1, plot.colours)[:, None].repeat(7, 1), x, top)
            x = self.right + _SCALE
        self.text(x, top + 4, format_number(plot.high), SMALLEST, DIM)
        self.text(x, bottom - 5, format_number(plot.low), SMALLEST, DIM)

    def _axis(self, y: int) -> None:
        ticks = MaxNLocator(9, steps=[1, 2, 5, 10], integer=True).tick_values(0, self.n_steps)
        for t in (int(tick) for tick in ticks if 0 <= tick < self.n_steps):
            x = self.edges[t]
            self.draw.line((x, y + 2, x, y + 5), DIM)
            self.text(x, y + 12, str(t), SMALLEST, DIM, "m" if t else "l")
        self.text(self.right + 8, y + 12, "step", SMALLEST, DIM)

    def _draw_data(self, starts: list[int]) -> None:
        for plot, top, bottom in self._plots:
            if isinstance(plot, Heat):
                cells = Image.fromarray(plot.values.T.astype(np.float32))
                size = self.right - self.left, bottom - top
                shown = np.asarray(cells.resize(size, Image.Resampling.BOX))  # means where it shrinks
                colours = paint(shown, plot.low, plot.high, plot.colours)
                if plot.dimmed is not None:
                    rows = np.arange(size[1]) * len(plot.dimmed) // size[1]  # of each pixel
                    darker = np.asarray(plot.dimmed)[rows]
                    colours[darker] = PAPER + (colours[darker] - np.array(PAPER, float)) * _DIMMED
                self.paste(colours, self.left, top)
                self._dots(plot, top, bottom)
                self._bands(plot, top, bottom)
            else:
                self._curve(plot, starts, top, bottom)
            for x in (self.edges[t] for t in starts):
                # Dark beside light: visible on every background.
                self.draw.line((x - 1, top, x - 1, bottom - 1), PAPER)
                self.draw.line((x, top, x, bottom - 1), INK)

    def _dots(self, plot: Heat, top: int, bottom: int) -> None:
        row_height = (bottom - top) / plot.values.shape[1]
        radius = min(0.22 * (self.edges[1] - self.left), 0.22 * row_height, 5)
        if plot.marks is None or radius < 1.2:  # too small to see
            return
        for t, row in np.argwhere(plot.marks):
            centre = ((self.edges[t] + self.edges[t + 1]) / 2, top + (row + 0.5) * row_height)
            self.draw.circle(centre, radius, ORANGE, PAPER, 1)

    def _curve(self, plot: Curve, starts: list[int], top: int, bottom: int) -> None:
        bars = np.zeros(0) if plot.bars is None else plot.bars
        for t in np.flatnonzero(bars):
            low, high = sorted(_y(plot, value, top, bottom) for value in (0, bars[t]))
            last = max(self.edges[t + 1] - 1, self.edges[t] + 1)
            self.draw.rectangle((self.edges[t], low, last, high), BLUE)
        ys = _y(plot, plot.values, top, bottom)
        for first, end in pairwise([0, *starts, self.n_steps]):
            points = []
            for t in range(first, end):
                left, right = self.edges[t : t + 2]
                points += [(left, ys[t]), (max(right - 1, left), ys[t])]
            self.draw.line(points, plot.colour, 2)


def _y(plot: Curve, values: Any, top: int, bottom: int) -> Any:
    """Return where values of a curve lie, in pixels from the top."""
    return np.interp(values, (plot.low, plot.high), (bottom - 2, top + 2))
