"""`srwm-rl doctor`: one line per dependency and device, and how to fix each problem."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from srwm_rl.scripts.cli import parse

PROG = "srwm-rl doctor"


@dataclass(frozen=True)
class DoctorConfig:
    """Check the installation and print how to fix each problem."""

    verbose: int = 1
    """2: tracebacks on errors."""


Result = tuple[bool, str]  # whether all is well, and a detail


class Finding(NamedTuple):
    """One line of the report."""

    ok: bool
    name: str
    detail: str  # the version or state, or the fix
    required: bool = True


def main(argv: list[str]) -> int:
    """Print the report; return 0, or 1 if something required is missing."""
    parse(DoctorConfig, argv, PROG)
    findings = [_python(), *_packages(), *(_run_check(name, check) for name, check in CHECKS.items())]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else ("FIX " if finding.required else "note")
        print(f"{mark}  {finding.name:<{width}}  {finding.detail}")
    n_broken = sum(not finding.ok and finding.required for finding in findings)
    print(f"\n{n_broken} problem(s) to fix" if n_broken else "\nall is well")
    return 1 if n_broken else 0


def _python() -> Finding:
    wanted = metadata("srwm-rl")["Requires-Python"]
    ok = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(ok, "python", detail if ok else f"{detail}: make a virtual environment with Python {wanted}")


def _packages() -> Iterator[Finding]:
    for text in requires("srwm-rl") or ():
        requirement = Requirement(text)
        is_extra = requirement.marker is not None and "extra ==" in str(requirement.marker)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "procgen"} if is_extra else None):
            yield _package(requirement, required=not is_extra)


def _package(requirement: Requirement, required: bool) -> Finding:
    name, pip = requirement.name, f"{sys.executable} -m pip install"
    wanted = f"'{name}{requirement.specifier}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(False, name, f"missing: {pip} " + (wanted if required else "'srwm-rl[procgen]'"), required)
    ok = requirement.specifier.contains(installed, prereleases=True)
    detail = installed if ok else f"{installed}, needs {requirement.specifier}: {pip} {wanted}"
    return Finding(ok, name, detail, required)


def _scan() -> Result:
    import torch

    from srwm_rl import srwm_scan

    y, _ = srwm_scan(torch.randn(2, 3, 2, 4), torch.randn(2, 4, 16))
    return bool(torch.isfinite(y).all()), f"runs on the CPU with {torch.get_num_threads()} threads"


def _kernel() -> Result:
    from srwm_rl.ops.cpu import LEVELS, load_kernel

    kernel = load_kernel()
    if isinstance(kernel, str):
        return False, f"{kernel}; until then srwm_scan is slow on the CPU"
    return True, f"built, runs with {LEVELS[kernel.level]} instructions"


def _gpu() -> Result:
    import torch

    if not torch.cuda.is_available():
        return False, "none found; training runs on the CPU"
    return True, ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))


def _procgen() -> Result:
    from srwm_rl.envs import ProcgenVecEnv

    env = ProcgenVecEnv("coinrun", 2)
    shape = env.reset().shape  # type: ignore[union-attr]
    env.close()
    return shape == (2, 64, 64, 3), f"coinrun gives frames of shape {shape[1:]}"


def _folder() -> Result:
    ok = os.access(".", os.W_OK)
    return ok, "writable" if ok else "cannot write here: choose another folder with -f"


CHECKS: dict[str, Callable[[], Result]] = {
    "srwm_scan": _scan,
    "C kernel": _kernel,
    "gpu": _gpu,
    "procgen runs": _procgen,
    "folder": _folder,
}
OPTIONAL = {"C kernel", "gpu", "procgen runs", "folder"}


def _run_check(name: str, check: Callable[[], Result]) -> Finding:
    try:
        ok, detail = check()
    except Exception as error:
        ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(ok, name, detail, required=name not in OPTIONAL)
