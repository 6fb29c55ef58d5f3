"""Glyphs of the fonts that matplotlib ships, drawn by 20 drawers each: 28 x 28 images of about 2,000 classes.

The classes are listed in `glyph_classes.json`, split by script, so that the classes of an evaluation are of alphabets
that were never trained on. `python -m srwm_rl.envs.images.list_glyphs` wrote the list.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from srwm_rl.envs.levels import hash_uniform
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small

Images = npt.NDArray[np.uint8]
CLASSES = Path(__file__).with_name("glyph_classes.json")
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBol.ttf",
)
N_DRAWERS = 20
SIZE = 28
CANVAS = 64  # side of a glyph before it is distorted
VERSION = 1  # of what is drawn: part of the cache's name
# Of all images as they were drawn with FreeType 2.14.3. Another version may draw some pixels differently.
SHA256 = "e06747c5023151844a59cff4dfab46f509d4f554aa3fd9492d96ce5c0e9a7bb7"


def splits() -> dict[str, str]:
    """Return the characters of each split: train, val, test."""
    chosen: dict[str, str] = json.loads(CLASSES.read_text())
    return chosen


@cache
def glyph_images() -> dict[str, Images]:
    """Return the images of each split, uint8 `[classes, 20, 28, 28]`, white on black; drawn once, then cached."""
    chosen = splits()
    images = _cached(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srwm-rl", "".join(chosen.values())
    )
    if hashlib.sha256(images.tobytes()).hexdigest() != SHA256:
        warnings.warn(
            "this machine draws the glyphs differently (another version of FreeType or of matplotlib's fonts): "
            "accuracies may differ slightly from published ones",
            stacklevel=2,
        )
    stops = np.cumsum([len(characters) for characters in chosen.values()])
    return dict(zip(chosen, np.split(images, stops[:-1]), strict=True))


def _cached(folder: Path, characters: str) -> Images:
    """Return the drawn images from the cache, or draw them and try to store them there."""
    path = folder / f"glyphs-{VERSION}.npy"
    shape = (len(characters), N_DRAWERS, SIZE, SIZE)
    size = int(np.prod(shape)) + 160
    with suppress(UserError):  # there is none, or it cannot be read
        content = read_small(path, size)
        if len(content) == size:
            digest, images = content[:32], np.frombuffer(content[160:], np.uint8).reshape(shape)
            if hashlib.sha256(images.tobytes()).digest() == digest:
                return images
    images = draw(characters)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(hashlib.sha256(images.tobytes()).digest().ljust(160, b"\0") + images.tobytes())
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the glyphs are drawn anew every time: {path} cannot be written ({error})", stacklevel=2)
    return images


def draw(characters: str) -> Images:
    """Draw characters with every drawer, uint8 `[len(characters), 20, 28, 28]`."""
    fonts = [_load(name) for name in FONTS]
    plain = [np.stack([raster(char, font) for font, known in fonts if ord(char) in known]) for char in characters]
    numbers = np.arange(len(characters))
    images = np.zeros((len(characters), N_DRAWERS, SIZE, SIZE), np.uint8)
    for drawer in range(N_DRAWERS):
        rasters = np.stack([of_fonts[drawer % len(of_fonts)] for of_fonts in plain])  # [n, CANVAS, CANVAS]
        pens = (hash_uniform(drawer, 0, numbers) * 3).astype(np.int64)
        for width in (1, 2):
            rasters[pens >= width] = _thicken(rasters[pens >= width])
        images[:, drawer] = _distort(rasters, drawer)
    return images


def _thicken(rasters: Images) -> Images:
    """Return rasters `[n, CANVAS, CANVAS]` whose lines are two pixels wider."""
    for axis in (1, 2):
        rasters = np.maximum(rasters, np.maximum(np.roll(rasters, 1, axis), np.roll(rasters, -1, axis)))
    return rasters


def raster(char: str, font: ImageFont.FreeTypeFont) -> Images:
    """Draw a character as large as fits into the canvas's middle, uint8 `[CANVAS, CANVAS]`."""
    left, top, right, bottom = font.getbbox(char)
    width, height = max(1, int(right - left)), max(1, int(bottom - top))
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((-left, -top), char, 255, font)
    scale = (CANVAS - 16) / max(width, height)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(canvas)


def _distort(rasters: Images, drawer: int) -> Images:
    """Turn, scale, shear and bend each raster `[n, CANVAS, CANVAS]` in a drawer's way; return `[n, 28, 28]`."""
    n = len(rasters)
    # Between -1 and 1: angle, scale, shear, 2 shifts, then amplitude and phase of one wave per direction.
    luck = 2 * hash_uniform(drawer, 1, np.arange(n)[:, None], np.arange(9)) - 1
    angle, scale, shear, dx, dy, bend_x, bend_y, phase_x, phase_y = (luck[:, i, None, None] for i in range(9))
    v, u = np.meshgrid(*[np.linspace(-1, 1, SIZE)] * 2, indexing="ij")  # [28, 28]
    u = u + 0.06 * bend_x * np.sin(np.pi * (v + phase_x))  # [n, 28, 28]
    v = v + 0.06 * bend_y * np.sin(np.pi * (u + phase_y))
    cos, sin, zoom = np.cos(0.2 * angle), np.sin(0.2 * angle), 1 + 0.12 * scale
    x = zoom * (cos * u - sin * v + 0.2 * shear * v) + 0.08 * dx
    y = zoom * (sin * u + cos * v) + 0.08 * dy
    return _sample(rasters, x, y)


def _sample(rasters: Images, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Images:
    """Sample rasters bilinearly at `[n, 28, 28]` coordinates in [-1, 1]."""
    column, row = ((np.clip(part, -1, 1) + 1) * (CANVAS - 1) / 2 for part in (x, y))
    left, top = (np.minimum(part.astype(np.int64), CANVAS - 2) for part in (column, row))
    a, b, index = column - left, row - top, np.arange(len(rasters))[:, None, None]
    corners = [rasters[index, top + i, left + j].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    upper, lower = corners[0] * (1 - a) + corners[1] * a, corners[2] * (1 - a) + corners[3] * a
    pixels: Images = np.round(upper * (1 - b) + lower * b).astype(np.uint8)
    return pixels


def _load(name: str) -> tuple[ImageFont.FreeTypeFont, frozenset[int]]:
    """Return a font of matplotlib's and the code points that it has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(io.BytesIO(path.read_bytes()), 48), frozenset(FT2Font(str(path)).get_charmap())
