"""`srwm-rl doctor`: one line per dependency and device, and how to fix each problem."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from srwm_rl.scripts.cli import parse


@dataclass(frozen=True)
class DoctorConfig:
    """Check the installation and print how to fix each problem."""

    verbose: int = 1
    """2: tracebacks on errors."""


Result = tuple[bool, str]  # whether all is well; the version or state, or the fix


def main(argv: list[str]) -> int:
    """Print the report; return 0, or 1 if something required is missing."""
    parse(DoctorConfig, argv, "srwm-rl doctor")
    findings = [("python", True, *_python()), *_packages()]
    findings += [(name, name not in OPTIONAL, *_run_check(check)) for name, check in CHECKS.items()]
    width = max(len(name) for name, *_ in findings)
    for name, required, ok, detail in findings:
        print(f"{'ok  ' if ok else 'FIX ' if required else 'note'}  {name:<{width}}  {detail}")
    n_broken = sum(required and not ok for _, required, ok, _ in findings)
    print(f"\n{n_broken} problem(s) to fix" if n_broken else "\nall is well")
    return 1 if n_broken else 0


def _python() -> Result:
    wanted = metadata("srwm-rl")["Requires-Python"]
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return True, detail
    return False, f"{detail}: make a virtual environment with Python {wanted}"


def _packages() -> Iterator[tuple[str, bool, bool, str]]:
    """Compare what is installed with the package's metadata, whose markers name what this Python and platform need."""
    for requirement in map(Requirement, requires("srwm-rl") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name, True, *_package(requirement)


def _package(requirement: Requirement) -> Result:
    fix = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return False, f"missing: {fix}"
    if requirement.specifier.contains(installed, prereleases=True):
        return True, installed
    return False, f"{installed}, needs {requirement.specifier}: {fix}"


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


def _training() -> Result:
    import torch

    from srwm_rl.agents import PPO
    from srwm_rl.envs import make_vec_env

    env = make_vec_env("recall", 4, "all", 0, inputs=("action", "reward"))
    core = {"core_kwargs": {"hidden_size": 16, "n_layers": 1, "n_heads": 2}}
    model = PPO("SRWMPolicy", env, n_steps=16, n_epochs=1, seed=0, device="cpu", policy_kwargs=core)
    before = [weight.detach().clone() for weight in model.policy.parameters()]
    begun = time.perf_counter()
    model.learn(128)
    seconds = time.perf_counter() - begun
    moved = [not torch.equal(weight, old) for weight, old in zip(model.policy.parameters(), before, strict=True)]
    env.close()
    steps = f"{model.num_timesteps} steps of PPO in {seconds:.2f} s"
    return all(moved), f"{steps}, {sum(moved)} of {len(moved)} weights moved"


def _procgen() -> Result:
    from srwm_rl.envs import ProcgenVecEnv
    from srwm_rl.envs.procgen.simulator import installed_distribution

    env = ProcgenVecEnv("coinrun", 2)
    shape = env.reset().shape  # type: ignore[union-attr]
    env.close()
    return shape == (2, 64, 64, 3), f"coinrun of {installed_distribution()} gives frames of shape {shape[1:]}"


def _folder() -> Result:
    ok = os.access(".", os.W_OK)
    return ok, "writable" if ok else "cannot write here: choose another folder with -f"


CHECKS: dict[str, Callable[[], Result]] = {
    "srwm_scan": _scan,
    "C kernel": _kernel,
    "training": _training,
    "gpu": _gpu,
    "procgen runs": _procgen,
    "folder": _folder,
}
OPTIONAL = {"C kernel", "gpu", "procgen runs", "folder"}


def _run_check(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}".splitlines()[0]
