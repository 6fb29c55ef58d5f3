"""Lazy exports: names are imported on first use, and errors inside the imported module surface; users' modules."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from srwm_rl.errors import UserError
from srwm_rl.lazy import import_optional, import_own_module

PACKAGE = """
from typing import TYPE_CHECKING
from srwm_rl.lazy import lazy_exports
if not __name__:
    print("another condition")
if TYPE_CHECKING:
    from lazy_package.good import a as a, b as b
    from lazy_package.bad import c as c
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "good.py").write_text("a, b = 1, 2")
    (folder / "bad.py").write_text("import sys\nsys.no_such_attribute")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_names_are_imported_on_first_use(package: str) -> None:
    module = __import__(package)
    assert dir(module) == module.__all__ == ["a", "b", "c"]
    assert f"{package}.good" not in sys.modules
    assert (module.a, module.b) == (1, 2)
    assert not hasattr(module, "d")


def test_an_attribute_error_inside_the_module_is_reported_as_the_cause(package: str) -> None:
    with pytest.raises(ImportError, match=r"lazy_package\.bad cannot be imported: .*no_such_attribute"):
        exec(f"from {package} import c")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new current folder that is not on the path, as under the console script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_a_module_of_the_current_folder_is_imported(folder: Path) -> None:
    (folder / "own_lazy_module.py").write_text("VALUE = 3\n")
    module = import_own_module("own_lazy_module", "env")
    assert module.VALUE == 3
    assert module.__file__ == str(folder / "own_lazy_module.py")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("own_missing", None, r"^env 'x': there is no module 'own_missing' in .* or installed$"),
        ("own_lazy.part", None, r"there is no module 'own_lazy'"),
        ("own_syntax", "x = 1\ndef f(:\n", r"SyntaxError: .*own_syntax.py, line 2\)$"),
        ("own_name", "x = 1\ny = undefined\n", r"NameError: name 'undefined' .*own_name.py, line 2\)$"),
        ("own_import", "import srwm_rl_nothing\n", r"'srwm_rl_nothing' \(.*own_import.py, line 1\)$"),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder: Path, name: str, code: str | None, message: str) -> None:
    if code is not None:
        (folder / f"{name}.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        import_own_module(name, "env 'x'")
    assert "\n" not in str(error.value)


def test_an_optional_package_is_missing_or_cannot_be_imported(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^--fast needs no_such_package: pip install 'srwm-rl\[fast\]'$"):
        import_optional("no_such_package.part", "--fast", "'srwm-rl[fast]'")
    sys.path.insert(0, str(folder))
    (folder / "broken_optional_package.py").write_text("import no_such_part\n")
    with pytest.raises(UserError, match=r"^--fast needs broken_optional_package, which cannot .* 'no_such_part'; pip"):
        import_optional("broken_optional_package", "--fast", "'srwm-rl[fast]'")
    assert import_optional("json", "--fast", "json").loads("3") == 3
