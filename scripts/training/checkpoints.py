"""A run's checkpoints: capture them between two updates, write them with the model, restore them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.checkpoint_state import capture_state, parts_of_state, restore_state, without_environments
from srwm_rl.agents.run.metrics import MetricsFile
from srwm_rl.errors import UserError, named
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.foreign_settings import check_environment, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoint_schema import check_state, check_types
from srwm_rl.storage.model_file import FORMAT as MODEL_FORMAT
from srwm_rl.storage.model_file import describe, save_model
from srwm_rl.storage.model_schema import build_policy, check_meta
from srwm_rl.storage.run_folder import BEST, Run
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file

FORMAT = 1
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


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """Return the run's state."""
        if not isinstance(self.meta.get("state"), dict):
            raise UserError(f"{self.path} is damaged: it has no state; use another checkpoint")
        with named(str(self.path)):
            state: dict[str, Any] = unpack(self.arrays, self.meta["state"])
        return state


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
    best = state["best"]
    scored = None if best is None else best_model.scored(best["steps"])
    try:
        # The best model first: every checkpoint finds the one that it names.
        if scored is not None and not (path := run.file(BEST, scored.steps)).exists():
            score = {name: best[name] for name in ("score", "of")}
            save_model(path, model.policy, shared, scored.steps, scored.weights, scored.levels_played, score)
        write_file(run.file("checkpoint", steps), arrays, meta)
        save_model(run.file("model", steps), model.policy, shared, steps, state["policy"], state["levels_played"])
        run.sweep()
    except OSError as error:
        warn(f"could not save at {steps} steps ({error.strerror}); the older checkpoints stay, training continues")
    except ValueError as error:  # an infinite number outside of the arrays, or too large a file
        warn(f"not saved at {steps} steps: {error}; the older checkpoints stay")


def restore(
    model: RecurrentAlgorithm, run: Run, metrics: MetricsFile | None = None, best_model: BestModelTracker | None = None
) -> dict[str, Any]:
    """Restore the newest intact checkpoint of a run; process 0 warns of what is lost or not exact.

    Only process 0 has a metrics file, which is truncated to the checkpoint's moment, and a best model. Returns what was
    logged and not yet written, for `log_pending`.

    Raises:
        UserError: there is no intact checkpoint, it is of another architecture, or other processes read another one.
    """
    checkpoint, errors = _newest_intact(run)
    is_exact, pending = restore_checkpoint(model, checkpoint, metrics, best_model)
    if best_model is not None:
        _restore_best(run, best_model)
    path = checkpoint.path
    for rank, name in enumerate(model.processes.all_gather(path.name)):
        if name != path.name:
            raise UserError(
                f"process {rank} resumes from {name:.80}, another one from {path.name}: all machines must see the same "
                f"files in {path.parent}"
            )
    size_before, size = len(parts_of_state(checkpoint.meta["state"])), model.processes.size
    if not model.processes.first:
        return pending
    if errors:
        warn(f"{len(errors)} newer checkpoint(s) cannot be used ({errors[0]}); resuming from {path.name}")
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


def _restore_best(run: Run, best_model: BestModelTracker) -> None:
    """Delete best models that were scored later, and forget one whose file is lost."""
    best = best_model.best
    run.forget_best(-1 if best is None else best.steps)
    if best is not None and not run.file(BEST, best.steps).exists():
        warn(f"the best model, {best}, is no longer in {run.path}; the next score becomes the best")
        best_model.best = None


def restore_checkpoint(
    model: RecurrentAlgorithm,
    checkpoint: Checkpoint,
    metrics: MetricsFile | None,
    best_model: BestModelTracker | None,
) -> tuple[bool, dict[str, Any]]:
    """Restore a checkpoint's content, and truncate the metrics file to its moment.

    Returns:
        Whether the environments were restored exactly, and what was logged and not yet written.

    Raises:
        UserError: it is damaged, or of another architecture.
    """
    path, state = checkpoint.path, checkpoint.state()
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


def intact_checkpoints(run: Run, errors: list[str]) -> Iterator[Checkpoint]:
    """Yield the checkpoints that this version can restore, newest first, and append why others cannot be used.

    Only files of the run's own folder are read: simulators restore states from checkpoints without checking them.
    """
    for path in reversed(run.files("checkpoint")):
        try:
            checkpoint = Checkpoint(path, *read_file(path))
        except UserError as error:
            errors.append(str(error))
            continue
        version = checkpoint.meta.get("format")
        if checkpoint.meta.get("kind") == "checkpoint" and type(version) is int and 1 <= version <= FORMAT:
            yield checkpoint
        else:
            errors.append(f"{path} is no checkpoint of this version of srwm-rl")


def _newest_intact(run: Run) -> tuple[Checkpoint, list[str]]:
    """Return the newest intact checkpoint, and the errors of newer ones."""
    errors: list[str] = []
    for checkpoint in intact_checkpoints(run, errors):
        return checkpoint, errors
    reason = f" ({errors[0]})" if errors else ""
    raise UserError(f"{run.path} has no intact checkpoint to resume from{reason}; start a new run")


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Check a run's settings against its newest intact checkpoint, before anything is built from them.

    A width of a billion in config.json is refused here, by the shapes of the weights in the file.

    Raises:
        UserError: there is no intact checkpoint, it contradicts itself, or the settings are not its own.
    """
    checkpoint, _ = _newest_intact(run)
    path, meta = checkpoint.path, checkpoint.meta
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
    state = check_types(checkpoint.state(), str(path))
    parts = state.parts()
    if any(part.episode_starts.shape != (config.n_envs / len(parts),) for part in parts):
        raise UserError(f"{path} is damaged: it is not of {config.n_envs:,} environments")
    policy = build_policy(meta, state.policy, str(path))
    check_environment(recorded, policy.observation_space, policy.action_space, str(path))
