"""Text and action symbols, in the font that comes with Pillow: films look the same on every machine."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from srwm_rl.scripts.video.colours import INK, PAPER, Bytes, Colour

Anchor = Literal["l", "m", "r"]
SMALLEST = 11  # font size in pixels that can still be read in a video

ARROWS = {
    "left-down": (-1, 1), "left": (-1, 0), "left-up": (-1, -1), "down": (0, 1), "up": (0, -1),
    "right-down": (1, 1), "right": (1, 0), "right-up": (1, -1),
}  # fmt: skip
"""Actions that are drawn as an arrow, and its direction."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font; `size` is in pixels."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels bring FreeType
    return font


def printable(text: str) -> str:
    """Replace the characters that the font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def text_width(text: str, size: int) -> float:
    """Return the width of a text in pixels."""
    return font(size).getlength(printable(text))


def fit(text: str, size: int, max_width: float) -> str:
    """Replace the middle of a text by "..." unless its width is at most `max_width` pixels."""
    short, n_kept = text, len(text)
    while n_kept > 2 and text_width(short, size) > max_width:
        n_kept -= 1
        short = f"{text[: (n_kept + 1) // 2]}...{text[len(text) - n_kept // 2 :]}"
    return short


class Canvas:
    """A picture to draw on. Coordinates are in pixels from the top left; `y` of a text is its vertical middle."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)

    @classmethod
    def blank(cls, size: tuple[int, int]) -> Canvas:
        """Return an empty canvas."""
        return cls(Image.new("RGB", size, PAPER))

    def pixels(self) -> Bytes:
        """Return the picture, `[height, width, 3]`."""
        return np.asarray(self.image)

    def text(self, x: float, y: float, text: str, size: int = 13, colour: Colour = INK, anchor: Anchor = "l") -> None:
        """Write a line of text."""
        self.draw.text((x, y), printable(text), colour, font(size), anchor=f"{anchor}m")

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour, width: int = 1) -> None:
        """Draw a straight line."""
        self.draw.line([start, end], colour, width)

    def action(self, x: float, y: float, name: str, size: int, colour: Colour, anchor: Anchor = "m") -> None:
        """Draw an action: an arrow for a direction, a dot for "no-op", else its name."""
        centre = x + {"l": size / 2, "m": 0, "r": -size / 2}[anchor]
        if name in ARROWS:
            self._arrow(centre, y, ARROWS[name], size * 0.42, colour)
        elif name == "no-op":
            self.draw.circle((centre, y), max(1.0, size * 0.12), colour)
        else:
            self.text(x, y, name, size, colour, anchor)

    def _arrow(self, x: float, y: float, direction: tuple[int, int], radius: float, colour: Colour) -> None:
        length = (direction[0] ** 2 + direction[1] ** 2) ** 0.5
        dx, dy = direction[0] / length * radius, direction[1] / length * radius
        tip, head, width = (x + dx, y + dy), 0.8, 1 if radius < 5 else 2
        self.line((x - dx, y - dy), tip, colour, width)
        for side in (-1, 1):
            self.line(tip, (x + dx - head * (dx - side * dy), y + dy - head * (dy + side * dx)), colour, width)
