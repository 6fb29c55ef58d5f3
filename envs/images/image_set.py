"""What a set of images is: images by class, and classes by split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.levels import IntArray

ImageArray = npt.NDArray[np.uint8]
SPLITS = ("train", "val", "test")


class Classes(NamedTuple):
    """The classes of one split: class i has the images `starts[i] .. starts[i] + counts[i] - 1` of the set."""

    starts: IntArray
    counts: IntArray


class ImageSet(NamedTuple):
    """Images by class: `images` `[M, height, width, channels]`, and the classes of each of `SPLITS`."""

    images: ImageArray
    splits: tuple[Classes, ...]

    @classmethod
    def from_classes(cls, splits: Sequence[Sequence[ImageArray]]) -> ImageSet:
        """Make a set from the images of every class, `[count, height, width, channels]`, by split."""
        counts = [np.array([len(images) for images in classes], np.int64) for classes in splits]
        stops = np.cumsum(np.concatenate(counts))
        starts = np.split(stops - np.concatenate(counts), np.cumsum([len(count) for count in counts])[:-1])
        images = np.concatenate([images for classes in splits for images in classes])
        return cls(images, tuple(map(Classes, starts, counts)))

    def fingerprint(self) -> str:
        """Return a hash of the classes and their sizes."""
        content = b"".join(array.tobytes() for split in self.splits for array in split)
        return hashlib.sha256(repr(self.images.shape).encode() + content).hexdigest()[:16]


def turned(classes: Sequence[ImageArray]) -> list[ImageArray]:
    """Return classes, `[count, height, width, channels]` each, as they are and turned by 90, 180 and 270 degrees."""
    return [np.rot90(images, turns, (1, 2)) for images in classes for turns in range(4)]
