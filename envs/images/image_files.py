"""Image files, which are not trusted: what they are and how large is checked before they are decoded."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from srwm_rl.envs.images.image_set import ImageArray
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small

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
    content = read_small(path, MAX_BYTES)
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
