"""Lazy imports of a package's public names, so that importing the package imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, modules: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: the package's `__name__`.
        modules: per module, relative to the package, the names that it exports, separated by spaces.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{module_of[name]}"), name)
        except AttributeError as error:  # which `from package import name` would replace by "cannot import name"
            raise ImportError(f"{package}.{module_of[name]} cannot be imported: {error}") from error

    return __getattr__, lambda: sorted(module_of), sorted(module_of)
