"""A run's checkpoints: taken between two updates, written beside the model of the same moment, taken up again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.run import Run
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config import TrainConfig

if TYPE_CHECKING:
    from srwm_rl.agents.metrics import MetricsFile
    from srwm_rl.agents.recurrent import RecurrentAlgorithm

FORMAT = 1
PRIVATE = ("log_folder", "resume")  # settings that say where on whose disk: no part of a model that may be shared


def capture(model: RecurrentAlgorithm, metrics: MetricsFile) -> dict[str, Any]:
    """Return the run's whole state, the place in its metrics included."""
    from srwm_rl.agents.state import capture_state

    return {**capture_state(model), "metrics": metrics.position, "log": _pending(model)}


def _pending(model: RecurrentAlgorithm) -> dict[str, Any]:
    # SB3 writes what an update logged only after the next rollout; a run taken up in between would lose it.
    log = model.logger
    return {
        name: (value if math.isfinite(value) else None, log.name_to_excluded[name])
        for name, value in log.name_to_value.items()
    }


def save(run: Run, model: RecurrentAlgorithm, config: TrainConfig, state: dict[str, Any]) -> None:
    """Write the run's checkpoint and, of the same moment, its model; a full disk costs a warning, not the run."""
    from srwm_rl.files import pack, write_file
    from srwm_rl.saved import save_model

    steps = state["counters"]["num_timesteps"]
    arrays, tree = pack({**state, "environments": None})
    sick = next((name for name, each in arrays.items() if each.dtype.kind == "f" and not np.isfinite(each).all()), None)
    if sick is not None:  # whatever made it so, the older checkpoints are worth more
        warn(f"not saved at {steps} steps: {sick.lstrip('/')} is not finite; the older checkpoints stay")
        return
    arrays, tree = pack(state)
    shared = {name: value for name, value in config.to_json().items() if name not in PRIVATE}
    try:
        write_file(run.file("checkpoint", steps), arrays, {"format": FORMAT, "kind": "checkpoint", "state": tree})
        save_model(run.file("model", steps), model.policy, shared, steps, state["policy"])
        run.sweep()
    except OSError as error:
        warn(f"could not save at {steps} steps ({error.strerror}); the older checkpoints stay, training goes on")


def restore(model: RecurrentAlgorithm, run: Run, metrics: MetricsFile) -> dict[str, Any]:
    """Take up the run where its newest intact checkpoint was taken; say what is lost or not exact.

    Returns:
        What the last update had logged and not yet written: `{name: [value or None, excluded outputs]}`.

    Raises:
        UserError: there is no intact checkpoint, or it is of another architecture.
    """
    from srwm_rl.agents.state import restore_state
    from srwm_rl.files import read_file, unpack

    lost = []
    for path in reversed(run.files("checkpoint")):
        try:
            arrays, meta = read_file(path)
            if meta.get("kind") == "checkpoint" and meta["format"] <= FORMAT:
                break
            lost.append(f"{path} is no checkpoint of this version of srwm-rl")
        except UserError as error:
            lost.append(str(error))
    else:
        why = f" ({lost[0]})" if lost else ""
        raise UserError(f"{run.path} has no intact checkpoint to go on from{why}; start a new run")
    if lost:
        warn(f"{len(lost)} newer checkpoint(s) cannot be used ({lost[0]}); going on from {path.name}")
    state = unpack(arrays, meta["state"])
    if not restore_state(model, state, str(path)):
        warn(f"{model.env.__class__.__name__} cannot tell its state: the weights go on, the episodes start anew")
    if not getattr(model, "synchronous", True):
        warn("learning overlaps playing: the run goes on, but not exactly as if never stopped (--synchronous does)")
    metrics.cut(state["metrics"])
    return dict(state.get("log", {}))
