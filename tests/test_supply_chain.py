"""What others' code we depend on, and that ours neither unpickles nor evaluates anything."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OURS = ("srwm_rl", "agents", "envs", "scripts")
IMPORTED_AS = {
    "stable-baselines3": "stable_baselines3",
    "sb3-contrib": "sb3_contrib",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "procgen-mirror": "procgen",
}
NOT_IMPORTED = {
    "tensorboard": "Stable-Baselines3's TensorBoardOutputFormat writes with it",
    "gym-notices": "its old versions have nothing that gym prints at its import",
}
COME_ALONG = {"gym3": "of procgen", "markupsafe": "of jinja2"}
# Everything of ours is checked; scripts/evaluation/load_agent.py reads a zip that the user said to trust, by SB3.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "joblib.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
YAML_LOADS = ["yaml.load(text, _Loader)"]  # a subclass of yaml.BaseLoader: texts, lists and dicts alone


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            yield path, ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def project() -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def test_gym_is_not_imported_by_anything_of_ours() -> None:
    for path, tree in trees():
        assert "gym" not in imported(tree), path


def test_every_dependency_is_imported_or_explained() -> None:
    used = set().union(*(imported(tree) for _, tree in trees()))
    names = {Requirement(text).name.lower() for text in project()["dependencies"]}  # type: ignore[attr-defined]
    assert names, "nothing was looked at"
    for name in names:
        module = IMPORTED_AS.get(name, name.replace("-", "_"))
        assert (module in used) != (name in NOT_IMPORTED), f"{name} is not used, or is used and explained"
    assert NOT_IMPORTED.keys() <= names


def test_everything_imported_is_declared() -> None:
    extras = project()["optional-dependencies"]
    texts = [*project()["dependencies"], *(text for each in extras.values() for text in each)]  # type: ignore[attr-defined,misc]
    names = {Requirement(text).name.lower() for text in texts}
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} | {"srwm_rl", *COME_ALONG}
    for path, tree in trees():
        foreign = imported(tree) - set(sys.stdlib_module_names) - declared
        assert not foreign, f"{path} imports {foreign}"


def test_torch_is_new_enough_for_its_advisories() -> None:
    (torch,) = (each for each in map(Requirement, project()["dependencies"]) if each.name == "torch")  # type: ignore[call-overload]
    assert not torch.specifier.contains("2.9.1"), "CVE-2026-24747 is fixed in 2.10"
    assert torch.specifier.contains("2.10.0")


def test_nothing_of_ours_unpickles_or_evaluates() -> None:
    for path, tree in trees():
        assert not imported(tree) & UNSAFE_MODULES, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, f"{path}:{node.lineno}"
                assert ast.unparse(node.func) != "yaml.load" or ast.unparse(node) in YAML_LOADS, f"{path}:{node.lineno}"
                for each in node.keywords:
                    assert each.arg not in ("shell", "allow_pickle") or not _is_true(each.value), (
                        f"{path}:{node.lineno}"
                    )


# Calls that open or read a file. All of those outside `srwm_rl/regular_file.py` stand in `OTHER_READS`.
READING = {
    "open",
    "read_text",
    "read_bytes",
    "load",
    "fromfile",
    "loadtxt",
    "genfromtxt",
    "ZipFile",
    "imread",
    "memmap",
}
OTHER_READS = {
    "agents/impala.py": {"self.rollout_buffer.open": "no file"},
    "agents/base.py": {"super().load": "zips of Stable-Baselines3, only if they are trusted"},
    "agents/collecting/unroll_queue.py": {"self.open": "no file"},
    "agents/run/metrics.py": {"path.open": "its own log, to write", "self.path.open": "its own log, to write"},
    "envs/images/glyphs.py": {"CLASSES.read_text": "of this package", "path.read_bytes": "fonts of matplotlib"},
    "envs/images/image_files.py": {"Image.open": "bytes that were read"},
    "scripts/benchmarks/suite.py": {"results.read_text": "its own", "log.read_text": "its own"},
    "scripts/benchmarks/training.py": {"Path('/proc/self/status').read_text": "the system's"},
    "scripts/cli.py": {"os.open": "/dev/null"},
    "scripts/evaluation/load_agent.py": {
        "load": "model files, by the one reader",
        "_algorithm(path).load": "zips of Stable-Baselines3, only with --trust",
        "zipfile.ZipFile": "zips of Stable-Baselines3, only with --trust",
    },
    "scripts/commands/zoo.py": {"load": "model files, by the one reader"},
    "scripts/evaluation/share.py": {"load": "model files, by the one reader"},
    "scripts/export/sb3_zip.py": {"type(model).load": "the zip that was just written"},
    "scripts/main.py": {"os.open": "/dev/null", "open": "/dev/null"},
    "scripts/seeds/train.py": {"path.open": "to write", "open": "/dev/null"},
    "scripts/training/initial_weights.py": {"load": "model files, by the one reader"},
    "scripts/training/launch.py": {"open": "/dev/null"},
    "scripts/tuning/search.py": {"(path / 'train.log').open": "to write", "(path / 'lock').open": "to write"},
    "scripts/video/encoding.py": {"av.open": "to write"},
    "scripts/video/trace.py": {"zipfile.ZipFile": "bytes that were read"},
    "srwm_rl/ops/triton_cnn.py": {"tl.load": "no file"},
    "srwm_rl/ops/triton_delta.py": {"tl.load": "no file"},
    "srwm_rl/ops/triton_scan.py": {"tl.load": "no file"},
    "srwm_rl/ops/triton_step.py": {"tl.load": "no file"},
    "srwm_rl/official/torch_zip.py": {"zipfile.ZipFile": "bytes that were read"},
    "srwm_rl/storage/run_folder.py": {"(self.path / LOCK).open": "a lock"},
    "srwm_rl/storage/safe_file.py": {"os.open": "what it writes itself, and folders"},
}
OF_OURS = ("Run.open", "RunGroup.open", "yaml.load")  # `yaml.load` with a loader of texts alone, of text


def test_all_files_of_users_are_read_through_one_module() -> None:
    found: dict[str, set[str]] = {}
    for path, tree in trees():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.rpartition(".")[2] in READING and called not in OF_OURS:
                    found.setdefault(name, set()).add(called)
    assert found.pop("srwm_rl/regular_file.py") == {"os.open"}
    assert found == {name: set(calls) for name, calls in OTHER_READS.items()}


def _is_true(value: ast.expr) -> bool:
    return not (isinstance(value, ast.Constant) and value.value is False)


def lock() -> dict[tuple[str, str], list[str]]:
    """Return the lock's hashes by package and version."""
    found = {}
    text = (ROOT / "requirements" / "dev.lock").read_text().replace("\\\n", "")
    for line in (each for each in text.splitlines() if each and not each.startswith("#")):
        requirement = Requirement(line.partition(" --hash")[0])
        (version,) = (each.version for each in requirement.specifier)
        found[requirement.name.lower().replace("_", "-"), version] = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
    return found


def run(code: str) -> str:
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=ROOT / "requirements", capture_output=True, text=True, check=True).stdout


def test_the_lock_has_hashes_for_every_pinned_version() -> None:
    code = "import json, lock; print(json.dumps([[(r.name, str(r.specifier)) for r in lock.pinned(p)]"
    pins, left_out = json.loads(run(code + " for p in lock.PYTHONS] + [[*lock.LEFT_OUT]]))")), None
    *pins, left_out = pins
    assert left_out == ["torch", "gym", "moviepy"]
    wanted = {
        (name.lower().replace("_", "-"), spec[2:]) for each in pins for name, spec in each if name not in left_out
    }
    assert len(wanted) > 50
    assert lock().keys() == wanted, "constraints.txt was changed: make lock"
    assert all(lock().values())


def test_the_lock_is_no_looser_than_the_project() -> None:
    pins = {name: Version(version) for name, version in lock()}
    for text in project()["dependencies"]:  # type: ignore[attr-defined]
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text


@pytest.mark.parametrize(
    ("report", "wanted", "part"),
    [
        ({}, ["a"], "a was not audited"),
        ({"dependencies": []}, ["a"], "a was not audited"),
        ({"dependencies": [{"name": "a", "skip_reason": "no network"}]}, ["a"], "a was not audited: no network"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1"}]}]}, ["a"], "a 1: X-1"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, ["a", "b_c"], "b_c was not audited"),
        ({"dependencies": []}, [], "nothing was audited"),
    ],
)
def test_an_audit_that_answers_for_less_than_everything_fails(report: object, wanted: list[str], part: str) -> None:
    out = run(f"import audit; print(audit.faults({report!r}, set({wanted!r})))")
    assert part in out


def test_an_audit_that_answers_for_everything_succeeds() -> None:
    report = {"dependencies": [{"name": "a-b", "version": "1", "vulns": []}]}
    assert run(f"import audit; print(audit.faults({report!r}, {{'A_b'}}))").strip() == "[]"
