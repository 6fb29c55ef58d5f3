"""`srwm-rl doctor`: one line per dependency and device, each problem with its fix."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement

from srwm_rl.scripts.cli import parse

PROG = "srwm-rl doctor"


@dataclass(frozen=True)
class DoctorConfig:
    """Check the installation and name each problem's fix."""

    verbose: int = 1
    """2: tracebacks on errors."""


class Finding(NamedTuple):
    """One line of the report."""

    ok: bool
    what: str
    detail: str  # what was found, or the fix
    required: bool = True


def main(argv: list[str]) -> int:
    """Print the report; return 0, or 1 if something required is missing."""
    parse(DoctorConfig, argv, PROG)
    findings = [_python(), *_packages(), *(_guarded(name, check) for name, check in CHECKS.items())]
    width = max(len(each.what) for each in findings)
    for each in findings:
        mark = "ok  " if each.ok else ("FIX " if each.required else "note")
        print(f"{mark}  {each.what:<{width}}  {each.detail}")
    broken = sum(not each.ok and each.required for each in findings)
    print(f"\n{broken} problem(s) to fix" if broken else "\nall is well")
    return 1 if broken else 0


def _python() -> Finding:
    ok = (3, 10) <= sys.version_info[:2] < (3, 13)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(ok, "python", found if ok else f"{found}: make a virtual environment with Python 3.10, 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    for text in requires("srwm-rl") or ():
        need = Requirement(text)
        extra = need.marker is not None and "extra ==" in str(need.marker)
        wanted = {"extra": "procgen"} if extra else None
        if need.marker is not None and not need.marker.evaluate(wanted):
            continue
        yield _package(need, required=not extra)


def _package(need: Requirement, required: bool) -> Finding:
    pip = f"{sys.executable} -m pip install"
    try:
        found = version(need.name)
    except PackageNotFoundError:
        fix = f"missing: {pip} " + (f"'{need.name}{need.specifier}'" if required else "'srwm-rl[procgen]'")
        return Finding(False, need.name, fix, required)
    if not need.specifier.contains(found, prereleases=True):
        return Finding(
            False, need.name, f"{found}, needs {need.specifier}: {pip} '{need.name}{need.specifier}'", required
        )
    return Finding(True, need.name, found, required)


def _torch() -> Finding:
    import torch

    x = torch.randn(2, 3, 2, 4)
    import srwm_rl

    y, _ = srwm_rl.srwm_scan(x, torch.randn(2, 4, 16))
    return Finding(
        bool(torch.isfinite(y).all()), "srwm_scan", f"runs on the CPU with {torch.get_num_threads()} threads"
    )


def _kernel() -> Finding:
    from srwm_rl.ops.cpu import LEVELS, load_kernel

    kernel = load_kernel()
    if isinstance(kernel, str):
        return Finding(False, "C kernel", f"{kernel}; until then srwm_scan is slow on the CPU", required=False)
    return Finding(True, "C kernel", f"built, runs with {LEVELS[kernel.level]} instructions")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(False, "gpu", "none found; training runs on the CPU", required=False)
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding(True, "gpu", names)


def _procgen() -> Finding:
    from srwm_rl.envs import ProcgenVecEnv

    env = ProcgenVecEnv("coinrun", 2)
    shape = env.reset().shape  # type: ignore[union-attr]
    env.close()
    return Finding(shape == (2, 64, 64, 3), "procgen runs", "coinrun gives 64x64 frames")


def _disk() -> Finding:
    ok = os.access(".", os.W_OK)
    return Finding(
        ok, "folder", "writable" if ok else "cannot write here: choose another folder with -f", required=False
    )


CHECKS: dict[str, Callable[[], Finding]] = {
    "srwm_scan": _torch,
    "C kernel": _kernel,
    "gpu": _gpu,
    "procgen runs": _procgen,
    "folder": _disk,
}


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a check that breaks is a finding, whatever broke it
        return Finding(False, name, f"{type(error).__name__}: {error}".splitlines()[0], required=name != "procgen runs")
