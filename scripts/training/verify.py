"""`srwm-rl train --resume RUN --verify`: replay a part of a run and compare it bit by bit."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import ConvertCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.callbacks import Checkpoints
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import Checkpoint, Session
from srwm_rl.scripts.training.monitoring import make_callbacks
from srwm_rl.storage.run_folder import METRICS, Run
from srwm_rl.storage.safe_file import MAX_BYTES, pack
from srwm_rl.storage.strict_json import parse_json


def verify(run: Run, config: TrainConfig, model: RecurrentAlgorithm) -> str:
    """Replay the steps between the run's two newest checkpoints and compare bit by bit.

    Returns:
        The result, in one line.

    Raises:
        UserError: there are no two checkpoints, the run cannot be exact, or the replay differs.
    """
    files = run.files("checkpoint")[-2:]
    if len(files) < 2:
        raise UserError(f"{run.path} has one checkpoint or none; --verify replays from one to the next and needs two")
    older, newest = map(Checkpoint.read, files)
    if config.algo == "impala" and not config.synchronous:
        raise UserError(
            "learning overlaps playing in this run, so that no two runs are the same; --synchronous ones are"
        )
    first, last = older.meta["state"], newest.meta["state"]
    if last.get("processes"):
        raise UserError("several processes trained this run, and --verify replays in one, which is not exact")
    start, goal = (state["counters"]["num_timesteps"] for state in (first, last))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / METRICS
        log.write_bytes(read_small(run.path / METRICS, MAX_BYTES))
        session = Session(config, model, run, log)
        try:
            state = _replay(session, older, goal)
        finally:
            model.logger.close()
        replayed = _lines(log, first["metrics"], state["metrics"])
    written = _lines(run.path / METRICS, first["metrics"], last["metrics"])
    # Earlier versions wrote numbers below 0 at the end of a run.
    counters = last["counters"]
    counters["_current_progress_remaining"] = max(0.0, counters["_current_progress_remaining"])
    differences = [*_differences(newest, state), *(["metrics.jsonl"] if replayed != written else [])]
    if differences:
        raise UserError(
            f"{run.path} is not exact: from {start} to {goal} steps {len(differences)} part(s) differ, first "
            f"{differences[0]}; was it written by another version, on another machine or with other threads?"
        )
    return (
        f"exact: from {start:,} to {goal:,} steps, replayed, all {len(newest.arrays)} arrays and {len(written)} lines "
        "of the log are bit for bit what the run wrote"
    )


def _replay(session: Session, start: Checkpoint, goal: int) -> dict[str, Any]:
    """Train from a checkpoint to `goal` steps and return the run's state there."""
    config, model = session.config, session.model
    if not session.restore(start):
        raise UserError(f"{type(model.env).__name__} cannot save its state, so that no resumed run is exact")
    states: list[dict[str, Any]] = []
    keep = Checkpoints(session.capture, states.append, goal - model.num_timesteps, every_seconds=math.inf)
    stop = ConvertCallback(lambda *_: not states)  # at the first step beyond the goal
    callbacks = [keep, *make_callbacks(session, lambda: None), stop]
    model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
    return states[0] if states else session.capture()


def _differences(checkpoint: Checkpoint, state: dict[str, Any]) -> list[str]:
    """Return the names of the arrays and of the other entries that differ from a checkpoint's."""
    expected, (arrays, tree) = checkpoint.arrays, pack(state)
    wanted, tree = checkpoint.meta["state"], json.loads(json.dumps(tree))
    common = [name for name in expected if name in arrays]
    unequal = {name for name in common if not np.array_equal(expected[name], arrays[name], equal_nan=True)}
    # Wall-clock times differ, and with them the length of the log's lines.
    names = [name for name in wanted if name not in ("metrics", "log")]
    others = [name for name in names if _timeless(wanted[name]) != _timeless(tree.get(name))]
    return [*sorted((expected.keys() ^ arrays.keys()) | unequal), *others]


def _lines(log: Path, start: int, stop: int) -> list[dict[str, Any]]:
    lines = [parse_json(line) for line in read_small(log, MAX_BYTES)[start:stop].splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def _timeless(node: Any) -> Any:
    """Return a tree without the episodes' wall-clock times ("t")."""
    if isinstance(node, dict):
        return {key: _timeless(value) for key, value in node.items() if key != "t"}
    return [_timeless(value) for value in node] if isinstance(node, list) else node
