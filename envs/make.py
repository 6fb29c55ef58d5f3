"""Environments by name (`--env coinrun,maze`)."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import gymnasium

from srwm_rl.envs.batch import BatchEnv
from srwm_rl.envs.gymnasium_batch import GymnasiumBatch
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.envs.procgen.games import GAME_SETS, GAMES, OPTIONS, PROCGEN_IDS, SETTINGS, check_names, parse_games
from srwm_rl.envs.procgen.published import PROCGEN_NORMALIZATION
from srwm_rl.envs.procgen.simulator import find_distribution
from srwm_rl.envs.tasks import TASK_IDS, TASKS
from srwm_rl.envs.wrappers.attempts import AttemptsBatch
from srwm_rl.envs.wrappers.frame_stack import FrameStackBatch
from srwm_rl.envs.wrappers.named_wrapper import EnvWrapper
from srwm_rl.envs.wrappers.shuffled_actions import ShuffledActionsBatch
from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.lazy import import_own_module

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv


PACKAGES = {
    "ale_py": r"ALE/.+|\w+NoFrameskip-v[04]",
    "minigrid": r"(MiniGrid|BabyAI)-.+",
    "popgym": r"popgym-.+",
}
"""Packages that register their environments when they are imported -> their ids."""


class EnvSpec(NamedTuple):
    """What an `env` names: its kind, and its games, task or Gymnasium id."""

    kind: Literal["procgen", "task", "gymnasium"]
    names: tuple[str, ...]


def resolve(env: str) -> EnvSpec:
    """Return what `env` names: ProcGen games ("coinrun,maze", "paper6"), a task, or a Gymnasium id.

    Raises:
        UserError: If nothing is called so (with the nearest name).
    """
    if not isinstance(env, str) or not env.strip():
        raise UserError("env must be the name of an environment, such as 'coinrun', 'recall' or 'CartPole-v1'")
    name = short_name(env)
    if name in TASKS:
        return EnvSpec("task", (name,))
    if name in GAME_SETS or {part.strip() for part in name.split(",")} & set(GAMES):
        return EnvSpec("procgen", parse_games(name))
    return EnvSpec("gymnasium", (_gymnasium_id(name),))


def short_name(env: str) -> str:
    """Return the name of a game or a task for its Gymnasium id ("srwm_rl/Recall-v0": "recall"); other names as is."""
    name = env.strip().removeprefix("srwm_rl:")
    return PROCGEN_IDS.get(name, TASK_IDS.get(name, name))


def _gymnasium_id(name: str) -> str:
    module, _, env_id = name.rpartition(":")
    package = None if module else package_of(env_id)
    if package is not None and find_spec(package) is None:
        raise UserError(f"env {name!r} is of a package that is not installed: pip install {package.replace('_', '-')}")
    if module:
        import_own_module(module, f"env {name!r}")
    try:
        if package:
            import_module(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of ids that have newer versions: the user chose
            gymnasium.spec(env_id)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"env {name!r}: package {package!r} cannot be imported: {reason}") from error
    except (gymnasium.error.Error, ValueError) as error:
        for installed in filter(find_spec, PACKAGES):
            with suppress(Exception):  # a hint alone depends on it
                import_module(installed)
        known = [*GAMES, *GAME_SETS, *TASKS, *gymnasium.registry]
        hint = did_you_mean(name, known)
        if "known:" in hint:  # Gymnasium's whole list would not be one clear line
            hint = f"; give a ProcGen game, a task ({', '.join(TASKS)}) or a registered Gymnasium id"
        raise UserError(f"there is no environment {name!r}{hint}") from error
    return name


def package_of(env_id: str) -> str | None:
    """Return the package of `PACKAGES` that registers an id; None: none of them."""
    return next((package for package, pattern in PACKAGES.items() if re.fullmatch(pattern, env_id)), None)


def list_envs() -> dict[str, list[str]]:
    """List names that `resolve` knows and that can be made here, by kind; those of other packages by package."""
    has_procgen = find_distribution() is not None
    return {
        "procgen": list(GAMES) if has_procgen else [],
        "game sets": list(GAME_SETS) if has_procgen else [],
        "task": list(TASKS),
        "gymnasium": sorted(
            env_id for env_id in gymnasium.registry if _is_of_gymnasium(env_id) and _can_be_made(env_id)
        ),
        **{package: _ids_of(package) for package in PACKAGES if find_spec(package) is not None},
    }


def _is_of_gymnasium(env_id: str) -> bool:
    entry_point = gymnasium.registry[env_id].entry_point
    return isinstance(entry_point, str) and entry_point.startswith("gymnasium.")


def _can_be_made(env_id: str) -> bool:
    """Return whether an environment can be made: not without MuJoCo or JAX, or of a version that was taken away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ids that have newer versions
        try:
            gymnasium.make(env_id).close()
        except Exception:  # each package raises its own
            return False
    return True


def _ids_of(package: str) -> list[str]:
    import_module(package)
    return sorted(env_id for env_id in gymnasium.registry if package_of(env_id) == package)


def make_batch_env(
    env: str,
    n_envs: int,
    levels: str | LevelRange,
    seed: int,
    mode: str = "easy",
    env_kwargs: dict[str, Any] | None = None,
    attempts: int = 1,
    shuffle_actions: bool = False,
    wrappers: Sequence[EnvWrapper] = (),
    frame_stack: int = 1,
) -> BatchEnv:
    """Make `n_envs` environments.

    Args:
        env: What `resolve` understands.
        n_envs: How many; with several games a multiple of their number.
        levels: The levels that episodes are drawn from.
        seed: Start of the random level sequences.
        mode: ProcGen's distribution mode.
        env_kwargs: Further arguments of the environment.
        attempts: Episodes of one level that form a trial, one episode for the agent; see `AttemptsBatch`.
        shuffle_actions: Draw for every level which action does what; see `ShuffledActionsBatch`.
        wrappers: Functions that wrap each of a Gymnasium id's environments, the first innermost; see `NamedWrapper`.
        frame_stack: Number of observations that are stacked; see `FrameStackBatch`.

    Raises:
        UserError: If an argument is wrong.
    """
    batch_env = _make_plain(env, n_envs, levels, seed, mode, dict(env_kwargs or {}), wrappers)
    if frame_stack != 1:
        batch_env = FrameStackBatch(batch_env, frame_stack)
    if shuffle_actions:
        batch_env = ShuffledActionsBatch(batch_env)
    return batch_env if attempts == 1 else AttemptsBatch(batch_env, attempts)


def _make_plain(
    env: str,
    n_envs: int,
    levels: str | LevelRange,
    seed: int,
    mode: str,
    kwargs: dict[str, Any],
    wrappers: Sequence[EnvWrapper],
) -> BatchEnv:
    spec = resolve(env)
    if wrappers and spec.kind != "gymnasium":
        raise UserError(
            f"wrappers are for Gymnasium environments, one by one; {env} is stepped in a batch of its own: leave "
            "--wrapper and --atari out (--frame-stack works for all)"
        )
    if spec.kind == "procgen":
        check_names(env, kwargs, {*SETTINGS, *OPTIONS})
        return ProcgenBatch(spec.names, n_envs, levels, mode, seed, **kwargs)
    if mode != "easy":
        raise UserError(f"mode {mode!r} is for ProcGen games; {spec.names[0]} has no modes, leave it out")
    if spec.kind == "task":
        task: Any = TASKS[spec.names[0]]
        check_settings(env, kwargs, set(inspect.signature(task).parameters) - {"n_envs", "levels", "seed"})
        batch_env: BatchEnv = task(n_envs, levels, seed, **kwargs)
        return batch_env
    return GymnasiumBatch(spec.names[0], n_envs, levels, seed, kwargs, wrappers)


def make_vec_env(
    env: str,
    n_envs: int,
    levels: str | LevelRange,
    seed: int,
    mode: str = "easy",
    env_kwargs: dict[str, Any] | None = None,
    inputs: Sequence[str] = ("action", "reward", "step"),
    reward_clip: float | None = 1.0,
    attempts: int = 1,
    shuffle_actions: bool = False,
    on_nan: Literal["stop", "skip"] = "stop",
    wrappers: Sequence[EnvWrapper] = (),
    frame_stack: int = 1,
) -> VecEnv:
    """Make `n_envs` environments for Stable-Baselines3, with memory inputs unless `inputs` is empty.

    See `make_batch_env`, `VecMemoryInputs` and `BatchVecEnv` for the arguments.
    """
    from srwm_rl.envs.vec_env import BatchVecEnv

    of_batch = (mode, env_kwargs, attempts, shuffle_actions, wrappers, frame_stack)
    batch_env = make_batch_env(env, n_envs, levels, seed, *of_batch)
    venv = BatchVecEnv(batch_env, on_nan)
    return _with_inputs(venv, inputs, reward_clip)


def make_levels_env(
    env: str,
    n_envs: int,
    levels: Sequence[int] | LevelRange | str,
    repeats: int,
    seed: int,
    mode: str = "easy",
    env_kwargs: dict[str, Any] | None = None,
    inputs: Sequence[str] = ("action", "reward", "step"),
    reward_clip: float | None = 1.0,
    attempts: int = 1,
    shuffle_actions: bool = False,
    wrappers: Sequence[EnvWrapper] = (),
    frame_stack: int = 1,
) -> VecEnv:
    """Make environments that play every level (of every game) exactly `repeats` times; see `LevelsVecEnv`.

    With `attempts`, a level is played by one trial. The result has `remaining`, the number of episodes still to
    finish, with or without memory inputs.
    """
    from srwm_rl.envs.wrappers.fixed_levels import LevelsVecEnv

    wanted = LevelRange.parse(levels) if isinstance(levels, str) else levels
    of_batch = (mode, env_kwargs, attempts, shuffle_actions, wrappers, frame_stack)
    batch_env = make_batch_env(env, n_envs, "all", seed, *of_batch)
    venv = LevelsVecEnv(batch_env, wanted, repeats)
    return _with_inputs(venv, inputs, reward_clip)


def _with_inputs(venv: VecEnv, inputs: Sequence[str], reward_clip: float | None) -> VecEnv:
    from srwm_rl.envs.wrappers.memory_inputs import VecMemoryInputs

    return VecMemoryInputs(venv, inputs, reward_clip) if inputs else venv


def normalizer(
    env: str, mode: str = "easy", env_kwargs: dict[str, Any] | None = None, attempts: int = 1
) -> dict[str, tuple[float, float]]:
    """Return `game -> (return worth 0, return worth 1)` for those games of `env` where it is known.

    ProcGen's are published (`PROCGEN_NORMALIZATION`); a task's are its random and its best possible mean return. Those
    of a trial are `attempts` times as large, and not known where luck, which every attempt repeats, decides what can be
    earned (`TaskBatch.best_averages_luck`).
    """
    if attempts > 1 and (task := TASKS.get(short_name(env))) and task.best_averages_luck:
        return {}
    bounds = _normalizer_of_episodes(env, mode, env_kwargs or {})
    return {game: (low * attempts, high * attempts) for game, (low, high) in bounds.items()}


def _normalizer_of_episodes(env: str, mode: str, env_kwargs: dict[str, Any]) -> dict[str, tuple[float, float]]:
    spec = resolve(env)
    if spec.kind == "procgen":
        table = PROCGEN_NORMALIZATION.get(mode, {})
        return {game: table[game] for game in spec.names if game in table}
    if spec.kind == "task":
        bounds = TASKS[spec.names[0]].score_range(**env_kwargs)
        return {} if bounds is None else {spec.names[0]: bounds}
    return {}
