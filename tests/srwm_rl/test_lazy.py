"""Lazy exports: names are imported on first use, and errors inside the imported module surface."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = """
from typing import TYPE_CHECKING
from srwm_rl.lazy import lazy_exports
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
