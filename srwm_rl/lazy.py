"""Imports that wait or may fail: public names on first use, modules of users, packages that are optional."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from srwm_rl.errors import UserError


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports its public names `if TYPE_CHECKING:`."""
    source = inspect.getsource(sys.modules[package])
    ifs = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    block = next(node for node in ifs if ast.unparse(node.test) == "TYPE_CHECKING")
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


def import_own_module(name: str, what: str) -> ModuleType:
    """Import a module that the user names, looked for in the current folder first, as `python -m` does.

    Args:
        name: the module, with dots.
        what: what names it, for the error message: "core 'my_module:MyCore'".

    Raises:
        UserError: there is no such module, or its code fails.
    """
    if not {"", os.getcwd()} & set(sys.path):  # the console script's path begins with its own folder
        sys.path.insert(0, os.getcwd())
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{what}: there is no module {error.name!r} in {os.getcwd()} or installed") from None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not isinstance(error, SyntaxError):  # whose text has its place
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{reason} ({place.filename}, line {place.lineno})"
        raise UserError(f"{what}: module {name!r} cannot be imported: {reason}") from error


def import_optional(name: str, user: str, install: str) -> ModuleType:
    """Import a package that is not among the requirements.

    Args:
        name: the package, or a module of it.
        user: what needs it, for the error message: "--track wandb".
        install: what pip is to install: "'srwm-rl[wandb]'".

    Raises:
        UserError: it is not installed, or its own imports fail.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        if find_spec(package) is None:
            raise UserError(f"{user} needs {package}: pip install {install}") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{user} needs {name}, which cannot be imported: {reason}; pip install {install}") from error
