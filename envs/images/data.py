"""Sets of images by class and split, each loaded once in a process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from srwm_rl.envs.images.image_set import Classes, ImageArray, ImageSet, turned
from srwm_rl.errors import UserError


@lru_cache(maxsize=4)
def load_images(name: str, size: int = 0) -> ImageSet:
    """Return a set of images.

    Args:
        name: "glyphs", "digits", or a folder, see `srwm_rl.envs.images.folders`.
        size: Height and width that images are scaled to; 0: as they are (28 for glyphs, digits and Omniglot).

    Raises:
        UserError: If there is no such set, or its files cannot be used.
    """
    if name == "glyphs":
        from srwm_rl.envs.images.glyphs import glyph_images

        train, *held_out = (list(classes[..., None]) for classes in glyph_images().values())
        images = ImageSet.from_classes([turned(train), *held_out])
    elif name == "digits":
        from srwm_rl.envs.images.digits import load_digits

        images = load_digits()
    else:
        from srwm_rl.envs.images.folders import load_folder

        return load_folder(name, size)
    if size not in (0, images.images.shape[1]):
        from srwm_rl.envs.images.image_files import resized

        images = images._replace(images=resized(images.images, size))
    return images


def load_together(names: Sequence[str], size: int = 0) -> tuple[ImageArray, list[tuple[Classes, ...]], str]:
    """Return the images of several sets in one array, the classes of each set's splits, and a fingerprint.

    Grey images get as many channels as coloured ones beside them.

    Raises:
        UserError: If a set cannot be loaded, or the images differ in size.
    """
    sets = [load_images(name, size) for name in names]
    if len({images.images.shape[1:3] for images in sets}) > 1:
        sizes = ", ".join(
            f"{name} {s.images.shape[2]} x {s.images.shape[1]}" for name, s in zip(names, sets, strict=True)
        )
        raise UserError(f"the data sets' images differ in size ({sizes}); give one size, as size:28")
    fingerprint = " ".join(images.fingerprint() for images in sets)
    if len(sets) == 1:
        return sets[0].images, [sets[0].splits], fingerprint
    channels = max(images.images.shape[3] for images in sets)
    images = [np.broadcast_to(s.images, (*s.images.shape[:3], channels)) for s in sets]
    offsets = np.cumsum([0, *(len(s.images) for s in sets[:-1])])
    splits = [
        tuple(Classes(classes.starts + offset, classes.counts) for classes in s.splits)
        for s, offset in zip(sets, offsets, strict=True)
    ]
    return np.concatenate(images), splits, fingerprint
