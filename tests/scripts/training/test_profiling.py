"""`srwm-rl train --profile`: the table's sums, and a trace that a browser can show."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.agents.run.profiling import Spent
from srwm_rl.scripts.training.profiling import table
from tests.scripts.conftest import IMPALA, RECALL


@pytest.mark.parametrize("argv", [RECALL, IMPALA, (*IMPALA, "--synchronous")])
def test_a_profiled_run(argv: tuple[str, ...], call: Any, tmp_path: Path) -> None:
    result = call("train", *argv, "-n", 6 * 64, "--profile", "-f", tmp_path)
    assert result.code == 0, result
    lines = result.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("An update of 64 steps takes "))
    parts = {line[:40].strip().split("  ")[0] for line in lines[head + 2 :]}
    assert {"collect", "act", "encoder", "core", "environments", "gradient", "optimizer"} <= parts
    if argv != RECALL:  # recall's gradient is a single call of C
        assert {"forward", "backward"} <= parts
    trace = next(tmp_path.rglob("profile.json.gz"))
    assert str(trace) in result.out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {event.get("name") for event in events}
    assert {"act", "encoder", "core", "aten::addmm"} <= named
    assert f"done: {6 * 64} steps" in result.out


def test_the_trace_contains_all_threads(call: Any, tmp_path: Path) -> None:
    small = ["--n-envs", 64, "--n-steps", 2, "--batch-size", 64, "--n-epochs", 1, "--n-threads", 2, "--no-progress"]
    result = call("train", "--env", "coinrun", *small, "-n", 6 * 128, "--profile", "-f", tmp_path)
    assert result.code == 0, result
    events = json.loads(gzip.decompress(next(tmp_path.rglob("profile.json.gz")).read_bytes()))["traceEvents"]
    by = {
        name: {event["tid"] for event in events if event.get("name") == name} for name in ("learn", "aten::convolution")
    }
    assert len(by["learn"]) == 1
    assert by["aten::convolution"] - by["learn"]  # in which the CNN computes: see srwm_rl.ops.thread_parallel


def test_a_run_that_ends_early_prints_what_it_timed_or_why_it_could_not(call: Any, tmp_path: Path) -> None:
    result = call("train", *RECALL, "-n", 2 * 64, "--profile", "-f", tmp_path / "two")
    assert result.code == 0
    assert "An update of 64 steps takes " in result.out
    result = call("train", *RECALL, "-n", 64, "--profile", "-f", tmp_path / "one")
    assert result.code == 0
    assert "no profile: the run ended within its first update" in result.err
    assert "An update of" not in result.out


def test_a_resumed_run_is_profiled_only_with_the_option(call: Any, tmp_path: Path) -> None:
    assert "An update of" in call("train", *RECALL, "-n", 2 * 64, "--profile", "-f", tmp_path).out
    (run,) = tmp_path.glob("*/*_1")
    assert "An update of" not in call("train", "--resume", run, "-n", 4 * 64).out
    assert "An update of" in call("train", "--resume", run, "-n", 6 * 64, "--profile").out


def test_a_trace_that_cannot_be_written_does_not_end_the_run(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("srwm_rl.scripts.training.profiling.TRACE", "no/such/folder/profile.json.gz")
    result = call("train", *RECALL, "-n", 6 * 64, "--profile", "-f", tmp_path)
    assert result.code == 0
    assert "no trace: " in result.out
    assert "done: " in result.out


def test_the_table_accounts_for_everything() -> None:
    spent = {
        ("collect",): Spent(4.0, 2),
        ("collect", "act"): Spent(3.0, 20),
        ("collect", "act", "core"): Spent(1.0, 20),
        ("learn",): Spent(5.0, 2),
    }
    lines = table(spent, seconds=10.0, updates=2, steps=1000).splitlines()
    assert lines[0] == "An update of 500 steps takes 5.000 s (100 steps/s):"
    cells = [line.split() for line in lines[2:]]
    assert [(" ".join(row[:-3]), *row[-3:]) for row in cells if row[0] not in ("other", "between")] == [
        ("learn", "2,500.0", "50.0%", "1"),
        ("collect", "2,000.0", "40.0%", "1"),
        ("act", "1,500.0", "30.0%", "10"),
        ("core", "500.0", "10.0%", "10"),
    ]
    remainders = [row[-2:] for row in cells if row[0] in ("other", "between")]
    assert remainders == [["1,000.0", "20.0%"], ["500.0", "10.0%"], ["500.0", "10.0%"]]
