"""Files: equal content gives equal bytes; writes are atomic; damage is detected."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import UserError
from srwm_rl.storage.safe_file import pack, read_file, serialise, unpack, write_file

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64), "empty": np.zeros((0, 3))}
ARRAYS["scalar"] = np.array(2.5)


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / "f", ARRAYS, {"x": 1, "y": [1, None]})
    arrays, meta = read_file(tmp_path / "f")
    assert meta == {"x": 1, "y": [1, None]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
    turned = dict(reversed(ARRAYS.items()))
    assert serialise(ARRAYS, {"x": 1, "y": 2}) == serialise(turned, {"y": 2, "x": 1})


def test_every_flipped_bit_raises(tmp_path: Path) -> None:
    blob = serialise(ARRAYS, {"x": 1})
    rng = random.Random(0)
    unnoticed = []
    for _ in range(500):
        position, bit = rng.randrange(len(blob)), rng.randrange(8)
        (tmp_path / "f").write_bytes(blob[:position] + bytes([blob[position] ^ 1 << bit]) + blob[position + 1 :])
        try:
            arrays, meta = read_file(tmp_path / "f")
        except UserError:
            continue
        same = meta == {"x": 1} and all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
        if not same:
            unnoticed.append((position, bit))
    assert not unnoticed


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"[" * 4096])
def test_foreign_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match="no srwm-rl file") as error:
        read_file(tmp_path / "f")
    assert "\n" not in str(error.value)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    blob = serialise(ARRAYS, {"x": 1})
    for length in range(len(blob)):
        (tmp_path / "f").write_bytes(blob[:length])
        with pytest.raises(UserError):
            read_file(tmp_path / "f")


def test_missing_files_and_folders_are_refused() -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_file(Path("there/is/none"))
    with pytest.raises(UserError, match="cannot read"):
        read_file(Path("."))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "f", ARRAYS, {"x": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "f", ARRAYS, {"x": 2})
    monkeypatch.undo()
    assert read_file(tmp_path / "f")[1] == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from srwm_rl.storage.safe_file import write_file
print("ready", flush=True)
n = 0
while True:
    n += 1
    write_file(Path(sys.argv[1]) / f"c-{n % 3}.safetensors", {"a": np.full(200_000, n, np.float32)}, {"n": n})
"""


def test_a_killed_writer_never_leaves_a_broken_file(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05 + 0.1 * rng.random())
            process.send_signal(signal.SIGKILL)
        for path in tmp_path.glob("c-*.safetensors"):
            arrays, meta = read_file(path)
            assert (arrays["a"] == meta["n"]).all()
    assert list(tmp_path.glob("c-*.safetensors"))


def test_trees_survive_packing() -> None:
    tree: dict[str, Any] = {
        "a": {"b": np.arange(3), "c": [1, 2.5, None, "x", True, np.float64(2)]},
        "d": b"\0\1",
        "e": [b"", np.zeros(0)],
        "big": 2**127,
    }
    again = unpack(*pack(tree))
    np.testing.assert_array_equal(again["a"]["b"], np.arange(3))
    assert again["a"]["c"] == [1, 2.5, None, "x", True, 2.0]
    assert (again["d"], again["e"][0], again["big"]) == (b"\0\1", b"", 2**127)


@pytest.mark.parametrize("damage", ["flipped", "short", "long"])
def test_a_file_that_cannot_be_read_back_does_not_replace_the_old_one(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "f", ARRAYS, {"x": 1})
    before = (tmp_path / "f").read_bytes()

    def flush(descriptor: int) -> None:
        (temporary,) = tmp_path.glob(".tmp-*")
        content = temporary.read_bytes()
        turned = content[:-1] + bytes([content[-1] ^ 1])
        temporary.write_bytes({"flipped": turned, "short": content[:-1], "long": content + b"\0"}[damage])

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="returned other bytes"):
        write_file(tmp_path / "f", ARRAYS, {"x": 2})
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == before


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("keep me")
    (tmp_path / "f").symlink_to(tmp_path / "theirs")
    write_file(tmp_path / "f", ARRAYS, {"x": 1})
    assert (tmp_path / "theirs").read_text() == "keep me"
    assert not (tmp_path / "f").is_symlink()
    assert read_file(tmp_path / "f")[1] == {"x": 1}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(UserError, match="is no regular file"):
            read_file(tmp_path / name)


def test_too_many_arrays_are_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srwm_rl.storage.safe_file.MAX_ARRAYS", 2)
    with pytest.raises(UserError, match="too much for one file"):
        write_file(tmp_path / "f", ARRAYS, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("meta", "again"),
    [({"rate": 1e-05}, b"1E-05"), ({"name": "\xe9"}, b"\\\\u00E9")],
)
def test_an_equivalent_change_of_the_header_is_refused(meta: dict[str, Any], again: bytes, tmp_path: Path) -> None:
    blob = serialise(ARRAYS, meta)
    old = again.swapcase() if again[0:1] == b"1" else again.lower()
    assert blob.count(old) == 1
    (tmp_path / "f").write_bytes(blob.replace(old, again))
    with pytest.raises(UserError, match="not as srwm-rl writes it"):
        read_file(tmp_path / "f")


@pytest.mark.parametrize(
    "node", [{"$array": "/nothing"}, {"$bytes": "/nothing"}, {"$array": ["a"]}, {"$bytes": None}, [{"$array": 1}]]
)
def test_a_tree_that_names_missing_arrays_is_refused(node: Any) -> None:
    with pytest.raises(UserError, match="has no array"):
        unpack({"a": np.zeros(1)}, {"x": node})


def test_threads_can_write_one_path(tmp_path: Path) -> None:
    def write(n: int) -> None:
        for _ in range(20):
            write_file(tmp_path / "f", {"a": np.full(1000, n)}, {"n": n})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    arrays, meta = read_file(tmp_path / "f")
    assert (arrays["a"] == meta["n"]).all()
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("arrays", "meta", "message"),
    [
        ({}, {"a": {9: 1, 10: 2}}, "its metadata is not as srwm-rl writes it"),
        ({}, {"a": 10**70}, "a number of 71 digits"),
        ({"__metadata__": np.zeros(1)}, {}, "a key twice"),
        ({"x": np.zeros(2, ">f4")}, {}, "'x' cannot be written: its type is >f4"),
        ({"x": np.zeros(2, np.complex64)}, {}, "its type is <c8"),
        ({"x": np.array([None])}, {}, "its type is [|]O"),
    ],
)
def test_what_cannot_be_read_is_not_written(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write_file(tmp_path / "f", arrays, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["?", *"bBhHiIlLqQefd"])
def test_arrays_of_every_type_come_back(kind: str, tmp_path: Path) -> None:
    write_file(tmp_path / "f", {"x": np.array([0, 1], kind)}, {})
    assert read_file(tmp_path / "f")[0]["x"].dtype == np.dtype(kind)
