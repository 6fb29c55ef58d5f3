"""Write `glyph_classes.json`: which characters are classes, and of which split. Run once, by a developer.

A character is a class if the fonts have it, it has no decomposition, and it looks like no other one (cosine of the
blurred rasters below 0.9). Scripts decide the split.
"""

from __future__ import annotations

import json
import unicodedata

import numpy as np
from PIL import ImageFont
from scipy.ndimage import gaussian_filter

from srwm_rl.envs.images.glyphs import CLASSES, FONTS, _load, raster

VALIDATION = ("CYRILLIC", "GREEK", "COPTIC")
TEST = ("GEORGIAN", "ARABIC", "ARMENIAN", "LAO", "NKO", "TIFINAGH", "HEBREW", "OGHAM", "OLD ITALIC", "LISU")
SIMILAR = 0.9
LEFT_OUT = ("BRAILLE", "COMBINING", "VARIATION SELECTOR")


def main() -> None:
    """Choose the classes and write the list."""
    fonts = [_load(name) for name in FONTS]
    points = sorted(set().union(*(known for _, known in fonts)))
    characters = [chr(point) for point in points if _is_candidate(chr(point))]
    shapes = np.stack([_shape(char, next(font for font, known in fonts if ord(char) in known)) for char in characters])
    chosen: list[int] = []
    for i, shape in enumerate(shapes):
        if shape.any() and (not chosen or (shapes[chosen] @ shape).max() < SIMILAR):
            chosen.append(i)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for i in chosen:
        splits[_split(characters[i])].append(characters[i])
    CLASSES.write_text(json.dumps({split: "".join(chars) for split, chars in splits.items()}, indent=1) + "\n")
    print({split: len(chars) for split, chars in splits.items()})


def _is_candidate(char: str) -> bool:
    name = unicodedata.name(char, "")
    printable = unicodedata.category(char)[0] in "LNPS"
    return printable and bool(name) and not unicodedata.decomposition(char) and not name.startswith(LEFT_OUT)


def _split(char: str) -> str:
    name = unicodedata.name(char)
    return "val" if name.startswith(VALIDATION) else "test" if name.startswith(TEST) else "train"


def _shape(char: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Return a character's blurred raster as a vector of length 1; zeros where nothing is drawn."""
    image = gaussian_filter(raster(char, font).astype(np.float64), 2.0)[::2, ::2].ravel()
    vector: np.ndarray = image / max(np.linalg.norm(image), 1e-9)
    return vector


if __name__ == "__main__":
    main()
