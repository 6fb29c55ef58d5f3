"""Which folder may import which, no circles, and what importing leaves unloaded.

`python tests/test_architecture.py` lists every violation with its lines.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {"srwm_rl": "srwm_rl", "agents": "srwm_rl.agents", "envs": "srwm_rl.envs", "scripts": "srwm_rl.scripts"}
FORBIDDEN = {
    "srwm_rl": ("agents", "envs", "scripts"),
    "agents": ("envs", "scripts"),
    "envs": ("agents", "scripts"),
    "scripts": (),
}
# Above everything: the first registers the environments with Gymnasium, the second is `python -m srwm_rl`.
ENTRY_POINTS = ("srwm_rl/__init__.py", "srwm_rl/__main__.py")
# The only files that import inside functions. "--help": it is printed without what the command needs.
LATE_IMPORTS = {
    "srwm_rl/ops/delta.py": "Triton is imported where it runs",
    "srwm_rl/ops/scan.py": "Triton is imported where it runs",
    "envs/images/data.py": "--help: Pillow and matplotlib are imported where images are read or drawn",
    "envs/tasks/hidden_controls.py": "--help: Pillow and matplotlib are imported where the room is drawn",
    "envs/make.py": "environments are imported when made: some need SB3 and with it torch",
    "scripts/cli.py": "--device is checked without torch where it is the CPU",
    "scripts/commands/bench.py": "--help",
    "scripts/commands/compare.py": "--help",
    "scripts/commands/controls.py": "--help",
    "scripts/commands/doctor.py": "--help",
    "scripts/commands/eval.py": "--help",
    "scripts/commands/export.py": "--help",
    "scripts/commands/import_official.py": "--help",
    "scripts/commands/fewshot.py": "--help",
    "scripts/commands/plot.py": "--help",
    "scripts/commands/replay.py": "--help",
    "scripts/commands/report.py": "--help",
    "scripts/commands/share.py": "--help",
    "scripts/commands/train.py": "--help",
    "scripts/commands/tune.py": "--help; optuna is optional",
    "scripts/commands/watch.py": "--help",
    "scripts/commands/zoo.py": "--help",
}
# What may be imported inside functions anywhere: it is optional, or missing on some platforms.
OPTIONAL = {
    "matplotlib",
    "onnx",
    "onnxruntime",
    "procgen",
    "procgen_gym",
    "rliable",
    "sklearn",
    "triton",
    "av",
    "wandb",
}


class Import(NamedTuple):
    """An import of one file of ours by another, both as paths from the root."""

    source: str
    target: str
    line: int
    late: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}"


def file_of(module: str) -> str | None:
    """Return the file of a dotted name, None where it is no module of ours."""
    packages = [(name, folder) for folder, name in PACKAGES.items() if f"{module}.".startswith(f"{name}.")]
    if not packages:
        return None
    name, folder = max(packages, key=lambda package: len(package[0]))
    path = ROOT.joinpath(folder, *module[len(name) :].split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(ROOT).as_posix()
    return None


def imported_files(node: ast.AST) -> Iterator[str | None]:
    """Yield the files that a node imports; a string that is a file's whole dotted name counts as an import."""
    if isinstance(node, ast.Import):
        yield from (file_of(alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        assert node.level == 0, "imports of ours are absolute"
        yield from {file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names}
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        target = file_of(node.value)
        yield target if target and not target.endswith("__init__.py") else None  # the anchor of a resource


def nodes_in_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node for function in functions for node in ast.walk(function)}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every file of ours by its path from the root."""
    paths = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


@functools.cache
def imports() -> list[Import]:
    """Return every import of a file of ours by another, those inside functions and under TYPE_CHECKING too."""
    return [
        Import(source, target, node.lineno, node in late)  # type: ignore[attr-defined]
        for source, tree in trees().items()
        for late in [nodes_in_functions(tree)]
        for node in ast.walk(tree)
        for target in imported_files(node)
        if target is not None and target != source
    ]


def folders() -> list[str]:
    """Return every folder with code, and "" for the root."""
    return ["", *sorted({path.rpartition("/")[0] for path in trees()})]


def child_of(folder: str, path: str) -> str:
    """Return the child of a folder that holds a file: the file itself, or the subfolder it is in."""
    if not folder:
        return path if path in ENTRY_POINTS else path.split("/")[0]
    return "/".join(path.split("/")[: folder.count("/") + 2])


def imports_between_children(folder: str) -> list[tuple[str, str, Import]]:
    prefix = f"{folder}/" if folder else ""
    inside = [link for link in imports() if link.source.startswith(prefix) and link.target.startswith(prefix)]
    edges = [(child_of(folder, link.source), child_of(folder, link.target), link) for link in inside]
    return [edge for edge in edges if edge[0] != edge[1]]


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node."""
    targets: dict[str, set[str]] = {}
    for source, target in edges:
        targets.setdefault(source, set()).add(target)
        targets.setdefault(target, set())

    def reachable_from(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for node in targets[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    reachable = {node: reachable_from(node) for node in targets}
    components = {frozenset(other for other in reachable[node] if node in reachable[other]) for node in targets}
    return sorted(sorted(component) for component in components if len(component) > 1)


def circles_between_files() -> list[str]:
    return [" <-> ".join(circle) for circle in circles((link.source, link.target) for link in imports())]


def circles_between_children(folder: str) -> list[str]:
    """Return the circles among a folder's children, each with the imports that close it."""
    edges = imports_between_children(folder)
    return [
        "\n    ".join([" <-> ".join(circle), *sorted({str(link) for a, b, link in edges if {a, b} <= set(circle)})])
        for circle in circles((source, target) for source, target, _ in edges)
    ]


def imports_upwards() -> list[str]:
    return [
        str(link)
        for link in imports()
        if link.source not in ENTRY_POINTS and link.target.startswith(FORBIDDEN[link.source.split("/")[0]])
    ]


def foreign_imports(tree: ast.AST) -> set[str]:
    """Return the top-level names of the modules that a tree imports, ours and the standard library's left out."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - {"srwm_rl"} - set(sys.stdlib_module_names)


def imports_by_environments() -> list[str]:
    """Return what envs/ imports of ours beside errors and reading, and where it imports torch."""
    ours = [link for link in imports() if link.source.startswith("envs/") and not link.target.startswith("envs/")]
    torch = [path for path, tree in trees().items() if path.startswith("envs/") and "torch" in foreign_imports(tree)]
    allowed = {f"srwm_rl/{name}.py" for name in ("errors", "image_layout", "lazy", "regular_file")}
    return [*(str(link) for link in ours if link.target not in allowed), *torch]


def imports_of_own_package() -> list[str]:
    """Return the imports of an `__init__.py` by files below it."""
    packages = [link for link in imports() if link.target.endswith("/__init__.py")]
    return [str(link) for link in packages if link.source.startswith(link.target.removesuffix("__init__.py"))]


def late_imports() -> list[str]:
    """Return the imports inside functions that no entry of LATE_IMPORTS allows."""
    ours = [str(link) for link in imports() if link.late and link.source not in LATE_IMPORTS]
    foreign = [
        f"{path}:{node.lineno} -> {', '.join(foreign_imports(node))}"
        for path, tree in trees().items()
        if path not in LATE_IMPORTS
        for node in nodes_in_functions(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and foreign_imports(node) - OPTIONAL
    ]
    return sorted({*ours, *foreign})


def test_no_circle_between_files() -> None:
    assert circles_between_files() == []


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder or "root")
def test_no_circle_between_the_children_of_a_folder(folder: str) -> None:
    assert circles_between_children(folder) == []


def test_circles_are_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]) == [["a", "b", "c"]]
    assert circles([("a", "b"), ("a", "c"), ("b", "c")]) == []
    assert len(imports()) > 400, "imports were not read"


def test_imports_point_down() -> None:
    assert imports_upwards() == []


def test_environments_import_nothing_of_ours_but_errors_and_never_torch() -> None:
    assert imports_by_environments() == []


def test_no_file_imports_the_package_that_it_is_in() -> None:
    assert imports_of_own_package() == []


def test_imports_inside_functions_stand_in_named_files_only() -> None:
    assert late_imports() == []
    sources = {link.source for link in imports() if link.late}
    assert LATE_IMPORTS.keys() <= sources, "an exception that is no longer needed"


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = set()
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            names.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert set(settings["packages"]) == names


def test_heavy_tests_exist() -> None:
    assignments = {
        node.target.id: node.value
        for node in ast.parse((ROOT / "tests" / "conftest.py").read_text()).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    for path, names in ast.literal_eval(assignments["HEAVY"]).items():
        text = (ROOT / "tests" / path).read_text()
        assert [name for name in names or () if f"def {name}(" not in text] == [], path


def test_time_limits_are_for_hangs() -> None:
    """A slow machine fails no test: a limit is ten minutes or more, or 0 for none."""
    limit = re.compile(r"(?:\btimeout ?= ?|\btimeout\(|\.wait\(|\.join\()([0-9.]+)\b")
    files = [ROOT / "pyproject.toml", *(ROOT / "tests").rglob("*.py")]
    found = [(path, float(value)) for path in files for value in limit.findall(path.read_text(encoding="utf-8"))]
    assert len(found) > 50
    assert [(path, value) for path, value in found if 0 < value < 600] == []


QUIET = """
import srwm_rl
from srwm_rl import SRWMPolicy
from srwm_rl.agents import PPO
from srwm_rl.envs import ProcgenVecEnv
ProcgenVecEnv("coinrun", 1).close()
"""


def test_importing_everything_prints_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


COMMANDS = [path.stem.replace("_", "-") for path in sorted((ROOT / "scripts" / "commands").glob("[!_]*.py"))]
HEAVY = {
    "torch",
    "stable_baselines3",
    "sb3_contrib",
    "scipy",
    "matplotlib",
    "av",
    "PIL",
    "jinja2",
    "procgen",
    "procgen_gym",
}


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a Python process has loaded after some code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint('\\nloaded:', *sys.modules)"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in output.rpartition("loaded:")[2].split()}


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import srwm_rl") & {*HEAVY, "tyro", "rich"} == set()


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_is_light(argv: list[str]) -> None:
    code = f"from srwm_rl.scripts.main import main\ntry:\n    main({argv})\nexcept SystemExit:\n    pass"
    assert loaded_by(code) & HEAVY == set()


def test_names_in_all_exist() -> None:
    import srwm_rl
    import srwm_rl.agents
    import srwm_rl.envs

    for module in (srwm_rl, srwm_rl.agents, srwm_rl.envs):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018


if __name__ == "__main__":
    print("circles between files:", *circles_between_files(), sep="\n  ")
    for name in folders():
        if circles_between_children(name):
            print(f"circles in {name or 'the root'}:", *circles_between_children(name), sep="\n  ")
    print("imports upwards:", *imports_upwards(), sep="\n  ")
    print("imports by environments:", *imports_by_environments(), sep="\n  ")
    print("imports of the package that a file is in:", *imports_of_own_package(), sep="\n  ")
    print("imports inside functions:", *late_imports(), sep="\n  ")
