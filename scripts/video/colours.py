"""Colours for dark pictures. Every map differs in lightness, not in hue alone, so that colour-blind readers see it."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

PAPER: Colour = (14, 17, 21)
EMPTY: Colour = (22, 26, 31)  # of a plot before anything is drawn
RULE: Colour = (58, 66, 75)
DIM: Colour = (150, 160, 170)
INK: Colour = (234, 237, 240)
ORANGE: Colour = (245, 166, 72)
BLUE: Colour = (98, 178, 232)
GREEN: Colour = (110, 205, 150)

RAMPS: dict[str, tuple[str, ...]] = {
    "ember": ("1a1e26", "46265e", "a03a5f", "e8813f", "fdf0a6"),
    "sea": ("1a1e26", "1d4068", "21808d", "7cc48a", "f4f7c2"),
    "grey": ("1a1e26", "5b6570", "a5b0ba", "f2f5f7"),
    "poles": ("8fd0ff", "2f7fc2", "232a33", "c0702a", "ffd08a"),  # below and above a middle
}

# Björn Ottosson's OKLab, https://bottosson.github.io/posts/oklab: distances in it are about as large as they look.
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(rgb: npt.NDArray) -> Floats:
    """Map sRGB bytes `[..., 3]` to OKLab `[..., 3]`: lightness in 0 .. 1, then two axes of hue."""
    share = np.asarray(rgb, np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    lab: Floats = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def _from_oklab(lab: Floats) -> Bytes:
    linear = ((lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T).clip(0, 1)
    share = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb: Bytes = np.round(share.clip(0, 1) * 255).astype(np.uint8)
    return rgb


@cache
def ramp(name: str) -> Bytes:
    """Return a colour map, `[256, 3]`."""
    stops = to_oklab(np.array([list(bytes.fromhex(each)) for each in RAMPS[name]]))
    where = np.linspace(0, len(stops) - 1, 256)
    lab = np.stack([np.interp(where, np.arange(len(stops)), stops[:, axis]) for axis in range(3)], -1)
    return _from_oklab(lab)


def paint(values: npt.NDArray, low: float, high: float, name: str) -> Bytes:
    """Colour numbers `[...]` by their place between `low` and `high`: `[..., 3]`."""
    share = (np.asarray(values, np.float64) - low) / (high - low if high > low else 1.0)
    colours: Bytes = ramp(name)[np.round(np.nan_to_num(share).clip(0, 1) * 255).astype(np.int64)]
    return colours
