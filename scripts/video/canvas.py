"""Text and signs on pictures, in the one font that comes with Pillow, so that every machine draws the same."""

from __future__ import annotations

from functools import cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from srwm_rl.scripts.video.colours import INK, PAPER, Colour

Anchor = Literal["l", "m", "r"]
SMALLEST = 11  # of letters that can be read in a video, in pixels

ARROWS = {
    "left-down": (-1, 1), "left": (-1, 0), "left-up": (-1, -1), "down": (0, 1), "up": (0, -1),
    "right-down": (1, 1), "right": (1, 0), "right-up": (1, -1),
}  # fmt: skip
"""Directions that are drawn as an arrow."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font at a size in pixels."""
    made = ImageFont.load_default(size)
    assert isinstance(made, ImageFont.FreeTypeFont)  # Pillow's wheels bring FreeType
    return made


def plain(text: str) -> str:
    """Replace what the font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def width(text: str, size: int) -> float:
    """Return how many pixels a text takes."""
    return font(size).getlength(plain(text))


def fit(text: str, size: int, room: float) -> str:
    """Shorten a text in its middle until it fits into `room` pixels."""
    if width(text, size) <= room:
        return text
    kept = len(text)
    while kept > 2 and width(_shortened(text, kept), size) > room:
        kept -= 1
    return _shortened(text, kept)


def _shortened(text: str, kept: int) -> str:
    return f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"


class Canvas:
    """A picture to draw on; places are in pixels from the top left, texts are placed by the middle of their height."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)

    @classmethod
    def blank(cls, size: tuple[int, int], colour: Colour = PAPER) -> Canvas:
        """Return an empty one."""
        return cls(Image.new("RGB", size, colour))

    def text(self, x: float, y: float, text: str, size: int = 13, colour: Colour = INK, anchor: Anchor = "l") -> None:
        """Write a line."""
        self.draw.text((x, y), plain(text), colour, font(size), anchor=f"{anchor}m")

    def sign(self, x: float, y: float, name: str, size: int, colour: Colour, anchor: Anchor = "m") -> None:
        """Draw an action's sign: an arrow for a direction, a dot for doing nothing, else its name."""
        if name in ARROWS:
            shift = {"l": size / 2, "m": 0, "r": -size / 2}[anchor]
            self._arrow(x + shift, y, ARROWS[name], size * 0.42, colour)
        elif name == "no-op":
            shift = {"l": size / 2, "m": 0, "r": -size / 2}[anchor]
            self.draw.circle((x + shift, y), max(1.0, size * 0.12), colour)
        else:
            self.text(x, y, name, size, colour, anchor)

    def _arrow(self, x: float, y: float, way: tuple[int, int], reach: float, colour: Colour) -> None:
        length = (way[0] ** 2 + way[1] ** 2) ** 0.5
        dx, dy = way[0] / length * reach, way[1] / length * reach
        tip, wing = (x + dx, y + dy), 0.8
        line = 1 if reach < 5 else 2
        self.draw.line([(x - dx, y - dy), tip], colour, line)
        for side in (-1, 1):
            back = (x + dx - wing * (dx - side * dy), y + dy - wing * (dy + side * dx))
            self.draw.line([tip, back], colour, line)
