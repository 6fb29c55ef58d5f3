"""`srwm-rl fewshot --data FOLDER`: folders that cannot be used are refused in one line, before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def too_few_classes(root: Path) -> None:
    for i in range(2, 6):
        shutil.rmtree(root / "test" / f"test{i}")


def too_few_images(root: Path) -> None:
    for j in range(3, 12):
        (root / "val" / "val2" / f"{j}.png").unlink()


def mixed_sizes(root: Path) -> None:
    Image.new("L", (9, 8)).save(root / "train" / "train3" / "4.png")


def damaged(root: Path) -> None:
    path = root / "val" / "val1" / "7.png"
    path.write_bytes(path.read_bytes()[:50])


def pickled(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "mini-imagenet-cache-val.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")


def same_image(root: Path) -> None:
    shutil.copy(root / "train" / "train0" / "0.png", root / "test" / "test0" / "x.png")


def same_class(root: Path) -> None:
    shutil.copytree(root / "train" / "train0", root / "test" / "train0")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (too_few_classes, "has 2 test classes; use at most as many ways, not 5"),
        (too_few_images, "has a val class of 3 images, fewer than shots + queries (4)"),
        (mixed_sizes, "train/train3/4.png has 9 x 8 pixels"),
        (damaged, "val/val1/7.png: it is damaged, or no PNG or JPEG image; repair or remove it"),
        (pickled, "unpack it to root/{train,val,test}/class/*.png, see docs/fewshot.md"),
        (same_image, "splits must not share images"),
        (same_class, "splits must not share classes"),
        (lambda root: shutil.rmtree(root), "there is no data"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_that_cannot_be_used_is_one_line(
    call: Any,
    few_shot_folder: Path,
    tmp_path: Path,
    untouched: Path,
    change: Callable[[Path], None],
    says: str,
    dry: bool,
) -> None:
    root = tmp_path / "images"
    shutil.copytree(few_shot_folder, root)
    change(root)
    argv = ("--data", root, "--ways", 5, "--shots", "1:3", "--queries", 1, "-f", untouched, "--n-threads", 1)
    assert says in call("fewshot", *argv, *["--dry-run"] * dry).error()


def test_the_pickle_itself_is_not_read(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "a pickle can run code when it is read; unpack it" in call("fewshot", "--data", path, "--dry-run").error()
