"""scikit-learn's handwritten digits: ten classes, 8 x 8 pixels, scaled to 28 x 28."""

from __future__ import annotations

import numpy as np

from srwm_rl.envs.images.image_files import resized
from srwm_rl.envs.images.image_set import ImageArray, ImageSet
from srwm_rl.lazy import import_optional

SIZE = 28
ENDS = (0.6, 0.8)  # of the training and the validation images of each class


def load_digits() -> ImageSet:
    """Return the digits, split by image: 60% of each class's for training, then 20% for validation, 20% for the test.

    The images are in the order of their writers, which a split into consecutive blocks keeps apart. All splits have
    the same ten classes: with five for training and five for the test, nothing can be learned (too few classes).

    Raises:
        UserError: If scikit-learn is not installed or cannot be imported.
    """
    digits = import_optional("sklearn.datasets", "data 'digits'", "'srwm-rl[digits]'").load_digits()
    pixels = np.minimum(digits.images * 16, 255).astype(np.uint8)  # 0 .. 16 before
    images = resized(pixels[..., None], SIZE)
    return ImageSet.from_classes(list(zip(*(_blocks(images[digits.target == i]) for i in range(10)), strict=True)))


def _blocks(images: ImageArray) -> list[ImageArray]:
    return np.split(images, [int(len(images) * end) for end in ENDS])
