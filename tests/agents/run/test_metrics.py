"""The metrics file: what is written, where it is cut for a resume, and what a full disk or a moved file costs."""

import json
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

from srwm_rl.agents.run import metrics as module
from srwm_rl.agents.run.metrics import MetricsFile, OptionalOutput, silence_tensorboard


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Return a function that limits the size of files that this process writes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_only_numbers_are_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    values = {"b": np.float32(2), "a": 1, "bad": float("inf"), "flag": True, "text": "x", "image": object()}
    metrics.write(values, {}, step=7)
    metrics.close()
    assert rows(tmp_path / "m.jsonl") == [{"step": 7, "a": 1, "b": 2.0, "bad": None}]


def test_lines_after_a_checkpoint_are_truncated(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"a": 1}, {}, step=1)
    position = metrics.position()
    metrics.write({"a": 2}, {}, step=2)
    metrics.close()
    again = MetricsFile(tmp_path / "m.jsonl")
    again.cut(position)
    again.write({"a": 3}, {}, step=2)
    again.close()
    assert [row["a"] for row in rows(tmp_path / "m.jsonl")] == [1, 3]


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path: Path, full_disk: Any) -> None:
    path, errors = tmp_path / "m.jsonl", list[OSError]()
    metrics = MetricsFile(path)
    output = OptionalOutput(lambda: metrics, errors.append, reopen=False)
    output.write({"a": 1}, {}, 1)
    full_disk(path.stat().st_size + 5)  # room for a part of the next row
    for step in (2, 3):
        output.write({"a": step}, {}, step)
        assert [row["step"] for row in rows(path)] == [1]
    assert [error.strerror for error in errors] == ["File too large"]
    full_disk()
    assert metrics.position() == path.stat().st_size
    assert [row["step"] for row in rows(path)] == [1, 2, 3]
    output.write({"a": 4}, {}, 4)
    full_disk(path.stat().st_size)
    output.write({"a": 5}, {}, 5)
    full_disk()
    metrics.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    assert len(errors) == 2


def test_rows_are_kept_for_a_full_disk_in_bounded_memory(
    tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNWRITTEN", 200)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    full_disk(0)
    for step in range(100):
        with pytest.raises(OSError, match="File too large"):
            metrics.write({"a": 1}, {}, step)
        assert len(metrics._unwritten) < 250
    full_disk()
    metrics.close()
    steps = [row["step"] for row in rows(tmp_path / "m.jsonl")]
    assert steps == list(range(steps[0], 100))
    assert 0 < steps[0] < 99


@pytest.mark.parametrize("moved", [False, True])
def test_a_log_that_was_moved_or_deleted_is_written_again(tmp_path: Path, moved: bool) -> None:
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path)
    metrics.write({"a": 1}, {}, 1)
    assert not metrics.restore()
    path.rename(tmp_path / "moved.jsonl") if moved else path.unlink()
    metrics.write({"a": 2}, {}, 2)
    path.touch()  # another file has its name
    assert metrics.restore()
    metrics.write({"a": 3}, {}, 3)
    assert not metrics.restore()
    metrics.close()
    assert [row["a"] for row in rows(path)] == [1, 2, 3]


class Broken(KVWriter):
    """An output that fails while `broken`."""

    made, broken = 0, True

    def __init__(self) -> None:
        Broken.made += 1
        self.rows: list[int] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        if Broken.broken:
            raise OSError(28, "No space left on device")
        self.rows.append(step)

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_an_output_that_fails_is_not_made_anew_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[OSError] = []
    output = OptionalOutput(Broken, errors.append)
    for step in range(100):
        output.write({}, {}, step)
    assert (Broken.made, len(errors)) == (1, 1)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    output.write({}, {}, 100)
    assert (Broken.made, len(errors)) == (2, 1)
    Broken.broken = False
    output.write({}, {}, 101)
    assert isinstance(output.output, Broken)
    assert output.output.rows == [101]
    output.close()


def test_a_tensorboard_folder_that_was_deleted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # which is restored
    silence_tensorboard()
    folder, errors = tmp_path / "tensorboard", list[OSError]()
    output = OptionalOutput(lambda: TensorBoardOutputFormat(str(folder)), errors.append)
    logger = Logger(None, [output])
    for step in range(3):
        logger.record("a", step)
        logger.dump(step)
    (file,) = folder.iterdir()
    file.unlink()
    os.rmdir(folder)
    for step in range(3, 6):
        logger.record("a", step)
        logger.dump(step)
    logger.close()
    assert [error.strerror for error in errors] == ["No such file or directory"]
    assert len(list(folder.iterdir())) == 1
