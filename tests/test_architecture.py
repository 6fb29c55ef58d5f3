"""The house itself: which room may import which, and that the package holds every room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = {"srwm_rl": "srwm_rl", "agents": "srwm_rl.agents", "envs": "srwm_rl.envs", "scripts": "srwm_rl.scripts"}


def imports(path: Path) -> set[str]:
    """Return every module of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "srwm_rl"}


def room(name: str) -> str:
    return next((short for short, full in ROOMS.items() if full != "srwm_rl" and name.startswith(full)), "srwm_rl")


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("srwm_rl", {"agents", "envs", "scripts"}), ("agents", {"envs", "scripts"}), ("envs", {"agents", "scripts"})],
)
def test_imports_point_down(folder: str, forbidden: set[str]) -> None:
    doors = {"srwm_rl/__init__.py": {"envs"}, "srwm_rl/__main__.py": {"scripts"}}  # registration; python -m srwm_rl
    for path in (ROOT / folder).rglob("*.py"):
        allowed = doors.get(str(path.relative_to(ROOT)), set())
        for name in imports(path):
            assert room(name) not in forbidden - allowed, f"{path} imports {name}"


def test_environments_import_nothing_of_ours_but_errors_and_never_torch() -> None:
    for path in (ROOT / "envs").rglob("*.py"):
        ours = {name for name in imports(path) if room(name) == "srwm_rl" and name != "srwm_rl"}
        assert all(name.startswith("srwm_rl.errors") for name in ours), path
        assert "import torch" not in path.read_text(), path


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder, full in ROOMS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([full, *path.parent.relative_to(ROOT / folder).parts]))
    assert set(settings["packages"]) == found


QUIET = """
import sys, srwm_rl
assert "torch" not in sys.modules, "import srwm_rl must stay light"
from srwm_rl import SRWMPolicy
from srwm_rl.agents import PPO
from srwm_rl.envs import ProcgenVecEnv
ProcgenVecEnv("coinrun", 1).close()
"""


def test_importing_everything_prints_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_names_in_all_exist() -> None:
    import srwm_rl
    import srwm_rl.agents
    import srwm_rl.envs

    for module in (srwm_rl, srwm_rl.agents, srwm_rl.envs):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018
