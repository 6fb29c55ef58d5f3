"""`srwm-rl train --resume RUN --verify`: replay a part of a run and compare it bit by bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.metrics import MetricsFile
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import capture, is_checkpoint, log_pending, restore_file
from srwm_rl.scripts.training.monitoring import make_best_model_tracker, make_callbacks
from srwm_rl.storage.run_folder import METRICS, Run
from srwm_rl.storage.safe_file import pack, read_file


class _ReachedError(Exception):
    """The replay has reached the newer checkpoint."""


class _CaptureAt(BaseCallback):
    """Capture the run's state at `goal` steps, then raise `_ReachedError`."""

    model: RecurrentAlgorithm

    def __init__(self, goal: int, metrics: MetricsFile, best_model: BestModelTracker) -> None:
        super().__init__()
        self.goal, self.metrics, self.best_model = goal, metrics, best_model
        self.state: dict[str, Any] | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.goal:
            self.state = capture(self.model, self.metrics, self.best_model)
            raise _ReachedError


def verify(run: Run, config: TrainConfig, model: RecurrentAlgorithm) -> str:
    """Replay the steps between the run's two newest checkpoints and compare bit by bit.

    Returns:
        The result, in one line.

    Raises:
        UserError: there are no two checkpoints, the run cannot be exact, or the replay differs.
    """
    checkpoints = [path for path in run.files("checkpoint") if is_checkpoint(read_file(path)[1])]
    if len(checkpoints) < 2:
        raise UserError(
            f"{run.path} has {len(checkpoints)} checkpoint(s); --verify replays from one to the next and needs two"
        )
    if config.algo == "impala" and not config.synchronous:
        raise UserError(
            "learning overlaps playing in this run, so that no two runs are the same; --synchronous ones are"
        )
    older = checkpoints[-2]
    first = read_file(older)[1]["state"]
    expected, meta = read_file(checkpoints[-1])
    last = meta["state"]
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
    config: TrainConfig, model: RecurrentAlgorithm, start: Path, metrics: MetricsFile, goal: int
) -> dict[str, Any]:
    """Train from a checkpoint to `goal` steps and return the run's state there."""
    model.set_logger(Logger(None, [metrics]))
    best_model = make_best_model_tracker(config)
    is_exact, pending = restore_file(model, start, *read_file(start), metrics, best_model)
    if not is_exact:
        raise UserError(f"{type(model.env).__name__} cannot save its state, so that no resumed run is exact")
    log_pending(model, pending)
    capture_at = _CaptureAt(goal, metrics, best_model)
    callbacks = [capture_at, *make_callbacks(config, model, best_model, lambda: None)]
    try:
        model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
    except _ReachedError:
        assert capture_at.state is not None
        return capture_at.state
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
