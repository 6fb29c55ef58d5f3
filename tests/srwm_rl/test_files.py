"""Files: equal content, equal bytes; whole or not at all; damage is noticed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import UserError
from srwm_rl.files import pack, read_file, serialise, unpack, write_file

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64), "empty": np.zeros((0, 3))}


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / "f", ARRAYS, {"x": 1, "y": [1, None]})
    arrays, meta = read_file(tmp_path / "f")
    assert meta == {"x": 1, "y": [1, None]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
    turned = dict(reversed(ARRAYS.items()))
    assert serialise(ARRAYS, {"x": 1, "y": 2}) == serialise(turned, {"y": 2, "x": 1})


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
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
def test_foreign_files_are_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match="no srwm-rl file") as error:
        read_file(tmp_path / "f")
    assert "\n" not in str(error.value)


def test_truncated_files_are_noticed(tmp_path: Path) -> None:
    blob = serialise(ARRAYS, {"x": 1})
    for length in range(len(blob)):
        (tmp_path / "f").write_bytes(blob[:length])
        with pytest.raises(UserError):
            read_file(tmp_path / "f")


def test_missing_file_and_folder() -> None:
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
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from srwm_rl.files import write_file
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
