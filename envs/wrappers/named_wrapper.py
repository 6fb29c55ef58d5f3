"""Gymnasium wrappers that are named by text, "module:Class"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.lazy import import_own_module

Env = gymnasium.Env[Any, Any]
EnvWrapper = Callable[[Env], Env]


@dataclass(frozen=True)
class NamedWrapper:
    """A wrapper class, or another function of an environment, with its keyword arguments.

    Args:
        target: "module:Class"; the module is imported at construction, from the current folder or where installed.
        kwargs: its keyword arguments.
        label: what error messages call it; "": its target.

    Raises:
        UserError: there is no such module or class, or the module's code fails.
    """

    target: str
    kwargs: dict[str, Any]
    label: str = ""

    def __post_init__(self) -> None:
        self._wrapper()

    def _wrapper(self) -> Callable[..., Any]:
        name, _, attribute = self.target.partition(":")
        module = import_own_module(name, f"wrapper {self.target!r}")
        wrapper: Any = getattr(module, attribute, None)
        if not callable(wrapper):
            known = [name for name, value in vars(module).items() if inspect.isclass(value)]
            hint = did_you_mean(attribute, known)
            raise UserError(
                f"wrapper {self.target!r}: {name} has no class {attribute!r}{hint if 'did you mean' in hint else ''}"
            )
        constructor: Callable[..., Any] = wrapper
        return constructor

    def __call__(self, env: Env) -> Env:
        """Return a wrapped environment; see `wrap`."""
        return wrap(self.label or f"wrapper {self.target!r}", partial(self._wrapper(), **self.kwargs), env)


def wrap(name: str, wrapper: EnvWrapper, env: Env) -> Env:
    """Return an environment in a wrapper, which error messages call `name`.

    Raises:
        UserError: it cannot be wrapped, or the result is no environment.
    """
    try:
        wrapped = wrapper(env)
    except Exception as error:
        reason = " ".join(str(error).split())
        of = env.spec.id if env.spec is not None else type(env).__name__
        raise UserError(f"{name} cannot wrap {of}: {type(error).__name__}: {reason}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise UserError(f"{name} returns a {type(wrapped).__name__}, no gymnasium.Env")
    return wrapped
