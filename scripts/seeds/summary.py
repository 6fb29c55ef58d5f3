"""The results of a group over its seeds: a table, means and 95% t-intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from srwm_rl.agents.evaluation.statistics import t_interval
from srwm_rl.scripts.evaluation.table import aligned, text
from srwm_rl.scripts.reports.curves import read_curves
from srwm_rl.storage.run_folder import CONFIG, METRICS, Run, steps_of
from srwm_rl.storage.run_group import RunGroup

TRAINING, HELD_OUT = "rollout/ep_rew_mean", "eval_test/mean_reward"


def render_group(group: RunGroup, n_timesteps: int | None = None) -> str:
    """Return the table of a group: the last logged training return and held-out score of each seed, and the means.

    The means are of the runs that have `n_timesteps` steps (None: those that each was started with).
    """
    rows, columns = [["seed", "steps", "training return", "held-out return", "run"]], dict[str, list[float]]()
    unfinished = False
    for seed in group.record.seeds:
        path = group.run_path(seed)
        steps, wanted = steps_of_run(path)
        values = {key: _last(path, key) for key in (TRAINING, HELD_OUT)}
        missing = "" if steps >= (n_timesteps or wanted) > 0 else " (not finished)"
        unfinished |= bool(missing)
        for key, value in values.items():
            if value is not None and not missing:
                columns.setdefault(key, []).append(value)
        rows.append([str(seed), f"{steps:,}", *map(text, values.values()), f"{path}{missing}"])
    if n := len(columns.get(TRAINING, ())):
        finished = " that finished" if unfinished else ""
        note = f"95% t-interval over {n} seeds{finished}" if n > 1 else f"of the one seed{finished}"
        rows.append(["mean", "", *(_mean(columns[key]) if key in columns else "-" for key in values), note])
    if HELD_OUT not in columns:
        rows = [[*row[:3], row[4]] for row in rows]
    return "\n".join(["", *aligned(rows)])


def _mean(values: list[float]) -> str:
    """Return the mean with its interval, which one value does not have."""
    return text(t_interval(np.array(values)).to_json() if len(values) > 1 else values[0])


def steps_of_run(path: Path) -> tuple[int, int]:
    """Return the saved steps of a run, and those that it was started with."""
    if not (path / CONFIG).exists():
        return 0, 0
    run = Run.open(path)
    return max(map(steps_of, run.files("checkpoint")), default=0), int(run.config["train"].get("n_timesteps", 0))


def _last(path: Path, key: str) -> float | None:
    curve = read_curves(path / METRICS).get(key)
    return None if curve is None else float(curve.values[-1])
