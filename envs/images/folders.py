"""Folders of images by class: `root/{train,val,test}/class/*.png`, and Omniglot as it is distributed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from srwm_rl.envs.images.image_files import SUFFIXES, read_image
from srwm_rl.envs.images.image_set import SPLITS, ImageArray, ImageSet, turned
from srwm_rl.errors import UserError

OMNIGLOT = ("images_background", "images_evaluation")
OMNIGLOT_SIZE = 28
VALIDATION_ALPHABETS = 5
MAX_TOTAL_BYTES = 2**32
_PICKLES = (".pkl", ".pickle")
_UNPACK = "a pickle can run code when it is read; unpack it to root/{train,val,test}/class/*.png, see docs/fewshot.md"


def load_folder(name: str, size: int = 0) -> ImageSet:
    """Return the images of a folder.

    Omniglot's `images_background` gives the training and, by its last five alphabets, the validation classes,
    `images_evaluation` those of the test; each class turned by 90, 180 and 270 degrees is a further class of the same
    split, and strokes are white on black, 28 x 28 unless `size` says otherwise.

    Args:
        name: The folder, a path.
        size: Height and width that images are scaled to; 0: as they are.

    Raises:
        UserError: If the folder has another structure, splits overlap, images differ in size, or one cannot be used.
    """
    root = Path(name).expanduser()
    if root.suffix in _PICKLES and root.exists():
        raise UserError(f"data {name}: {_UNPACK}")
    if not root.is_dir():
        raise UserError(f"there is no data {name!r}: give glyphs, digits or a folder")
    if all((root / part).is_dir() for part in OMNIGLOT):
        return _load_omniglot(root, size or OMNIGLOT_SIZE)
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    if missing and any(path.suffix in _PICKLES for path in root.iterdir()):
        raise UserError(f"data {name}: {_UNPACK}")
    if missing:
        raise UserError(
            f"{root} has no folder {missing[0]}; it must hold train/, val/ and test/, each with its classes"
        )
    splits = [_folders(root / split) for split in SPLITS]
    _check_names(root, splits)
    budget = _Budget()
    loaded = [[_read_class(folder, size, budget) for folder in folders] for folders in splits]
    _check_images(splits, loaded)
    return _image_set(loaded)


def _folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder by name; hidden ones are left out."""
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
    if not paths:
        raise UserError(f"{folder} has no folders; it must have one per class")
    return sorted(paths)


def _image_files(folder: Path) -> list[Path]:
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no images (.png, .jpg, .jpeg); add some, or remove the folder")
    return [folder / name for name in names]


def _read_class(folder: Path, size: int, budget: _Budget) -> ImageArray:
    """Return the images of a class, `[n, height, width, channels]`."""
    files = _image_files(folder)
    images = []
    for path in files:
        images.append(read_image(path, size))
        budget.add(path, images[-1])
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])


class _Budget:
    """Checks while a folder is read that its images have one size and fit into memory."""

    def __init__(self) -> None:
        self._total = 0
        self._first: tuple[Path, tuple[int, ...]] | None = None

    def add(self, path: Path, image: ImageArray) -> None:
        """Count an image.

        Raises:
            UserError: If it has another size than the first, or they are too large together.
        """
        self._total += image.nbytes
        self._first = self._first or (path, image.shape)
        other, (height, width, _) = self._first
        if image.shape[:2] != (height, width):
            raise UserError(
                f"{path} has {image.shape[1]} x {image.shape[0]} pixels, {other} has {width} x {height}; make them "
                "equal, or scale all, as with size:28"
            )
        if self._total > MAX_TOTAL_BYTES:
            raise UserError(
                f"the images take more than {MAX_TOTAL_BYTES:,} bytes of memory; scale them, as with size:28"
            )


def _check_names(root: Path, splits: Iterable[list[Path]]) -> None:
    owner: dict[str, str] = {}
    for split, folders in zip(SPLITS, splits, strict=True):
        for folder in folders:
            other = owner.setdefault(folder.name, split)
            if other != split:
                raise UserError(
                    f"{root} has the class {folder.name!r} in {other} and in {split}; splits must not share classes"
                )


def _check_images(splits: list[list[Path]], loaded: list[list[ImageArray]]) -> None:
    """Raise a UserError if an image is in two splits."""
    owner: dict[bytes, tuple[int, Path]] = {}
    for split, (folders, classes) in enumerate(zip(splits, loaded, strict=True)):
        for folder, images in zip(folders, classes, strict=True):
            for path, image in zip(_image_files(folder), images, strict=True):
                other, twin = owner.setdefault(hashlib.sha256(image.tobytes()).digest(), (split, path))
                if other != split:
                    raise UserError(f"{path} is the same image as {twin}; splits must not share images")


def _image_set(loaded: list[list[ImageArray]]) -> ImageSet:
    """Return classes as a set; grey classes get as many channels as coloured ones."""
    channels = max(images.shape[3] for classes in loaded for images in classes)
    return ImageSet.from_classes(
        [[np.broadcast_to(images, (*images.shape[:3], channels)) for images in classes] for classes in loaded]
    )


def _load_omniglot(root: Path, size: int) -> ImageSet:
    background, evaluation = (_folders(root / part) for part in OMNIGLOT)
    n_train = len(background) - VALIDATION_ALPHABETS
    if n_train < 1:
        raise UserError(
            f"{root / OMNIGLOT[0]} has {len(background)} alphabets; {VALIDATION_ALPHABETS} are for validation, so that "
            "more are needed"
        )
    budget = _Budget()
    splits: list[list[ImageArray]] = []
    for alphabets in (background[:n_train], background[n_train:], evaluation):
        characters = [folder for alphabet in alphabets for folder in _folders(alphabet)]
        classes = [~_read_class(folder, size, budget) for folder in characters]  # white on black
        splits.append(turned(classes))
    return _image_set(splits)
