"""A run's checkpoints: taken between two updates, written beside the model of the same moment, taken up again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.run_folder import BEST, Run

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.agents.run.best_model import BestModelTracker
    from srwm_rl.agents.run.metrics import MetricsFile

FORMAT = 1
# Settings of one command, or that say where on whose disk: no part of a model that may be shared.
PRIVATE = ("log_folder", "resume", "override", "verify", "profile")


def capture(model: RecurrentAlgorithm, metrics: MetricsFile, best_model: BestModelTracker) -> dict[str, Any]:
    """Return the run's whole state, the place in its metrics and its best_model included."""
    from srwm_rl.agents.run.checkpoint_state import capture_state

    return {**capture_state(model), "metrics": metrics.position, "log": _pending(model), **best_model.to_tree()}


def _pending(model: RecurrentAlgorithm) -> dict[str, Any]:
    # SB3 writes what an update logged only after the next rollout; a run taken up in between would lose it.
    log = model.logger
    return {
        name: (value if math.isfinite(value) else None, log.name_to_excluded[name])
        for name, value in log.name_to_value.items()
    }


def save(
    run: Run, model: RecurrentAlgorithm, config: TrainConfig, state: dict[str, Any], best_model: BestModelTracker
) -> None:
    """Write the run's checkpoint and, of the same moment, its model, and its best model if that is a new one.

    A full disk costs a warning, not the run.
    """
    from srwm_rl.agents.run.checkpoint_state import without_environments
    from srwm_rl.storage.model_file import describe, save_model
    from srwm_rl.storage.safe_file import pack, write_file

    steps = state["counters"]["num_timesteps"]
    arrays, tree = pack(without_environments(state))
    sick = next((name for name, each in arrays.items() if each.dtype.kind == "f" and not np.isfinite(each).all()), None)
    if sick is not None:  # whatever made it so, the older checkpoints are worth more
        warn(f"not saved at {steps} steps: {sick.lstrip('/')} is not finite; the older checkpoints stay")
        return
    arrays, tree = pack(state)
    shared = {name: value for name, value in config.to_json().items() if name not in PRIVATE}
    described = describe(model.policy, shared, steps)
    try:
        _save_best(run, model, shared, state["best"], best_model)  # first: no checkpoint names a file that is not there
        write_file(
            run.file("checkpoint", steps),
            arrays,
            {**described, "format": FORMAT, "kind": "checkpoint", "state": tree},
        )
        save_model(run.file("model", steps), model.policy, shared, steps, state["policy"], state["levels_played"])
        run.sweep()
    except OSError as error:
        warn(f"could not save at {steps} steps ({error.strerror}); the older checkpoints stay, training goes on")
    except ValueError as error:  # an infinite number outside of the arrays, or more than a file may hold
        warn(f"not saved at {steps} steps: {error}; the older checkpoints stay")


def _save_best(
    run: Run,
    model: RecurrentAlgorithm,
    shared: dict[str, Any],
    best: dict[str, Any] | None,
    best_model: BestModelTracker,
) -> None:
    """Write the weights that the best score was measured on, unless they are written."""
    from srwm_rl.storage.model_file import save_model

    scored = None if best is None else best_model.scored(best["steps"])
    if best is None or scored is None or (path := run.file(BEST, scored.steps)).exists():
        return
    chosen = {name: best[name] for name in ("score", "of")}
    save_model(path, model.policy, shared, scored.steps, scored.weights, scored.levels_played, chosen)


def restore(model: RecurrentAlgorithm, run: Run, metrics: MetricsFile, best_model: BestModelTracker) -> dict[str, Any]:
    """Take up the run where its newest intact checkpoint was taken; say what is lost or not exact.

    Returns:
        What the last update had logged and not yet written: `{name: [value or None, excluded outputs]}`.

    Raises:
        UserError: there is no intact checkpoint, or it is of another architecture.
    """
    path, arrays, meta, lost = _newest_intact(run)
    if lost:
        warn(f"{len(lost)} newer checkpoint(s) cannot be used ({lost[0]}); going on from {path.name}")
    exact, pending = take_up(model, path, arrays, meta, metrics, best_model)
    run.forget_best(-1 if best_model.best is None else best_model.best.steps)
    if best_model.best is not None and not run.file(BEST, best_model.best.steps).exists():
        warn(f"the best model, {best_model.best}, is not in {run.path} any more; the next score is taken for the best")
        best_model.best = None
    _check_same_moment(model, path)
    then, now = 1 + len(meta["state"].get("processes", ())), model.processes.size
    if then != now:
        warn(
            f"the run was trained by {then} process(es) and goes on in {now}: weights, optimizer and counters go on, "
            "the environments start anew; it is no longer exact"
        )
    elif not exact:
        warn(f"{model.env.__class__.__name__} cannot tell its state: the weights go on, the episodes start anew")
    if not getattr(model, "synchronous", True):
        warn("learning overlaps playing: the run goes on, but not exactly as if never stopped (--synchronous does)")
    return pending


def follow_up(model: RecurrentAlgorithm, run: Run) -> None:
    """Take up, in a process other than 0, what process 0 restores; nothing is said or written.

    Raises:
        UserError: as from `restore`, or this process sees other files than process 0.
    """
    path, arrays, meta, _ = _newest_intact(run)
    take_up(model, path, arrays, meta, None, None)
    _check_same_moment(model, path)


def _check_same_moment(model: RecurrentAlgorithm, path: Path) -> None:
    for rank, name in enumerate(model.processes.all_gather(path.name)):
        if name != path.name:
            raise UserError(
                f"process {rank} goes on from {name:.80}, another one from {path.name}: all machines must see the same "
                f"files in {path.parent}"
            )


def take_up(
    model: RecurrentAlgorithm,
    path: Path,
    arrays: dict[str, np.ndarray],
    meta: dict[str, Any],
    metrics: MetricsFile | None,
    best_model: BestModelTracker | None,
) -> tuple[bool, dict[str, Any]]:
    """Put a checkpoint's content into a model and a best_model, and cut the metrics back to its moment, if there are any.

    Returns:
        Whether the environments went on where they were, and what was logged and not yet written.

    Raises:
        UserError: it is damaged, or of another architecture.
    """
    from srwm_rl.agents.run.checkpoint_state import restore_state
    from srwm_rl.scripts.config.foreign_settings import named
    from srwm_rl.scripts.training.checkpoint_schema import check_state

    state = _state(path, arrays, meta)
    check_state(model, state, str(path))
    try:
        with named(str(path)):
            exact = restore_state(model, state, str(path))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged: its state cannot be restored ({what:.200})") from error
    if best_model is not None:
        best_model.from_tree(state, str(path))
    if metrics is not None:
        metrics.cut(state["metrics"])
    return exact, dict(state.get("log", {}))


def _newest_intact(run: Run) -> tuple[Path, dict[str, np.ndarray], dict[str, Any], list[str]]:
    """Return the newest intact checkpoint, and why newer ones were passed over.

    Only the run's own files are looked at: a checkpoint holds what its simulator takes back without a question.
    """
    from srwm_rl.storage.safe_file import read_file

    lost: list[str] = []
    for path in reversed(run.files("checkpoint")):
        try:
            arrays, meta = read_file(path)
            number = meta.get("format")
            if meta.get("kind") == "checkpoint" and type(number) is int and 1 <= number <= FORMAT:
                return path, arrays, meta, lost
            lost.append(f"{path} is no checkpoint of this version of srwm-rl")
        except UserError as error:
            lost.append(str(error))
    why = f" ({lost[0]})" if lost else ""
    raise UserError(f"{run.path} has no intact checkpoint to go on from{why}; start a new run")


def _state(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    from srwm_rl.storage.safe_file import unpack

    state = meta.get("state")
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged: it has no state; use another checkpoint")
    try:
        unpacked: dict[str, Any] = unpack(arrays, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return unpacked


# What decides how large the networks and environments of a run are.
SIZES = ("env", "mode", "env_kwargs", "n_envs", "inputs", "core", "core_kwargs", "encoder_kwargs")


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Check a run's settings against its newest intact checkpoint, before anything is built of them.

    A width of a billion in config.json is refused here, by the weights that are there.

    Raises:
        UserError: there is no intact checkpoint, it contradicts itself, or the settings are not its own.
    """
    from srwm_rl.scripts.config.foreign_settings import check_environment, read_settings
    from srwm_rl.storage.model_file import FORMAT as MODEL_FORMAT
    from srwm_rl.storage.model_schema import build_policy, check_meta

    path, arrays, meta, _ = _newest_intact(run)
    if "policy" not in meta:  # of a version that did not describe the policy
        return
    described = {name: value for name, value in meta.items() if name != "state"}
    check_meta({**described, "kind": "model"}, str(path), MODEL_FORMAT)
    recorded = read_settings(meta["config"], str(path))
    for name in SIZES:
        ours, theirs = getattr(config, name), getattr(recorded, name)
        if ours != theirs:
            raise UserError(
                f"{path} is of another architecture, or of other environments: it was trained with {name} "
                f"{theirs!r:.120}, not {ours!r:.120}; use the same environments and n_envs"
            )
    state = _state(path, arrays, meta)
    weights = state.get("policy")
    if not _has_environments(state, config.n_envs) or not isinstance(weights, dict):
        raise UserError(f"{path} is damaged: it is not of {config.n_envs:,} environments")
    if not all(isinstance(each, np.ndarray) for each in weights.values()):
        raise UserError(f"{path} is damaged: its policy cannot be; use another checkpoint")
    policy = build_policy(meta, weights, str(path))
    check_environment(recorded, policy.observation_space, policy.action_space, str(path))


def _has_environments(state: dict[str, Any], n_envs: int) -> bool:
    """Say whether a state is of so many environments, which several processes shared equally."""
    others = state.get("processes", [])
    parts = [state, *others] if isinstance(others, list) else []
    each = (n_envs // max(1, len(parts)),)
    starts = [part.get("episode_starts") if isinstance(part, dict) else None for part in parts]
    return each[0] * len(parts) == n_envs and all(isinstance(one, np.ndarray) and one.shape == each for one in starts)
