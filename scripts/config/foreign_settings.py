"""The settings of a run in a file, checked before anything is imported or built from them."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_vec_env, resolve
from srwm_rl.errors import UserError, named
from srwm_rl.scripts.cli import foreign_wrappers
from srwm_rl.scripts.config.settings import TrainConfig, Wrappers, pairs
from srwm_rl.storage.strict_json import convert

MAX_THREADS, MAX_NUMBER = 256, 10**6  # of an environment's settings


def read_settings(data: Any, source: str) -> TrainConfig:
    """Return the settings of a run that a file holds.

    Raises:
        UserError: a setting of another type, unknown or out of range; the message names the file.
    """
    names = {field.name for field in fields(TrainConfig)}
    with named(source):
        for name in data if isinstance(data, dict) else ():
            if name not in names:
                raise UserError(
                    f"the run's settings have an unknown name {name!r}; it is from another version of srwm-rl"
                )
        settings = convert(data, TrainConfig, "the run's settings are damaged")
        for levels in (settings.levels, settings.eval_levels):
            LevelRange.parse(levels)
        return settings


def allow_env(env: str, requested: str | None, source: str) -> None:
    """Check that an environment "module:id", whose module is imported, is also named by the command line."""
    if ":" in env.strip().removeprefix("srwm_rl:") and requested != env:
        raise UserError(
            f"{source} needs environment {env!r:.120}, code that is not imported because a file names it: "
            f"add --env {env:.120}"
        )


def allow_wrappers(wrappers: Wrappers, requested: Wrappers, source: str) -> None:
    """Check that the wrappers of a file, whose modules are imported, are also named by the command line."""
    if foreign_wrappers(wrappers) and wrappers != requested:
        options = " ".join(f"--wrapper {shlex.join(words)}" for words in wrappers)
        raise UserError(
            f"{source} needs wrappers, code that is not imported because a file names it: add {options:.500}"
        )


def check_env_kwargs(trained: TrainConfig, source: str) -> None:
    """Check the settings of a file's environment: no number is so large that making it would take all memory.

    Raises:
        UserError: a setting is out of range.
    """
    for name, value in pairs(trained.env_kwargs, "env_kwargs").items():
        if isinstance(value, int | float) and not abs(value) <= (MAX_THREADS if name == "n_threads" else MAX_NUMBER):
            raise UserError(f"{source} cannot be used: its environment's {name:.60} is out of range")
        if name == "render_mode" and value == "human":
            raise UserError(f"{source} cannot be used: its environment would open a window")


def check_environment(trained: TrainConfig, observation_space: Any, action_space: Any, source: str) -> None:
    """Make an environment with a file's settings and check that its spaces are the policy's.

    Raises:
        UserError: a setting is out of range, the settings make no environment, or one with other spaces.
    """
    check_env_kwargs(trained, source)
    try:
        with named(source):
            n_envs = len(resolve(trained.env).names)
            env = make_vec_env(trained.env, n_envs, trained.levels, 0, **trained.env_settings())
    except Exception as error:  # an environment of any package, with settings of any type
        if isinstance(error, UserError):
            raise
        reason = type(error).__name__
        raise UserError(f"{source} cannot be used: its settings make no environment ({reason})") from error
    env.close()
    if (env.observation_space, env.action_space) != (observation_space, action_space):
        raise UserError(
            f"{source} contradicts itself: its policy has other observations or actions than {trained.env!r:.120} with "
            "its settings"
        )
