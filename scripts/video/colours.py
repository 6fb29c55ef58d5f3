"""Colours of films, for a dark background; every colour map varies in lightness, for colour-blind viewers."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap

Colour = tuple[int, int, int]
Bytes = npt.NDArray[np.uint8]

PAPER: Colour = (14, 17, 21)  # background
EMPTY: Colour = (22, 26, 31)  # of a plot without data
RULE: Colour = (58, 66, 75)
DIM: Colour = (150, 160, 170)
INK: Colour = (234, 237, 240)
ORANGE: Colour = (245, 166, 72)
BLUE: Colour = (98, 178, 232)
GREEN: Colour = (110, 205, 150)

COLOUR_MAPS: dict[str, tuple[str, ...]] = {
    "ember": ("#1a1e26", "#46265e", "#a03a5f", "#e8813f", "#fdf0a6"),
    "sea": ("#1a1e26", "#1d4068", "#21808d", "#7cc48a", "#f4f7c2"),
    "grey": ("#1a1e26", "#5b6570", "#a5b0ba", "#f2f5f7"),
    "poles": ("#8fd0ff", "#2f7fc2", "#232a33", "#c0702a", "#ffd08a"),  # diverging
}


@cache
def colour_map(name: str) -> Bytes:
    """Return a colour map, `[256, 3]`."""
    table: Bytes = LinearSegmentedColormap.from_list(name, COLOUR_MAPS[name])(np.arange(256), bytes=True)
    return table[:, :3]


def paint(values: npt.NDArray, low: float, high: float, name: str) -> Bytes:
    """Map numbers `[...]` between `low` and `high` to colours, `[..., 3]`."""
    fraction = (np.asarray(values, np.float64) - low) / (high - low if high > low else 1.0)
    colours: Bytes = colour_map(name)[np.round(np.nan_to_num(fraction).clip(0, 1) * 255).astype(np.int64)]
    return colours
