"""Lazy imports of a package's public names, so that importing the package imports nothing heavy."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports its public names `if TYPE_CHECKING:`."""
    source = inspect.getsource(sys.modules[package])
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    module_of = {alias.name: str(node.module) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(module_of[name]), name)
        except AttributeError as error:  # which `from package import name` would replace by "cannot import name"
            raise ImportError(f"{module_of[name]} cannot be imported: {error}") from error

    return __getattr__, lambda: sorted(module_of), sorted(module_of)
