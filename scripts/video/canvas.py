"""Text in matplotlib's own font, which has arrows for actions: films look the same on every machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from srwm_rl.scripts.video.colours import INK, PAPER, Bytes, Colour

SMALLEST = 11  # font size in pixels that can still be read in a video


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font; `size` is in pixels."""
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
