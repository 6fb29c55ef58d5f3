"""The metrics file: numbers only; resuming truncates it at the checkpoint."""

import json
from pathlib import Path

import numpy as np

from srwm_rl.agents.run.metrics import MetricsFile


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_numbers_are_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"a": 1, "b": np.float32(0.5), "c": float("nan"), "d": "text", "e": True}, {}, step=7)
    metrics.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 7, "a": 1, "b": 0.5, "c": None}]


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
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "a": 1}, {"step": 2, "a": 3}]
