"""`srwm-rl bench suite`: the benchmarks that docs/results is made of, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any, Literal, NamedTuple

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.training.signals import StopSignal, raise_on_signals

GRACE = 5.0  # seconds that a benchmark gets to end by itself


@dataclass(frozen=True)
class SuiteBench:
    """Run all benchmarks of a kind of device, the most important ones first: `srwm-rl bench suite`."""

    out: Path
    """Folder for each one's results, NAME.json, and what it said, NAME.log; those of the same name are replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Whose benchmarks; auto: a GPU's where there is one."""
    minutes: float = 8.0
    """For all of them; one that would take longer than is left is left out, one that does is ended."""
    only: tuple[str, ...] = ()
    """Names of those to run; none: all."""
    verbose: int = 1
    """2: tracebacks on errors."""


class Row(NamedTuple):
    """A benchmark of the suite."""

    name: str
    device: str  # the kind it is for, cpu or cuda
    minutes: float  # that it takes, about
    words: str  # after `srwm-rl bench`


class Outcome(NamedTuple):
    """What became of a benchmark."""

    name: str
    said: str  # what it gave, or how it failed
    seconds: float
    failed: bool


_CPU, _GPU = "train --device cpu", "train --device cuda"
_CONTRIB = "--against sb3-contrib"
_REFERENCE = "--against reference --env bandit"
_LONG, _SHORT = "--n-steps 256 --batch-size 2048", "--n-steps 32 --batch-size 512"
_BANDIT_50 = "--env bandit --env-kwargs n_pulls:50"

# By importance for each device; minutes on two cores, and on one GPU.
ROWS = (
    Row("bench_op", "cpu", 1, "op"),
    Row("bench_env", "cpu", 0.3, "env"),
    Row("bench_encoder", "cpu", 0.5, "encoder"),
    Row("bench_train_contrib_published", "cpu", 70, f"{_CPU} {_CONTRIB} {_LONG} --rounds 3"),
    Row("bench_train_contrib", "cpu", 4, f"{_CPU} {_CONTRIB} {_SHORT}"),
    Row("bench_train_contrib_float32", "cpu", 4, f"{_CPU} {_CONTRIB} {_SHORT} --precision float32"),
    Row("bench_bandit_contrib_50", "cpu", 1, f"{_CPU} {_CONTRIB} {_BANDIT_50} {_LONG}"),
    Row("bench_bandit_contrib_100", "cpu", 1, f"{_CPU} {_CONTRIB} --env bandit --env-kwargs n_pulls:100 {_LONG}"),
    Row("bench_bandit_contrib_200", "cpu", 1, f"{_CPU} {_CONTRIB} --env bandit --env-kwargs n_pulls:200 {_LONG}"),
    Row("bench_repeat_previous_contrib", "cpu", 1, f"{_CPU} {_CONTRIB} --env repeat_previous {_LONG}"),
    Row("bench_bandit_reference_32", "cpu", 1, f"{_CPU} {_REFERENCE} {_SHORT}"),
    Row(
        "bench_bandit_reference_100",
        "cpu",
        1,
        f"{_CPU} {_REFERENCE} --env-kwargs n_pulls:100 --n-steps 100 --batch-size 1600",
    ),
    Row("bench_bandit_reference_256", "cpu", 1, f"{_CPU} {_REFERENCE} --env-kwargs n_pulls:100 {_LONG} --n-epochs 4"),
    Row("bench_train_feedforward", "cpu", 2, f"{_CPU} --against feedforward {_SHORT}"),
    Row("bench_impala", "cpu", 1, f"{_CPU} --algo impala"),
    Row("bench_impala_overlapping", "cpu", 1, f"{_CPU} --algo impala --overlapping"),
    Row("bench_bandit_impala", "cpu", 0.5, f"{_CPU} --algo impala {_BANDIT_50}"),
    Row("bench_gpu_op", "cuda", 1, "op --device cuda"),
    Row(
        "bench_gpu_impala",
        "cuda",
        1,
        f"{_GPU} --algo impala --overlapping --n-envs 256 --n-steps 50 --batch-size 3200",
    ),
    Row("bench_gpu_ppo", "cuda", 1.5, f"{_GPU} --n-envs 256 --n-steps 256 --batch-size 16384"),
    Row("bench_gpu_contrib", "cuda", 1.5, f"{_GPU} {_CONTRIB} {_SHORT} --rounds 2"),
    Row("bench_gpu_encoder", "cuda", 0.5, "encoder --device cuda --n-frames 4096"),
    Row("bench_gpu_vectors", "cuda", 0.5, f"{_GPU} {_BANDIT_50} --n-envs 256 --n-steps 256 --batch-size 8192"),
)


def run(config: SuiteBench) -> dict[str, Any]:
    """Run what fits into the time, print a table, and return its rows.

    Raises:
        UserError: no such benchmark or device.
        KeyboardInterrupt: a signal asked it to stop.
    """
    rows = _chosen(config)
    config.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * config.minutes
    outcomes, left_out = [], []
    try:
        with raise_on_signals():
            for row in rows:
                left = until - time.monotonic()
                if left < 60 * row.minutes:
                    left_out.append(row.name)
                    continue
                print(f"{row.name}: srwm-rl bench {row.words}", flush=True)
                outcomes.append(_outcome(row, config.out, left))
    except StopSignal as stop:
        raise KeyboardInterrupt from stop
    _show(outcomes)
    if left_out:
        print(f"left out, for {config.minutes:g} minutes are not enough: {', '.join(left_out)}")
    return {"rows": outcomes, "wrong": any(each.failed for each in outcomes)}


def _chosen(config: SuiteBench) -> list[Row]:
    device = check_device(config.device)
    rows = {row.name: row for row in ROWS if row.device == device}
    for name in config.only:
        if name not in rows:
            raise UserError(f"--only: there is no benchmark {name!r} for {device}{did_you_mean(name, rows)}")
    return [row for name, row in rows.items() if not config.only or name in config.only]


def _outcome(row: Row, folder: Path, seconds: float) -> Outcome:
    """Run a benchmark for so many seconds at most."""
    results, log = folder / f"{row.name}.json", folder / f"{row.name}.log"
    results.unlink(missing_ok=True)
    began = time.monotonic()
    code = _run([*row.words.split(), "--json", str(results)], log, seconds)
    took = time.monotonic() - began
    if code == 0:
        return Outcome(row.name, gave(json.loads(results.read_text())), took, False)
    if code < 0:
        said = "ended, for the time was over" if took >= seconds else f"ended: {signal.strsignal(-code)}"
    elif results.exists():
        said = "wrong results"
    else:
        said = f"exit code {code}: {(log.read_text().splitlines() or [''])[-1]}"
    return Outcome(row.name, said, took, True)


def _run(words: list[str], log: Path, seconds: float) -> int:
    """Run `srwm-rl bench`, its output here and in the log; return its exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", "srwm_rl", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    timer = Timer(seconds, _end, [child])
    try:
        timer.start()
        assert child.stdout is not None
        with child.stdout, log.open("w") as file:
            for line in child.stdout:
                print(line, end="", flush=True)
                file.write(line)
        return child.wait()
    finally:
        timer.cancel()
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and those that it started, which would hold the device and the pipe."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


def gave(found: dict[str, Any]) -> str:
    """Say in a few words what a benchmark gave, from its results."""
    rows = found["rows"]
    if found["bench"] == "train":
        said = [f"{rows['srwm-rl']['both']['median']:,.0f} steps/s"]
        said += [f"{found['ratio']['both']['median']:.2f} x {other}" for other in rows if other != "srwm-rl"]
        return ", ".join([*said, f"{found['reached']['median']:.0%} of its bound"])
    if found["bench"] == "op":
        ratios = [row["vs_reference"] for row in rows if row["backend"] not in ("loop", "reference")]
        return f"{min(ratios):.1f} to {max(ratios):.1f} x the reference" if ratios else "no fused backend"
    return f"{rows[-1]['name']}: {rows[-1]['ratio']['median']:.2f} x {rows[0]['name']}"


def _show(outcomes: list[Outcome]) -> None:
    width = max((len(each.name) for each in outcomes), default=0)
    for each in outcomes:
        print(f"{each.name:<{width}} {each.seconds:>6.0f} s  {'FAILED: ' * each.failed}{each.said}")
