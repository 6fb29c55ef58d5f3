"""`srwm-rl bench suite`: the benchmarks of docs/results, each in its own process."""

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
from typing import Any, Literal, NamedTuple

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.signals import StopSignal, raise_on_signals

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
FAILED = "FAILED: "


@dataclass(frozen=True)
class SuiteBench:
    """Run all benchmarks of a kind of device, the most important ones first: `srwm-rl bench suite`."""

    out: Path
    """Folder for the results, NAME.json, and the output, NAME.log, of each benchmark; existing files are replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The kind of device; auto: cuda if there is a GPU."""
    minutes: float = 8.0
    """For all of them; a benchmark is skipped if it would take longer than is left, and stopped if it does."""
    only: tuple[str, ...] = ()
    """Names of the benchmarks to run; none: all."""
    verbose: int = 1
    """2: tracebacks on errors."""


class Benchmark(NamedTuple):
    """A benchmark of the suite."""

    name: str
    device: str  # cpu or cuda
    minutes: float  # that it takes, about
    arguments: str  # of `srwm-rl bench`


_CPU, _GPU = "train --device cpu", "train --device cuda"
_CONTRIB = f"{_CPU} --against sb3-contrib"
_REFERENCE = f"{_CPU} --against reference --env bandit"
_LONG, _SHORT = "--n-steps 256 --batch-size 2048", "--n-steps 32 --batch-size 512"
_PULLS = "--env-kwargs n_pulls"
_GPU_256 = f"{_GPU} --n-envs 256"

# The most important first; minutes on two cores, or on one GPU.
BENCHMARKS = (
    Benchmark("bench_op", "cpu", 1, "op"),
    Benchmark("bench_env", "cpu", 0.3, "env"),
    Benchmark("bench_encoder", "cpu", 0.5, "encoder"),
    Benchmark("bench_train_contrib_published", "cpu", 70, f"{_CONTRIB} {_LONG} --rounds 3"),
    Benchmark("bench_train_contrib", "cpu", 4, f"{_CONTRIB} {_SHORT}"),
    Benchmark("bench_train_contrib_float32", "cpu", 4, f"{_CONTRIB} {_SHORT} --precision float32"),
    *(
        Benchmark(f"bench_bandit_contrib_{n}", "cpu", 1, f"{_CONTRIB} --env bandit {_PULLS}:{n} {_LONG}")
        for n in (50, 100, 200)
    ),
    Benchmark("bench_repeat_previous_contrib", "cpu", 1, f"{_CONTRIB} --env repeat_previous {_LONG}"),
    Benchmark("bench_bandit_reference_32", "cpu", 1, f"{_REFERENCE} {_SHORT}"),
    Benchmark("bench_bandit_reference_100", "cpu", 1, f"{_REFERENCE} {_PULLS}:100 --n-steps 100 --batch-size 1600"),
    Benchmark("bench_bandit_reference_256", "cpu", 1, f"{_REFERENCE} {_PULLS}:100 {_LONG} --n-epochs 4"),
    Benchmark("bench_bandit_autograd", "cpu", 1, f"{_CPU} --against autograd --env bandit {_PULLS}:50 {_LONG}"),
    Benchmark("bench_train_plain_cnn", "cpu", 2, f"{_CPU} --against plain-cnn {_SHORT}"),
    Benchmark("bench_train_feedforward", "cpu", 2, f"{_CPU} --against feedforward {_SHORT}"),
    *(
        Benchmark(f"bench_{env}_{core}", "cpu", 1, f"{_CPU} --against {core} --env {env} {sizes}")
        for env, sizes in (("recall", ""), ("hidden_controls", "--n-steps 72 --batch-size 1152"))
        for core in ("gru", "lstm")
    ),
    Benchmark("bench_impala", "cpu", 1, f"{_CPU} --algo impala"),
    Benchmark("bench_impala_overlapping", "cpu", 1, f"{_CPU} --algo impala --overlapping"),
    Benchmark("bench_bandit_impala", "cpu", 0.5, f"{_CPU} --algo impala --env bandit {_PULLS}:50"),
    Benchmark("bench_gpu_op", "cuda", 1, "op --device cuda"),
    Benchmark("bench_gpu_impala", "cuda", 1, f"{_GPU_256} --algo impala --overlapping --n-steps 50 --batch-size 3200"),
    Benchmark("bench_gpu_ppo", "cuda", 1.5, f"{_GPU_256} --n-steps 256 --batch-size 16384"),
    Benchmark("bench_gpu_contrib", "cuda", 1.5, f"{_GPU} --against sb3-contrib {_SHORT} --rounds 2"),
    Benchmark("bench_gpu_encoder", "cuda", 0.5, "encoder --device cuda --n-frames 4096"),
    Benchmark("bench_gpu_vectors", "cuda", 0.5, f"{_GPU_256} --env bandit {_PULLS}:50 --n-steps 256 --batch-size 8192"),
)


def run(config: SuiteBench) -> dict[str, Any]:
    """Run the benchmarks that fit into the time, print a table, and return whether one failed, as "wrong".

    Raises:
        UserError: no such benchmark or device.
        KeyboardInterrupt: a signal asked to stop.
    """
    benchmarks = _selected(config)
    config.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * config.minutes
    lines, skipped = {}, []
    try:
        with raise_on_signals():
            for name, _, minutes, arguments in benchmarks:
                start = time.monotonic()
                if end - start < 60 * minutes:
                    skipped.append(name)
                    continue
                print(f"{name}: srwm-rl bench {arguments}", flush=True)
                outcome = _outcome(arguments.split(), config.out / name, end - start)
                lines[name] = f"{time.monotonic() - start:>6.0f} s  {outcome}"
    except StopSignal as stop:
        raise KeyboardInterrupt from stop
    width = max(map(len, lines), default=0)
    for name, line in lines.items():
        print(f"{name:<{width}} {line}")
    if skipped:
        print(f"skipped, because {config.minutes:g} minutes are not enough: {', '.join(skipped)}")
    return {"wrong": any(FAILED in line for line in lines.values())}


def _selected(config: SuiteBench) -> list[Benchmark]:
    device = check_device(config.device)
    by_name = {benchmark.name: benchmark for benchmark in BENCHMARKS if benchmark.device == device}
    for name in config.only:
        if name not in by_name:
            raise UserError(f"--only: there is no benchmark {name!r} for {device}{did_you_mean(name, by_name)}")
    return [benchmark for name, benchmark in by_name.items() if not config.only or name in config.only]


def _outcome(argv: list[str], path: Path, max_seconds: float) -> str:
    """Run a benchmark for at most `max_seconds`; return a summary of its results, or of its failure."""
    results, log = path.with_suffix(".json"), path.with_suffix(".log")
    results.unlink(missing_ok=True)
    code = _run([*argv, "--json", str(results)], log, max_seconds)
    if code == 0:
        return summarise(json.loads(results.read_text()))
    if code is None or code < 0:
        return f"{FAILED}stopped{', the time was over' if code is None else f': {signal.strsignal(-code)}'}"
    if results.exists():
        return f"{FAILED}wrong results"
    return f"{FAILED}exit code {code}: {(log.read_text(errors='replace').splitlines() or [''])[-1]}"


def _run(argv: list[str], log: Path, max_seconds: float) -> int | None:
    """Run `srwm-rl bench`, print its output and write it to `log`; return its exit code, None after `max_seconds`."""
    command = [sys.executable, "-u", "-m", "srwm_rl", "bench", *argv]
    with subprocess.Popen(["tee", "-i", str(log)], stdin=subprocess.PIPE) as tee:
        child = subprocess.Popen(command, stdout=tee.stdin, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait(max_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which would hold the device and the pipe."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


def summarise(results: dict[str, Any]) -> str:
    """Summarise the results of a benchmark in a few words."""
    rows = results["rows"]
    if results["bench"] == "train":
        parts = [f"{rows['srwm-rl']['both']['median']:,.0f} steps/s"]
        parts += [f"{results['ratio']['both']['median']:.2f} x {name}" for name in rows if name != "srwm-rl"]
        return ", ".join([*parts, f"{results['reached']['median']:.0%} of its bound"])
    if results["bench"] == "op":
        ratios = [row["vs_reference"] for row in rows if row["backend"] not in ("loop", "reference")]
        return f"{min(ratios):.1f} to {max(ratios):.1f} x the reference" if ratios else "no fused backend"
    return f"{rows[-1]['name']}: {rows[-1]['ratio']['median']:.2f} x {rows[0]['name']}"
