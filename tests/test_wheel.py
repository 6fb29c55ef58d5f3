"""The wheel and the source distribution: built, installed and run outside the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="as `make wheel` on Linux")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, ROOT / "requirements" / "wheel.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_there_is_one_wheel_for_every_python_on_manylinux(wheel: Path) -> None:
    assert re.fullmatch(r"srwm_rl-[\d.]+-cp310-abi3-(manylinux\w+\.?)+\.whl", wheel.name)


def test_it_holds_the_presets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist() if not info.is_dir()}
        names = {name for name in names if name.startswith("srwm_rl/presets/")}
    assert names == {f"srwm_rl/presets/{path.name}" for path in (ROOT / "srwm_rl" / "presets").glob("*.yml")}


def test_the_metadata_has_absolute_links_and_markers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    text = metadata.get_payload()
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert all(link.startswith(("https://", "#")) for link in links)
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist") or []
    for name in ("procgen", "procgen-mirror", "procgen-gym"):
        (requirement,) = (text for text in requirements if re.match(rf"{name}[<>=]", text))
        assert "python_version" in requirement
        assert "extra" not in requirement


def test_the_source_distribution_holds_what_builds_and_tests_it(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = listing.stdout.splitlines()
    left_out = re.compile(r"\..*|Dockerfile|srwm_rl/(agents|envs|scripts)")
    missing = [name for name in tracked if name not in names and not left_out.fullmatch(name)]
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_it_runs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: object) -> str:
        words = [str(programs / str(command[0])), *map(str, command[1:])]
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    place = run("python", "-c", "import srwm_rl.agents as a, srwm_rl as s; print(s.__file__, a.__file__)")
    assert place.count(str(tmp_path / "venv")) == 2
    report = run("srwm-rl", "doctor")
    assert report.endswith("all is well\n")
    assert re.search(r"^ok +C kernel +built", report, re.MULTILINE)
    run("srwm-rl", "train", "--env", "hidden_controls", "-n", "4096", "--n-envs", "8", "--no-progress")
    run("srwm-rl", "train", "--env", "coinrun", "-n", "128", "--n-envs", "2", "--n-steps", "32", "--batch-size", "64")
    assert "zoo:" not in run("srwm-rl", "eval", "zoo:hidden_controls", "--eval-levels", "2000000:2000020")
