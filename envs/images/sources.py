"""Sources of image classes by name: `SOURCES` and folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.images.glyphs import glyph_images
from srwm_rl.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test")


class ImageClasses(NamedTuple):
    """Images of several classes: those of class c are `images[first[c] : first[c] + count[c]]`."""

    images: npt.NDArray[np.uint8]  # [n, height, width, channels]
    first: npt.NDArray[np.int64]  # [classes]
    count: npt.NDArray[np.int64]  # [classes]


SOURCES: dict[str, Callable[[], dict[str, ImageClasses]]] = {}


def image_classes(name: str) -> dict[str, ImageClasses]:
    """Return the classes of each split, `SPLITS`, of a source or a folder.

    Raises:
        UserError: there is no such source or folder, or it cannot be used.
    """
    if name in SOURCES:
        return SOURCES[name]()
    raise UserError(f"there are no images {name!r}{did_you_mean(name, SOURCES)}; or give a folder")


def same_counts(images: npt.NDArray[np.uint8]) -> ImageClasses:
    """Return classes of equally many images, `[classes, n, height, width]` or with channels."""
    classes, n = images.shape[:2]
    flat = images.reshape(classes * n, *images.shape[2:])
    return ImageClasses(flat if flat.ndim == 4 else flat[..., None], np.arange(classes) * n, np.full(classes, n))


def _glyphs() -> dict[str, ImageClasses]:
    return {split: same_counts(images) for split, images in glyph_images().items()}


SOURCES["glyphs"] = _glyphs
