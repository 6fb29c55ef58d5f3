"""The installed package that an environment comes from."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import gymnasium

from srwm_rl.envs.make import resolve
from srwm_rl.envs.procgen.simulator import find_distribution


def versions(env: str) -> dict[str, str]:
    """Return the name and the version of the distribution that an environment comes from; {} for our own tasks.

    Raises:
        UserError: there is no such environment.
    """
    kind = resolve(env).kind
    if kind == "procgen":
        distribution = find_distribution()
        return {} if distribution is None else {distribution.name: distribution.version}
    if kind == "task":
        return {}
    entry = entry_point(env)
    module = re.split(r"\W", str(getattr(entry, "__module__", entry)))[0]
    names = metadata.packages_distributions().get(module, [])
    return {name: metadata.version(name) for name in names[:1]}


def entry_point(env: str) -> Any:
    """Return what makes a Gymnasium environment: a callable, or its name; `resolve` has imported its module."""
    return gymnasium.spec(env.rpartition(":")[2]).entry_point
