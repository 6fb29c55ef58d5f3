"""Image files, which are not trusted: what they are and how large is checked before they are decoded."""

from __future__ import annotations

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from srwm_rl.envs.images.image_set import ImageArray
from srwm_rl.errors import UserError

MAX_BYTES = 2**24
MAX_SIDE = 4096
FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L", "LA", "I", "I;16")


def read_image(path: Path, size: int = 0) -> ImageArray:
    """Return a PNG or JPEG file's pixels, `[height, width, 1]` where it is grey, else `[height, width, 3]`.

    Args:
        path: The file.
        size: Height and width that it is scaled to; 0: as it is.

    Raises:
        UserError: If it is no regular file, too large, or no readable image.
    """
    content = _read(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
            if max(image.size) > MAX_SIDE:
                raise UserError(
                    f"cannot read {path}: it has {image.width} x {image.height} pixels, more than {MAX_SIDE}"
                )
            if image.mode.startswith("I"):  # 16 bits; conversion to 8 would clip them
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("L" if image.mode in _GREY else "RGB")
    except UserError:
        raise
    except Exception as error:  # of damaged files Pillow raises a dozen kinds
        raise UserError(f"cannot read {path}: it is damaged, or no PNG or JPEG image; repair or remove it") from error
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return resized(pixels[None], size)[0] if size else pixels


def resized(images: ImageArray, size: int) -> ImageArray:
    """Return images `[n, height, width, channels]` scaled to `[n, size, size, channels]`."""
    if images.shape[1:3] == (size, size):
        return images
    result = np.zeros((len(images), size, size, images.shape[3]), np.uint8)
    for image, target in zip(images, result, strict=True):
        scaled = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize((size, size))
        target[:] = np.asarray(scaled).reshape(target.shape)
    return result


def _read(path: Path) -> bytes:
    try:
        _check_file(path, os.stat(path))  # before it is opened: opening a device can have effects
        # Without O_NONBLOCK, a pipe put there in between would be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            _check_file(path, status)
            return file.read(status.st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is no regular file")
    if status.st_size > MAX_BYTES:
        raise UserError(f"cannot read {path}: it has {status.st_size:,} bytes, more than the {MAX_BYTES:,} of an image")
