"""A run's checkpoints: capture them between two updates, write them with the model, restore them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.checkpoint_state import capture_state, parts_of_state, restore_state, without_environments
from srwm_rl.agents.run.metrics import MetricsFile
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.foreign_settings import check_environment, named, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoint_schema import check_state
from srwm_rl.storage.model_file import FORMAT as MODEL_FORMAT
from srwm_rl.storage.model_file import describe, save_model
from srwm_rl.storage.model_schema import build_policy, check_meta
from srwm_rl.storage.run_folder import BEST, Run
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file

FORMAT = 1
Arrays = dict[str, np.ndarray]
# Settings that no model file contains, since it may be shared: those of one command, and a local path.
PRIVATE = ("log_folder", "resume", "override", "verify", "profile")
# Settings that decide the sizes of the networks and environments.
SIZES = ("env", "mode", "env_kwargs", "n_envs", "inputs", "core", "core_kwargs", "encoder_kwargs")


def capture(model: RecurrentAlgorithm, metrics: MetricsFile, best_model: BestModelTracker) -> dict[str, Any]:
    """Return the run's whole state, with the position in its metrics file and the best model's score."""
    log = model.logger
    # SB3 writes what an update logged only after the next rollout; a resumed run would lose it.
    pending = {
        name: (value if math.isfinite(value) else None, log.name_to_excluded[name])
        for name, value in log.name_to_value.items()
    }
    return {**capture_state(model), "metrics": metrics.position, "log": pending, **best_model.to_tree()}


def log_pending(model: RecurrentAlgorithm, pending: dict[str, Any]) -> None:
    """Log again what a checkpoint holds as logged and not yet written: `{name: [value or None, excluded outputs]}`."""
    for name, (value, exclude) in pending.items():
        model.logger.record(name, math.nan if value is None else value, tuple(exclude))


def save(
    run: Run, model: RecurrentAlgorithm, config: TrainConfig, state: dict[str, Any], best_model: BestModelTracker
) -> None:
    """Write a checkpoint, its model, and the best model if it is a new one.

    A state that cannot be written, as on a full disk, is a warning; the run continues.
    """
    steps = state["counters"]["num_timesteps"]
    arrays, _ = pack(without_environments(state))
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            warn(f"not saved at {steps} steps: {name.lstrip('/')} is not finite; the older checkpoints stay")
            return
    arrays, tree = pack(state)
    shared = {name: value for name, value in config.to_json().items() if name not in PRIVATE}
    meta = {**describe(model.policy, shared, steps), "format": FORMAT, "kind": "checkpoint", "state": tree}
    try:
        # The best model first: every checkpoint finds the one that it names.
        _save_best(run, model, shared, state["best"], best_model)
        write_file(run.file("checkpoint", steps), arrays, meta)
        save_model(run.file("model", steps), model.policy, shared, steps, state["policy"], state["levels_played"])
        run.sweep()
    except OSError as error:
        warn(f"could not save at {steps} steps ({error.strerror}); the older checkpoints stay, training continues")
    except ValueError as error:  # an infinite number outside of the arrays, or too large a file
        warn(f"not saved at {steps} steps: {error}; the older checkpoints stay")


def _save_best(
    run: Run,
    model: RecurrentAlgorithm,
    shared: dict[str, Any],
    best: dict[str, Any] | None,
    best_model: BestModelTracker,
) -> None:
    scored = None if best is None else best_model.scored(best["steps"])
    if best is None or scored is None or (path := run.file(BEST, scored.steps)).exists():
        return
    score = {name: best[name] for name in ("score", "of")}
    save_model(path, model.policy, shared, scored.steps, scored.weights, scored.levels_played, score)


def restore(model: RecurrentAlgorithm, run: Run, metrics: MetricsFile, best_model: BestModelTracker) -> dict[str, Any]:
    """Restore the newest intact checkpoint of a run, and warn of what is lost or not exact.

    Returns:
        What was logged and not yet written, for `log_pending`.

    Raises:
        UserError: there is no intact checkpoint, or it is of another architecture.
    """
    path, arrays, meta, errors = _newest_intact(run)
    if errors:
        warn(f"{len(errors)} newer checkpoint(s) cannot be used ({errors[0]}); resuming from {path.name}")
    is_exact, pending = restore_file(model, path, arrays, meta, metrics, best_model)
    run.forget_best(-1 if best_model.best is None else best_model.best.steps)
    if best_model.best is not None and not run.file(BEST, best_model.best.steps).exists():
        warn(f"the best model, {best_model.best}, is no longer in {run.path}; the next score becomes the best")
        best_model.best = None
    _check_same_file(model, path)
    size_before, size = len(parts_of_state(meta["state"])), model.processes.size
    if size_before != size:
        warn(
            f"the run was trained by {size_before} process(es) and resumes in {size}: weights, optimizer and counters "
            "are restored, the environments are reset; it is no longer exact"
        )
    elif not is_exact:
        warn(f"{model.env.__class__.__name__} cannot save its state: the weights are restored, the episodes start anew")
    if not getattr(model, "synchronous", True):
        warn("learning overlaps playing: the resumed run is not exactly as if never stopped (--synchronous is)")
    return pending


def restore_worker(model: RecurrentAlgorithm, run: Run) -> None:
    """Restore, in a process other than 0, the checkpoint that process 0 restores.

    Raises:
        UserError: as from `restore`, or this process reads another file than process 0.
    """
    path, arrays, meta, _ = _newest_intact(run)
    restore_file(model, path, arrays, meta, None, None)
    _check_same_file(model, path)


def _check_same_file(model: RecurrentAlgorithm, path: Path) -> None:
    for rank, name in enumerate(model.processes.all_gather(path.name)):
        if name != path.name:
            raise UserError(
                f"process {rank} resumes from {name:.80}, another one from {path.name}: all machines must see the same "
                f"files in {path.parent}"
            )


def restore_file(
    model: RecurrentAlgorithm,
    path: Path,
    arrays: Arrays,
    meta: dict[str, Any],
    metrics: MetricsFile | None,
    best_model: BestModelTracker | None,
) -> tuple[bool, dict[str, Any]]:
    """Restore a checkpoint's content, and truncate the metrics file to its moment.

    Returns:
        Whether the environments were restored exactly, and what was logged and not yet written.

    Raises:
        UserError: it is damaged, or of another architecture.
    """
    state = _state(path, arrays, meta)
    check_state(model, state, str(path))
    try:
        with named(str(path)):
            is_exact = restore_state(model, state, str(path))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged: its state cannot be restored ({reason:.200})") from error
    if best_model is not None:
        best_model.from_tree(state, str(path))
    if metrics is not None:
        metrics.cut(state["metrics"])
    return is_exact, dict(state.get("log", {}))


def is_checkpoint(meta: dict[str, Any]) -> bool:
    """Return whether a file is a checkpoint that this version can restore."""
    version = meta.get("format")
    return meta.get("kind") == "checkpoint" and type(version) is int and 1 <= version <= FORMAT


def _newest_intact(run: Run) -> tuple[Path, Arrays, dict[str, Any], list[str]]:
    """Return the newest intact checkpoint, and the errors of newer ones.

    Only files of the run's own folder are read: simulators restore states from checkpoints without checking them.
    """
    errors: list[str] = []
    for path in reversed(run.files("checkpoint")):
        try:
            arrays, meta = read_file(path)
        except UserError as error:
            errors.append(str(error))
            continue
        if is_checkpoint(meta):
            return path, arrays, meta, errors
        errors.append(f"{path} is no checkpoint of this version of srwm-rl")
    reason = f" ({errors[0]})" if errors else ""
    raise UserError(f"{run.path} has no intact checkpoint to resume from{reason}; start a new run")


def _state(path: Path, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    state = meta.get("state")
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged: it has no state; use another checkpoint")
    with named(str(path)):
        unpacked: dict[str, Any] = unpack(arrays, state)
    return unpacked


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Check a run's settings against its newest intact checkpoint, before anything is built from them.

    A width of a billion in config.json is refused here, by the shapes of the weights in the file.

    Raises:
        UserError: there is no intact checkpoint, it contradicts itself, or the settings are not its own.
    """
    path, arrays, meta, _ = _newest_intact(run)
    if "policy" not in meta:  # written by a version that did not describe the policy
        return
    description = {name: value for name, value in meta.items() if name != "state"}
    check_meta({**description, "kind": "model"}, str(path), MODEL_FORMAT)
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
    if not all(isinstance(array, np.ndarray) for array in weights.values()):
        raise UserError(f"{path} is damaged: its policy cannot be; use another checkpoint")
    policy = build_policy(meta, weights, str(path))
    check_environment(recorded, policy.observation_space, policy.action_space, str(path))


def _has_environments(state: dict[str, Any], n_envs: int) -> bool:
    """Return whether a state has this number of environments, shared equally by the processes that wrote it."""
    others = state.get("processes", [])
    parts = [state, *others] if isinstance(others, list) else []
    size, remainder = divmod(n_envs, max(1, len(parts)))
    starts = [part.get("episode_starts") if isinstance(part, dict) else None for part in parts]
    return bool(parts) and not remainder and all(isinstance(a, np.ndarray) and a.shape == (size,) for a in starts)
