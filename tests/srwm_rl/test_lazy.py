"""Imports of users' modules, from the current folder, and the errors in them."""

import sys
from pathlib import Path

import pytest

from srwm_rl.errors import UserError
from srwm_rl.lazy import import_own_module


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
