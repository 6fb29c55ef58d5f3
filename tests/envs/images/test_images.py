"""Sets of images: glyphs and their cache, digits, folders, Omniglot, and files that cannot be used."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from srwm_rl.envs.images import glyphs
from srwm_rl.envs.images.data import load_together
from srwm_rl.envs.images.folders import load_folder
from srwm_rl.envs.images.image_files import read_image
from srwm_rl.errors import UserError


def save(path, seed, shape=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    seed = 0
    for split in ("train", "val", "test"):
        for i in range(3):
            for j in range(2):
                seed += 1
                save(tmp_path / split / f"{split}-{i}" / f"{j}.png", seed)
    return tmp_path


def test_a_folder_is_read(root):
    images, splits = load_folder(str(root))
    assert images.shape == (18, 12, 12, 1)
    assert [split.starts.tolist() for split in splits] == [[0, 2, 4], [6, 8, 10], [12, 14, 16]]
    assert np.array_equal(images[7, :, :, 0], np.asarray(Image.open(root / "val" / "val-0" / "1.png")))
    assert load_folder(str(root), 28).images.shape == (18, 28, 28, 1)


def test_a_coloured_image_gives_all_three_channels(root):
    save(root / "test" / "test-1" / "1.png", 99, (12, 12, 3))
    images, _ = load_folder(str(root))
    assert images.shape == (18, 12, 12, 3)
    assert (images[0] == images[0, :, :, :1]).all()
    together, _, _ = load_together(["glyphs", str(root)], 16)
    assert together.shape[1:] == (16, 16, 3)


def link_fifo(root):
    (root / "train" / "train-0" / "0.png").unlink()
    os.mkfifo(root / "train" / "train-0" / "0.png")


def link_endless(root):
    (root / "train" / "train-0" / "0.png").unlink()
    (root / "train" / "train-0" / "0.png").symlink_to("/dev/zero")


def bomb(root):
    Image.new("1", (5000, 5000)).save(root / "train" / "train-0" / "0.png")


def large(root):
    with open(root / "train" / "train-0" / "0.png", "wb") as file:
        file.truncate(2**25)


def damage(root):
    path = root / "val" / "val-2" / "1.png"
    path.write_bytes(path.read_bytes()[:80])


def empty_class(root):
    (root / "val" / "empty").mkdir()


def same_image(root):
    (root / "test" / "test-0" / "x.png").write_bytes((root / "train" / "train-0" / "0.png").read_bytes())


def same_class(root):
    (root / "train" / "train-1").rename(root / "train" / "test-1")


def no_split(root):
    (root / "val").rename(root / "validation")


def pickle(root):
    no_split(root)
    (root / "mini-imagenet-cache-train.pkl").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (link_fifo, "no regular file"),
        (link_endless, "no regular file"),
        (bomb, "5000 x 5000"),
        (large, "33,554,432 bytes"),
        (damage, "damaged"),
        (empty_class, "no images"),
        (same_image, "is the same image as"),
        (same_class, "splits must not share classes"),
        (no_split, "no folder val"),
        (pickle, "unpack"),
        (lambda root: save(root / "test" / "test-0" / "x.png", 77, (12, 13)), "13 x 12 pixels"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(root, change, text):
    change(root)
    with pytest.raises(UserError, match=text) as error:
        load_folder(str(root))
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused_with_how_to_unpack_it(tmp_path):
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="unpack it to"):
        load_folder(str(path))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    Image.fromarray(np.array([[0, 65535], [256, 32768]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[:, :, 0].tolist() == [[0, 255], [1, 128]]


def omniglot(root, n_alphabets):
    for part, n in (("images_background", n_alphabets), ("images_evaluation", 2)):
        for alphabet in range(n):
            for character in range(2):
                folder = root / part / f"{part}{alphabet}" / f"character{character:02d}"
                folder.mkdir(parents=True)
                for drawer in range(3):
                    pixels = np.ones((105, 105), np.bool_)
                    pixels[10 + alphabet : 15 + alphabet, drawer : drawer + 50 + character] = False
                    Image.fromarray(pixels).save(folder / f"{drawer}.png")


def test_omniglots_layout_is_read_with_rotations_as_classes(tmp_path):
    omniglot(tmp_path, 7)
    images, splits = load_folder(str(tmp_path))
    assert [len(split.starts) for split in splits] == [2 * 2 * 4, 5 * 2 * 4, 2 * 2 * 4]
    assert images.shape[1:] == (28, 28, 1)
    assert images[0].max() > 100  # strokes are white
    assert images[0].mean() < 30
    assert np.array_equal(np.rot90(images[0]), images[3])  # the next class
    omniglot(tmp_path / "few", 5)
    with pytest.raises(UserError, match="alphabets"):
        load_folder(str(tmp_path / "few"))


def test_digits_are_split_by_image():
    pytest.importorskip("sklearn")
    images, (splits,), _ = load_together(["digits"])
    assert images.shape == (1797, 28, 28, 1)
    assert [len(split.starts) for split in splits] == [10, 10, 10]
    assert min(split.counts.min() for split in splits) > 30
    assert len({image.tobytes() for image in images}) > 1700


def test_glyph_classes_are_split_by_script():
    characters = glyphs.splits()
    assert {split: len(chars) for split, chars in characters.items()} == {"train": 1564, "val": 131, "test": 333}
    assert len(set("".join(characters.values()))) == 2028
    assert "Ж" in characters["val"]
    assert "ბ" in characters["test"]
    assert "A" in characters["train"]


def test_classes_of_training_glyphs_are_turned_too():
    images, (splits,), _ = load_together(["glyphs"])
    assert [len(split.starts) for split in splits] == [4 * 1564, 131, 333]
    first, *others = (images[start : start + 20] for start in splits[0].starts[:4])
    for turns, turned in enumerate(others, 1):
        assert np.array_equal(turned, np.rot90(first, turns, (1, 2)))
        assert not np.array_equal(turned, first)


@pytest.fixture
def few_characters(monkeypatch, tmp_path):
    """Make a set of five glyphs with a cache of its own; return how often they were drawn."""
    drawn = []
    draw = glyphs.draw
    monkeypatch.setattr(glyphs, "splits", lambda: {"train": "AK", "val": "Ж", "test": "აბ"})
    monkeypatch.setattr(glyphs, "draw", lambda characters: drawn.append(characters) or draw(characters))
    monkeypatch.setattr(glyphs, "SHA256", hashlib.sha256(draw("AKЖაბ").tobytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return drawn


def test_glyphs_are_drawn_once_and_a_damaged_cache_is_rebuilt(few_characters, tmp_path):
    load = glyphs.glyph_images.__wrapped__
    first = load()
    assert {split: images.shape for split, images in first.items()} == {
        "train": (2, 20, 28, 28),
        "val": (1, 20, 28, 28),
        "test": (2, 20, 28, 28),
    }
    assert np.array_equal(load()["test"], first["test"])
    assert len(few_characters) == 1
    (path,) = (tmp_path / "srwm-rl").iterdir()
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert np.array_equal(load()["train"], first["train"])
    assert len(few_characters) == 2
    path.write_bytes(b"short")
    load(), load()
    assert len(few_characters) == 3


def test_other_drawings_are_used_with_a_warning(few_characters, monkeypatch):
    monkeypatch.setattr(glyphs, "SHA256", "0" * 64)
    with pytest.warns(UserWarning, match="draws the glyphs differently"):
        assert len(glyphs.glyph_images.__wrapped__()["train"]) == 2


def test_a_cache_that_cannot_be_written_is_no_error(few_characters, monkeypatch, tmp_path):
    (tmp_path / "srwm-rl").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(glyphs.glyph_images.__wrapped__()["train"]) == 2
