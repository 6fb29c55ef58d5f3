"""Colours, text and the canvas of films: for a dark background, and the same on every machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap, Normalize
from PIL import Image, ImageDraw, ImageFont

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

COLOUR_MAPS: dict[str, tuple[str, ...]] = {  # each varies in lightness, for colour-blind viewers
    "ember": ("#1a1e26", "#46265e", "#a03a5f", "#e8813f", "#fdf0a6"),
    "sea": ("#1a1e26", "#1d4068", "#21808d", "#7cc48a", "#f4f7c2"),
    "grey": ("#1a1e26", "#5b6570", "#a5b0ba", "#f2f5f7"),
    "poles": ("#8fd0ff", "#2f7fc2", "#232a33", "#c0702a", "#ffd08a"),  # diverging
}
SMALLEST = 11  # font size in pixels that can still be read in a video


def paint(values: npt.NDArray, low: float, high: float, name: str) -> Bytes:
    """Map numbers `[...]` between `low` and `high` to the colours of a map, `[..., 3]`."""
    colour_map = LinearSegmentedColormap.from_list(name, COLOUR_MAPS[name])
    colours: Bytes = colour_map(Normalize(low, high)(values), bytes=True)
    return colours[..., :3]


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which has arrows for actions; `size` is in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size - 1)


def fit(text: str, size: int, max_width: float) -> str:
    """Replace the middle of a text by "..." unless its width is at most `max_width` pixels."""
    short, n_kept = text, len(text)
    while n_kept > 2 and font(size).getlength(short) > max_width:
        n_kept -= 1
        short = f"{text[: (n_kept + 1) // 2]}...{text[len(text) - n_kept // 2 :]}"
    return short


class Canvas:
    """A picture to draw on. Coordinates are in pixels from the top left; `y` of a text is its vertical middle."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def pixels(self) -> Bytes:
        """Return the picture, `[height, width, 3]`."""
        return np.asarray(self.image)

    def paste(self, picture: Bytes, left: int, top: int) -> None:
        """Put another picture on this one."""
        self.image.paste(Image.fromarray(picture), (left, top))

    def text(
        self, x: float, y: float, text: str, size: int = 13, colour: Colour = INK, anchor: Literal["l", "m", "r"] = "l"
    ) -> None:
        """Write a line of text."""
        self.draw.text((x, y), text, colour, font(size), anchor=f"{anchor}m")
