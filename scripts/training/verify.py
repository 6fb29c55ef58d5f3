"""`srwm-rl train --resume RUN --verify`: replay a part of a run and compare it bit by bit."""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.callbacks import RolloutCallback
from srwm_rl.agents.run.metrics import MetricsFile
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import (
    Checkpoint,
    capture,
    intact_checkpoints,
    log_pending,
    restore_checkpoint,
)
from srwm_rl.scripts.training.monitoring import make_best_model_tracker, make_callbacks
from srwm_rl.storage.run_folder import METRICS, Run
from srwm_rl.storage.safe_file import pack


class _ReachedError(Exception):
    """The replay has reached the newer checkpoint; its argument is the run's state there."""


class _StopAt(RolloutCallback):
    """Raise `_ReachedError` at `goal` steps."""

    def __init__(self, goal: int, metrics: MetricsFile, best_model: BestModelTracker) -> None:
        super().__init__()
        self.goal, self.metrics, self.best_model = goal, metrics, best_model

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.goal:
            raise _ReachedError(capture(self.model, self.metrics, self.best_model))


def verify(run: Run, config: TrainConfig, model: RecurrentAlgorithm) -> str:
    """Replay the steps between the run's two newest checkpoints and compare bit by bit.

    Returns:
        The result, in one line.

    Raises:
        UserError: there are no two checkpoints, the run cannot be exact, or the replay differs.
    """
    errors: list[str] = []
    newest, older = (*islice(intact_checkpoints(run, errors), 2), None, None)[:2]
    if errors:
        raise UserError(errors[0])
    if newest is None or older is None:
        raise UserError(f"{run.path} has one checkpoint or none; --verify replays from one to the next and needs two")
    if config.algo == "impala" and not config.synchronous:
        raise UserError(
            "learning overlaps playing in this run, so that no two runs are the same; --synchronous ones are"
        )
    expected, first, last = newest.arrays, older.meta["state"], newest.meta["state"]
    if last.get("processes"):
        raise UserError("several processes trained this run, and --verify replays in one, which is not exact")
    start, goal = (state["counters"]["num_timesteps"] for state in (first, last))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / METRICS
        log.write_bytes((run.path / METRICS).read_bytes())
        metrics = MetricsFile(log)
        try:
            state = _replay(config, model, older, metrics, goal)
        finally:
            metrics.close()
        replayed = _lines(log, first["metrics"], state["metrics"])
    written = _lines(run.path / METRICS, first["metrics"], last["metrics"])
    arrays, tree = pack(state)
    tree = json.loads(json.dumps(tree))
    differences = [
        *sorted(name for name in expected.keys() | arrays.keys() if not _equal(expected.get(name), arrays.get(name))),
        # Wall-clock times differ, and with them the length of the log's lines.
        *(
            name
            for name in last
            if name not in ("metrics", "log") and _timeless(last[name]) != _timeless(tree.get(name))
        ),
        *(["metrics.jsonl"] if replayed != written else []),
    ]
    if differences:
        raise UserError(
            f"{run.path} is not exact: from {start} to {goal} steps {len(differences)} part(s) differ, first "
            f"{differences[0]}; was it written by another version, on another machine or with other threads?"
        )
    return (
        f"exact: from {start:,} to {goal:,} steps, replayed, all {len(expected)} arrays and {len(written)} lines of "
        "the log are bit for bit what the run wrote"
    )


def _replay(
    config: TrainConfig, model: RecurrentAlgorithm, start: Checkpoint, metrics: MetricsFile, goal: int
) -> dict[str, Any]:
    """Train from a checkpoint to `goal` steps and return the run's state there."""
    model.set_logger(Logger(None, [metrics]))
    best_model = make_best_model_tracker(config)
    is_exact, pending = restore_checkpoint(model, start, metrics, best_model)
    if not is_exact:
        raise UserError(f"{type(model.env).__name__} cannot save its state, so that no resumed run is exact")
    log_pending(model, pending)
    callbacks = [_StopAt(goal, metrics, best_model), *make_callbacks(config, model, best_model, lambda: None)]
    try:
        model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
    except _ReachedError as reached:
        return dict(reached.args[0])
    return capture(model, metrics, best_model)


def _lines(log: Path, start: int, stop: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_bytes()[start:stop].splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def _equal(expected: np.ndarray | None, array: np.ndarray | None) -> bool:
    return expected is not None and array is not None and np.array_equal(expected, array, equal_nan=True)


def _timeless(node: Any) -> Any:
    """Return a tree without the episodes' wall-clock times ("t")."""
    if isinstance(node, dict):
        return {key: _timeless(value) for key, value in node.items() if key != "t"}
    return [_timeless(value) for value in node] if isinstance(node, list) else node
