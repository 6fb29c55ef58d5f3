"""Learning curves of runs as a picture: a line per setting over its seeds, a panel per environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import trim_mean

from srwm_rl.envs.procgen.published import PPO_CURVES
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import write_output
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.reports.charts import COLOURS, STYLE, shade, short_number
from srwm_rl.scripts.reports.curves import Curve, combine, read_curves
from srwm_rl.scripts.reports.sections import FREE, settings_key
from srwm_rl.storage.run_folder import CONFIG, METRICS, Run, run_folder

DEFAULT_VALUES = ("rollout/ep_rew_mean", "rollout/accuracy")
PUBLISHED_VALUES = {"rollout/ep_rew_mean": "train", "eval_test/mean_reward": "held_out"}  # fields of a `CurvePoint`
TIME = "time/time_elapsed"
STATISTICS: dict[str, Any] = {
    "mean": None,
    "median": np.median,
    "iqm": lambda values, axis: trim_mean(values, 0.25, axis),
}
PANEL = (5.2, 3.4)  # inches
MAX_COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """Runs that differ only in their seed."""

    trained: TrainConfig
    curves: list[Curve]
    label: str = ""


def plot_runs(
    names: Sequence[str],
    path: Path,
    y: str | None,
    x: str,
    statistic: str,
    labels: Sequence[str] = (),
    published: bool = False,
) -> None:
    """Draw a logged value of runs over training into a file, whose format its suffix chooses.

    Args:
        names: run folders.
        path: the picture.
        y: the value's key in metrics.jsonl; None: the training return, or the accuracy of learning from answers.
        x: "steps" or "hours".
        statistic: a name of `STATISTICS`, over seeds; the band is its 95% interval, see `combine`.
        labels: names of the lines, in the order in which their first runs are named.
        published: also draw PPO's published curves, where a run trains on one game in easy mode.

    Raises:
        UserError: a run cannot be read, has no such value, there are more or fewer lines than labels, or nothing
            published belongs beside the runs.
        OSError: the picture cannot be written.
    """
    runs = [Run.open(run_folder(name)) for name in names]
    logged = [read_curves(run.path / METRICS) for run in runs]
    key = y or next((key for key in DEFAULT_VALUES if all(key in curves for curves in logged)), DEFAULT_VALUES[0])
    groups: dict[tuple[Any, ...], Line] = {}
    for run, curves in zip(runs, logged, strict=True):
        if key not in curves:
            raise UserError(f"{run.path} has no {key!r} yet{did_you_mean(key, curves)}")
        trained = read_settings(run.config["train"], str(run.path / CONFIG))
        line = groups.setdefault(settings_key(trained), Line(trained, []))
        line.curves.append(_over(x, curves, key))
    lines = _labelled(list(groups.values()), labels)
    curves_beside = _published_curves(lines, key) if published else {}
    with rc_context({**STYLE, "font.size": 10, "axes.titlesize": 11, "svg.fonttype": "path"}):
        figure = _draw(lines, key, x, statistic, curves_beside)
        metadata: Any = {"Date": None} if path.suffix.lower() == ".svg" else {}
        picture, form = BytesIO(), path.suffix.lower().removeprefix(".")
        figure.savefig(picture, format=form, dpi=160, facecolor="white", metadata=metadata)
    write_output(path, picture.getvalue())


def _published_curves(lines: list[Line], key: str) -> dict[str, Curve]:
    """Return PPO's published curve by environment, up to the steps of the longest run, or its first point.

    Raises:
        UserError: there is none.
    """
    if key not in PUBLISHED_VALUES:
        raise UserError(f"--published: the published curves are of {' and '.join(PUBLISHED_VALUES)}, not of {key}")
    found = {}
    for line in lines:
        points = PPO_CURVES.get(line.trained.env, ())
        if points and line.trained.mode == "easy":
            end = max(
                curve.steps[-1] for other in lines if other.trained.env == line.trained.env for curve in other.curves
            )
            shown = [point for point in points if point.steps <= 1.05 * end] or points[:1]
            steps, values = zip(*((point.steps, getattr(point, PUBLISHED_VALUES[key])) for point in shown), strict=True)
            found[line.trained.env] = Curve(np.array(steps, float), np.array(values))
    if not found:
        raise UserError(f"--published: only for runs on one game in easy mode: {', '.join(sorted(PPO_CURVES))}")
    return found


def _over(x: str, curves: dict[str, Curve], key: str) -> Curve:
    """Return a value's curve over steps, or over the hours in which they were made."""
    if x == "steps":
        return curves[key]
    if TIME not in curves:
        raise UserError("no hours are logged: leave out --x hours")
    steps, values = curves[key]
    return Curve(np.interp(steps, *curves[TIME]) / 3600, values)


def _labelled(lines: list[Line], labels: Sequence[str]) -> list[Line]:
    """Return the lines with their names: those given, or the settings in which the lines of one environment differ."""
    if labels and len(labels) != len(lines):
        raise UserError(f"{len(labels)} labels for {len(lines)} lines: runs that differ only in their seed share one")
    return [replace(line, label=label or _own_label(line, lines)) for line, label in zip_longest(lines, labels)]


def _own_label(line: Line, lines: list[Line]) -> str:
    rivals = [other.trained for other in lines if other.trained.env == line.trained.env]
    names = [field.name for field in fields(TrainConfig) if field.name not in FREE | {"env"}]
    differing = [name for name in names if len({getattr(rival, name) for rival in rivals}) > 1]
    # Where every core has settings of its own, its name says enough.
    if len({(rival.core, rival.core_kwargs) for rival in rivals}) == len({rival.core for rival in rivals}):
        differing = [name for name in differing if name != "core_kwargs"]
    return ", ".join(_setting(line.trained, name) for name in differing) or line.trained.core


def _setting(trained: TrainConfig, name: str) -> str:
    value = getattr(trained, name)
    text = " ".join(value) if isinstance(value, tuple) else str(value)
    return text if name in ("core", "algo", "core_kwargs", "env_kwargs") else f"{name} {text}"


def _draw(lines: list[Line], key: str, x: str, statistic: str, published: dict[str, Curve]) -> Figure:
    envs = list(dict.fromkeys(line.trained.env for line in lines))
    n_columns = min(len(envs), MAX_COLUMNS)
    n_rows = -(-len(envs) // n_columns)
    figure = Figure((PANEL[0] * n_columns, PANEL[1] * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    colours = dict(zip(dict.fromkeys(line.label for line in lines), cycle(COLOURS), strict=False))
    for env, axes in zip(envs, panels, strict=False):
        of_env = [line for line in lines if line.trained.env == env]
        for line in of_env:
            _draw_line(axes, line, statistic, colours[line.label])
        if env in published:
            axes.plot(*published[env], color="black", linestyle="--", marker="o", markersize=4, label="PPO, published")
        axes.set_title(env)
        if env in published or len(of_env) > 1 or any(line.label != line.trained.core for line in of_env):
            axes.legend(frameon=False)
        axes.set(xlabel="environment steps" if x == "steps" else "hours", ylabel=key)
        axes.locator_params(axis="both", nbins=6)
        if x == "steps":
            axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    for axes in panels[len(envs) :]:
        axes.set_axis_off()
    return figure


def _draw_line(axes: Axes, line: Line, statistic: str, colour: str) -> None:
    band = combine(line.curves, statistic=STATISTICS[statistic])
    n = len(line.curves)
    label = f"{line.label} ({statistic} of {n} seeds)" if n > 1 else line.label
    if n > 1:
        shade(axes, band, colour, 0.2)
        for seed in band.seeds:
            axes.plot(*seed, color=colour, linewidth=0.6, alpha=0.5)
    axes.plot(*band.mean, color=colour, label=label)
