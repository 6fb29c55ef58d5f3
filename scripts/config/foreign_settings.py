"""What a file says of a run, checked before it decides what is imported and how much is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs

# Far above what anybody trains with, far below what takes a machine's memory.
MAX_N = {
    "n_envs": 2**16,
    "n_steps": 2**20,
    "batch_size": 2**26,
    "n_epochs": 2**16,
    "n_threads": 1024,
    "n_groups": 2**16,
}
MAX_STEPS = 10**15
MAX_OF_ENVIRONMENTS = {"n_threads": 256}
MAX_OTHER = 10**6  # of a number among an environment's settings


def read_settings(data: Any, source: str) -> TrainConfig:
    """Return the settings of a run that a file holds.

    Raises:
        UserError: one of another type, unknown or out of range; the message names the file.
    """
    hints = get_type_hints(TrainConfig, include_extras=True)
    for name, value in data.items() if isinstance(data, dict) else ():
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{source}: the run's settings are damaged: {name} cannot be {value!r:.60}")
        if type(value) is int and abs(value) > MAX_N.get(name, MAX_STEPS):
            raise UserError(f"{source}: the run's settings are damaged: {name} is out of range")
    with named(source):
        settings = TrainConfig.from_json(data)
        for levels in (settings.levels, settings.eval_levels):
            LevelRange.parse(levels)
        return settings


def _fits(value: Any, hint: Any) -> bool:
    """Say whether JSON's `value` is of a dataclass field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, arguments[0]) for each in value)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint is NoneType else type(value) is hint


@contextmanager
def named(source: str) -> Iterator[None]:
    """Let every `UserError` in the block begin with the file's name."""
    try:
        yield
    except UserError as error:
        raise error if source in str(error) else UserError(f"{source}: {error}") from error


def allow_env(env: str, given: str | None, source: str) -> None:
    """Let the module of an environment "module:id" be imported only if the command line itself names it.

    Raises:
        UserError: a file names such an environment, and the command line does not.
    """
    if ":" in env.strip().removeprefix("srwm_rl:") and given != env:
        raise UserError(f"{source} needs environment {env!r:.120}, code that no file can start: add --env {env:.120}")


def check_environment(trained: TrainConfig, observation_space: Any, action_space: Any, source: str) -> None:
    """Check that an environment with a file's settings fits the file's policy; one is made to see.

    Raises:
        UserError: a setting out of range, settings that make no environment, or one that another policy belongs to.
    """
    for name, value in pairs(trained.env_kwargs, "env_kwargs").items():
        most = MAX_OF_ENVIRONMENTS.get(name, MAX_OTHER)
        if isinstance(value, int | float) and not abs(value) <= most:
            raise UserError(f"{source} cannot be used: its environment's {name:.60} is out of range")
        if name == "render_mode" and value == "human":
            raise UserError(f"{source} cannot be used: its environment would open a window")
    observed, acted = _spaces(trained, source)
    if observed != observation_space or acted != action_space:
        raise UserError(
            f"{source} contradicts itself: its policy observes or acts in another way than {trained.env!r:.120} with "
            "the settings in it"
        )


def _spaces(trained: TrainConfig, source: str) -> tuple[Any, Any]:
    from srwm_rl.envs.make import make_vec_env, resolve

    try:
        with named(source):
            env = make_vec_env(
                trained.env,
                len(resolve(trained.env).names),
                trained.levels,
                0,
                trained.mode,
                pairs(trained.env_kwargs, "env_kwargs"),
                trained.inputs,
                trained.reward_clip or None,
            )
    except UserError:
        raise
    except Exception as error:  # an environment of any package, with settings of any type
        raise UserError(
            f"{source} cannot be used: its settings make no environment ({type(error).__name__})"
        ) from error
    env.close()
    return env.observation_space, env.action_space
