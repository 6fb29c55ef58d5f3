"""Write requirements/dev.lock: the versions of constraints.txt with a sha256 for every wheel; `make lock`.

pip itself finds the wheels, without installing them, for each supported Python on Linux x86-64, and reports their
sha256. Installed from the lock, a package that somebody replaced on its way is refused:

    python -m pip install --require-hashes --no-deps --only-binary=:all: -r requirements/dev.lock

Left out is what pip's report cannot vouch for, each with its reason in `LEFT_OUT`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux_2_12", "manylinux_2_5")
PLATFORMS = (*PLATFORMS, "manylinux2014", "manylinux2010", "manylinux1", "linux")
LEFT_OUT = {
    "torch": "CPU and CUDA builds share a version and differ in content, and where CPU builds come from is the user's",
    "gym": "published as source only; ProcGen needs it installed, and nothing of ours imports it",
    "moviepy": "this version is published as source only; procgen-gym needs it, and nothing of ours imports it",
}


def pinned(python: str) -> Iterator[Requirement]:
    """Yield the lines of constraints.txt that are for a Python version."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            environment = {"python_version": python, "python_full_version": f"{python}.0"}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                yield requirement


def found_by_pip(python: str, wanted: list[Requirement]) -> list[dict[str, Any]]:
    """Return what pip reports of the wheels that it would install on a Python version, without what these need."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", python, "--target", folder]
        command += [word for each in PLATFORMS for word in ("--platform", f"{each}_x86_64")]
        report = Path(folder) / "report.json"
        subprocess.run([*command, "--report", report, *(f"{each.name}{each.specifier}" for each in wanted)], check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    if len(found) != len(wanted):
        raise SystemExit(f"pip found {len(found)} of {len(wanted)} packages for Python {python}")
    return found


def check_torchs_needs(python: str) -> None:
    """Check the pins against what torch's wheel asks for.

    Its CUDA build wants one version of triton, its CPU build none: pinned to another, the package could be installed
    everywhere but beside a GPU.
    """
    pins = {each.name.lower(): each for each in pinned(python)}
    for wheel in found_by_pip(python, [pins["torch"]]):
        for needed in map(Requirement, wheel["metadata"].get("requires_dist", [])):
            pin = pins.get(needed.name.lower())
            if pin is not None and "extra" not in str(needed.marker):
                version = str(pin.specifier).removeprefix("==")
                if not needed.specifier.contains(version):
                    raise SystemExit(f"constraints.txt has {pin}, but torch on Python {python} needs {needed}")


def hashes(python: str) -> dict[tuple[str, str], str]:
    """Return `(name, version) -> sha256` of the wheels that pip would install on a Python version."""
    found = found_by_pip(python, [each for each in pinned(python) if each.name not in LEFT_OUT])
    return {
        (each["metadata"]["name"], each["metadata"]["version"]): each["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for each in found
    }


def main() -> None:
    """Write the lock."""
    known: dict[tuple[str, str], dict[str, list[str]]] = {}
    for python in PYTHONS:
        check_torchs_needs(python)
        for package, sha256 in hashes(python).items():
            known.setdefault(package, {}).setdefault(sha256, []).append(python)
    lines = [
        "# Written by `make lock` from constraints.txt (see requirements/lock.py); Linux x86-64, Python 3.10 to 3.14."
    ]
    lines += [f"# Without {name}: {reason}." for name, reason in LEFT_OUT.items()]
    for (name, version), digests in sorted(known.items(), key=lambda item: item[0][0].lower()):
        pythons = sorted({each for which in digests.values() for each in which}, key=PYTHONS.index)
        lines.append(f"{name}=={version}{_marker(pythons)} \\")
        lines += [f"    --hash=sha256:{sha256} \\" for sha256 in sorted(digests)]
        lines[-1] = lines[-1].removesuffix(" \\")
    (ROOT / "requirements" / "dev.lock").write_text("\n".join(lines) + "\n")


def _marker(pythons: list[str]) -> str:
    if pythons == list(PYTHONS):
        return ""
    return " ; " + " or ".join(f'python_version == "{each}"' for each in pythons)


if __name__ == "__main__":
    main()
