"""A run's checkpoints: capture them between two updates, write them with the model, restore them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.logger import Logger

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.checkpoint_state import capture_state, parts_of_state, restore_state, undisturbed
from srwm_rl.agents.run.metrics import MetricsFile, OptionalOutput
from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError, named
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.foreign_settings import check_env_kwargs, check_environment, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoint_schema import State, check_state, size_of_moments
from srwm_rl.scripts.training.tracking import WandbOutput, open_tensorboard
from srwm_rl.storage.model_file import FORMAT as MODEL_FORMAT
from srwm_rl.storage.model_file import describe, save_model
from srwm_rl.storage.model_schema import build_policy, check_meta
from srwm_rl.storage.run_folder import BEST, CHECKPOINTS, TENSORBOARD, Run, title_of
from srwm_rl.storage.safe_file import check_content, pack, publish, read_file, serialise, stage, unpack
from srwm_rl.storage.seen_levels import SeenLevels
from srwm_rl.storage.strict_json import convert
from srwm_rl.zoo import PREFIX

FORMAT = 1
# Settings that no model file contains, since it may be shared: those of one command, and a local path.
PRIVATE = ("log_folder", "resume", "override", "verify", "profile", "config")
# Settings that decide the sizes of the networks and environments.
SIZES = ("env", "mode", "env_kwargs", "attempts", "n_envs", "inputs", "core", "core_kwargs", "encoder_kwargs")
ROOM = 2**15  # bytes that a checkpoint may grow by: names of moments, the last episodes, the log
ENVIRONMENTS = re.compile(r"(/processes/\d+)?/environments/")  # arrays of the environments' own state


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    state: dict[str, Any]  # the run's, with the arrays in it

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a file of the run's own folder: simulators restore states from checkpoints without checking them.

        Raises:
            UserError: this version cannot restore it.
        """
        arrays, meta = read_file(path)
        version, tree = meta.get("format"), meta.get("state")
        if meta.get("kind") != "checkpoint" or type(version) is not int or not 1 <= version <= FORMAT:
            raise UserError(f"{path} is no checkpoint of this version of srwm-rl")
        if not isinstance(tree, dict):
            raise UserError(f"{path} is damaged: it has no state; use another checkpoint")
        with named(str(path)):
            return cls(path, arrays, meta, unpack(arrays, tree))

    @classmethod
    def newest(cls, run: Run) -> tuple[Checkpoint, list[str]]:
        """Return a run's newest intact checkpoint, and the errors of newer ones."""
        errors: list[str] = []
        for path in reversed(run.files("checkpoint")):
            try:
                return cls.read(path), errors
            except UserError as error:
                errors.append(str(error))
        reason = f" ({errors[0]})" if errors else ""
        raise UserError(f"{run.path} has no intact checkpoint to resume from{reason}; start a new run")

    def check(self, config: TrainConfig) -> SRWMPolicy:
        """Return a policy as the file describes it, without its weights.

        Raises:
            UserError: it describes none, contradicts itself, or its run has other settings than `config`.
        """
        path = str(self.path)
        description = {name: value for name, value in self.meta.items() if name != "state"}
        check_meta({**description, "kind": "model"}, path, MODEL_FORMAT)
        recorded = read_settings(self.meta["config"], path)
        for name in SIZES:
            ours, theirs = getattr(config, name), getattr(recorded, name)
            if ours != theirs:
                raise UserError(
                    f"{path} is of another architecture, or of other environments: it was trained with {name} "
                    f"{theirs!r:.120}, not {ours!r:.120}; use the same environments and n_envs"
                )
        state = convert(self.state, State, f"{path} is damaged")
        parts = state.parts()
        if any(part.episode_starts.shape != (config.n_envs / len(parts),) for part in parts):
            raise UserError(f"{path} is damaged: it is not of {config.n_envs:,} environments")
        return build_policy(self.meta, state.policy, path)


class Session:
    """A run that this process trains: its model, and what a checkpoint holds beside the model's state.

    Process 0 writes the run's files. Others make the same calls and write nothing.

    Attributes:
        run: its folder.
        metrics: the log, which a resumed run continues from the checkpoint's moment.
        best_model: the best score and the levels played.
    """

    def __init__(self, config: TrainConfig, model: RecurrentAlgorithm, run: Run, log: Path) -> None:
        self.config, self.model, self.run = config, model, run
        self.metrics = MetricsFile(log)
        self._failures: set[str] = set()  # what could not be saved the last time
        levels = LevelRange.parse(config.levels)
        self.best_model = BestModelTracker(SeenLevels(levels.start, levels.stop))
        lost = self._on_lost(log, "its rows are kept and written later")
        model.set_logger(Logger(str(run.path), [OptionalOutput(lambda: self.metrics, lost, reopen=False)]))

    def capture(self) -> dict[str, Any]:
        """Return the run's whole state, with the position in its metrics file and the best model's score."""
        log = self.model.logger
        # SB3 writes what an update logged only after the next rollout; a resumed run would lose it.
        pending = {
            name: (value if math.isfinite(value) else None, log.name_to_excluded[name])
            for name, value in log.name_to_value.items()
        }
        state = capture_state(self.model)
        return {**state, "metrics": self.metrics.position(), "log": pending, **self.best_model.to_tree()}

    def open_logs(self) -> None:
        """Write the log to the run's folder for TensorBoard, too, and to what `--track` names.

        Raises:
            UserError: that refuses to start.
        """
        folder, outputs = self.run.path / TENSORBOARD, self.model.logger.output_formats
        lost = self._on_lost(folder, "its rows are lost until it can be")
        outputs.insert(0, OptionalOutput(partial(open_tensorboard, self.config, folder), lost))
        if self.config.track == "wandb":
            tracker = WandbOutput(self.config, self.run)
            output = OptionalOutput(lambda: tracker, self._on_lost("to wandb", "its rows are lost"), reopen=False)
            output.output = tracker  # closed even if nothing is logged
            outputs.append(output)

    def _on_lost(self, path: object, consequence: str) -> Callable[[OSError], None]:
        return lambda error: warn(
            f"cannot write {path} ({error.strerror or error}): {consequence}, and training continues"
        )

    def save(self, state: dict[str, Any]) -> bool:
        """Write a checkpoint, its model, and the best model if it is a new one; return whether all of it was written.

        A state that cannot be written, as on a full disk, is a warning; the run continues.
        """
        if not self.model.processes.first:
            return True
        steps = state["counters"]["num_timesteps"]
        arrays, tree = pack(state)
        failures = self._restore_folder()
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not ENVIRONMENTS.match(name) and not np.isfinite(array).all():
                failures[name] = f"not saved: {name.lstrip('/')} is not finite"
                break
        for what, write in () if failures else self._writers(state, arrays, tree):
            try:
                write()
            except OSError as error:
                failures[what] = _not_written(what, error)
            except ValueError as error:  # an infinite number outside of the arrays, or too large a file
                failures[what] = f"cannot save {what}: {error}"
        for what, failure in failures.items():
            if what not in self._failures:
                warn(f"at {steps:,} steps: {failure}; the older files stay, and it is tried again")
        if self._failures and not failures:
            warn(f"saved again, at {steps:,} steps")
        self._failures = set(failures)
        return not failures

    def _writers(
        self, state: dict[str, Any], arrays: dict[str, np.ndarray], tree: Any
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the steps of a save, each after the one before was called or has failed.

        The checkpoint is written first and gets its name after the best model has: a full disk costs the best model
        before the checkpoint, and a killed process leaves no checkpoint that names a best model which is not there.
        """
        run, policy, steps, best = self.run, self.model.policy, state["counters"]["num_timesteps"], state["best"]
        shared = self._shared()
        meta = {**self._meta(state), "format": FORMAT, "kind": "checkpoint", "state": tree}
        yield str(self.metrics.path), self._restore_log
        path, staged = run.file("checkpoint", steps), list[Path]()
        yield str(path), lambda: staged.append(stage(path, serialise(arrays, meta)))
        scored = None if best is None else self.best_model.scored(best["steps"])
        if scored is not None and not (best_path := run.file(BEST, scored.steps)).exists():
            score = {name: best[name] for name in ("score", "of")}
            yield (
                str(best_path),
                lambda: save_model(
                    best_path, policy, shared, scored.steps, scored.weights, scored.levels_played, score
                ),
            )
        if staged:
            yield str(path), lambda: publish(staged[0], path)
        model_path = run.file("model", steps)
        yield (
            str(model_path),
            lambda: save_model(model_path, policy, shared, steps, state["policy"], state["levels_played"]),
        )
        yield str(run.path / CHECKPOINTS), run.sweep

    def _restore_folder(self) -> dict[str, str]:
        """Make the run's folder again where it was moved or deleted; return the reason if that is not possible."""
        path = self.run.path
        try:
            if self.run.restore():
                with suppress(OSError):  # tried again below
                    self.metrics.restore()
                warn(f"{path} was moved, replaced or deleted: it is made again, and the run is saved there")
        except OSError as error:
            return {str(path): _not_written(path, error)}
        return {}

    def _restore_log(self) -> None:
        if self.metrics.restore():
            warn(f"{self.metrics.path} was moved, replaced or deleted: it is written again")

    def check(self, state: dict[str, Any]) -> None:
        """Check that a run with such a state can be saved and loaded, before there is anything to lose.

        Raises:
            UserError: a file of it could not be read again.
            OSError: the disk takes no file of the size that a checkpoint has after the first update.
        """
        model = self.model
        if not model.processes.first:
            return
        path = self.run.file("checkpoint", state["counters"]["num_timesteps"])
        with named("this run could not be saved"), undisturbed(model.device):
            arrays, tree = pack(state)
            blob = serialise(arrays, {**self._meta(state), "format": FORMAT, "kind": "checkpoint", "state": tree})
            meta = check_content(blob)
            loaded = Checkpoint(path, arrays, meta, unpack(arrays, meta["state"])).check(self.config)
            check_env_kwargs(self.config, str(path))
            for ours, theirs in (
                (model.observation_space, loaded.observation_space),
                (model.action_space, loaded.action_space),
            ):
                if ours != theirs:
                    raise UserError(f"a file keeps the space {ours} as {theirs}; use another one")
        later = 0 if state["optimizer"] else size_of_moments(model.policy.optimizer) + ROOM
        stage(path, blob + bytes(later)).unlink()

    def _write_missing_model(self, state: dict[str, Any]) -> None:
        """Write the model of a checkpoint beside which it is missing, as a disk may have been full in between."""
        steps = state["counters"]["num_timesteps"]
        path = self.run.file("model", steps)
        if not path.exists() and "levels_played" in state:
            try:
                save_model(path, self.model.policy, self._shared(), steps, state["policy"], state["levels_played"])
            except OSError as error:
                warn(f"{_not_written(path, error)}; training continues")

    def _meta(self, state: dict[str, Any]) -> dict[str, Any]:
        return describe(self.model.policy, self._shared(), state["counters"]["num_timesteps"])

    def _shared(self) -> dict[str, Any]:
        shared = {name: value for name, value in self.config.to_json().items() if name not in PRIVATE}
        if (origin := self.config.init_from) is not None and not origin.startswith(PREFIX):
            shared["init_from"] = title_of(origin)  # without the folder
        return shared

    def restore(self, checkpoint: Checkpoint) -> bool:
        """Restore a checkpoint's content, and truncate the metrics file to its moment.

        Returns:
            Whether the environments were restored exactly.

        Raises:
            UserError: it is damaged, or of another architecture.
        """
        path, state = str(checkpoint.path), checkpoint.state
        check_state(self.model, state, path)
        try:
            with named(path):
                is_exact = restore_state(self.model, state, path)
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is damaged: its state cannot be restored ({reason:.200})") from error
        self.best_model.from_tree(state, path)
        self.metrics.cut(state["metrics"])
        for name, (value, exclude) in state.get("log", {}).items():
            self.model.logger.record(name, math.nan if value is None else value, tuple(exclude))
        return is_exact

    def resume(self) -> None:
        """Restore the newest intact checkpoint; process 0 warns of what is lost or not exact.

        Raises:
            UserError: there is none, it is of another architecture, or other processes read another one.
        """
        checkpoint, errors = Checkpoint.newest(self.run)
        is_exact, path, model = self.restore(checkpoint), checkpoint.path, self.model
        for rank, name in enumerate(model.processes.all_gather(path.name)):
            if name != path.name:
                raise UserError(
                    f"process {rank} resumes from {name:.80}, another one from {path.name}: all machines must see the "
                    f"same files in {path.parent}"
                )
        if not model.processes.first:
            return
        best, run = self.best_model.best, self.run
        self._write_missing_model(checkpoint.state)
        run.forget_best(-1 if best is None else best.steps)  # those that were scored later
        if best is not None and not run.file(BEST, best.steps).exists():
            warn(f"the best model, {best}, is no longer in {run.path}; the next score becomes the best")
            self.best_model.best = None
        if errors:
            warn(f"{len(errors)} newer checkpoint(s) cannot be used ({errors[0]}); resuming from {path.name}")
        size_before, size = len(parts_of_state(checkpoint.state)), model.processes.size
        if size_before != size:
            warn(
                f"the run was trained by {size_before} process(es) and resumes in {size}: weights, optimizer and "
                "counters are restored, the environments are reset; it is no longer exact"
            )
        elif not is_exact:
            warn(f"{type(model.env).__name__} cannot save its state: the weights are restored, the episodes start anew")
        if not getattr(model, "synchronous", True):
            warn("learning overlaps playing: the resumed run is not exactly as if never stopped (--synchronous is)")


def _not_written(path: object, error: OSError) -> str:
    return f"could not write {path} ({error.strerror or error})"


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Check a run's settings against its newest intact checkpoint, before anything is built from them.

    A width of a billion in config.json is refused here, by the shapes of the weights in the file.

    Raises:
        UserError: there is no intact checkpoint, it contradicts itself, the settings are not its own, or the run is
            being trained and has no checkpoint yet.
    """
    try:
        checkpoint, _ = Checkpoint.newest(run)
    except UserError:
        with run.lock():  # says so of a run that is being trained, and has none yet
            raise
    if "policy" not in checkpoint.meta:  # written by a version that did not describe the policy
        return
    policy, path = checkpoint.check(config), str(checkpoint.path)
    recorded = read_settings(checkpoint.meta["config"], path)
    check_environment(recorded, policy.observation_space, policy.action_space, path)
