"""Make an environment with the lowest versions that pyproject.toml allows: `lowest.py FOLDER [--torch]`.

`make test-lowest` does. For Python 3.10 and 3.11, which the lowest versions have wheels for. Without --torch, torch is
the pinned version: its lowest one is a download of gigabytes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lock import ROOT, pinned  # the script's own folder is on Python's path
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

EXTRAS = ("export", "memory", "digits")  # whose tests are run
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")  # that run the tests, as pinned


def lowest(with_torch: bool) -> Iterator[str]:
    """Yield the project's dependencies on this Python, each at its lowest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in EXTRAS for text in project["optional-dependencies"][name]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if bounds and (with_torch or requirement.name != "torch"):
            yield f"{requirement.name}=={bounds[0]}"
        elif requirement.name != "torch":
            yield f"{requirement.name}{requirement.specifier}"


def main() -> None:
    """Make the environment, unless it is there with these versions."""
    if sys.version_info[:2] > (3, 11):
        raise SystemExit("the lowest versions have wheels for Python 3.10 and 3.11: make test-lowest PYTHON=python3.11")
    folder, with_torch = Path(sys.argv[1]), "--torch" in sys.argv
    pins = {requirement.name.lower(): requirement for requirement in pinned(".".join(map(str, sys.version_info[:2])))}
    named = (*TOOLS, *(() if with_torch else ("torch",)))
    wanted = [*lowest(with_torch), *(f"{name}{pins[name].specifier}" for name in named)]
    text, stamp = "\n".join(wanted) + "\n", folder / "requirements.txt"
    if stamp.exists() and stamp.read_text() == text:
        return
    if folder.exists():
        shutil.rmtree(folder)
    subprocess.run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True)
    for packages in folder.glob("lib/*/site-packages"):  # the project itself, as `make install` has built it
        (packages / "srwm_rl.pth").write_text(f"{ROOT}\n")
    stamp.write_text(text)


if __name__ == "__main__":
    main()
