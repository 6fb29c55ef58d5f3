"""`srwm-rl controls`: one task, the same settings, with and without each part that could explain the result."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import parse, warn
from srwm_rl.scripts.evaluation.control_experiments import (
    TASK_SETTINGS,
    ControlExperiment,
    ParityExperiment,
    TaskExperiment,
)

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.controls import Row

Arg = tyro.conf.arg
PROG = "srwm-rl controls"


@dataclass(frozen=True)
class ControlsConfig:
    """Train every control on a built-in task with the same settings, and print one table."""

    task: tyro.conf.Positional[str]
    """recall, bandit, parity or repeat_previous."""
    seeds: int = 5
    """Trainings per control, with seeds 0, 1, ..."""
    n_timesteps: Annotated[int | None, Arg(aliases=["-n"])] = None
    """Environment steps per training (with --supervised: gradient steps). Default: enough for the task."""
    only: tuple[str, ...] = ()
    """The controls to train; default: all."""
    supervised: bool = False
    """parity: learn from the right answers instead of from rewards."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates; of several, each control gets its best on a seed that is not reported. Default: the task's one
    (with --supervised: 0.002 0.006 0.02)."""
    n_levels: int = 500
    """Held-out levels (with --supervised: streams) that each trained agent is tested on."""
    json: str | None = None
    """Write everything, scores per seed included, to this file after each training."""
    verbose: int = 1
    """0: the table only, 1: a line per training, 2: tracebacks too."""

    def __post_init__(self) -> None:
        for name in ("seeds", "n_timesteps", "n_levels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if any(not 0 < rate <= 1 for rate in self.learning_rates):
            raise UserError("--learning-rates must be above 0 and at most 1")
        if self.task not in TASK_SETTINGS:
            raise UserError(f"there is no built-in task {self.task!r}{did_you_mean(self.task, TASK_SETTINGS)}")
        if self.supervised and self.task != "parity":
            raise UserError(f"--supervised is there for parity alone, not for {self.task}")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ControlsConfig, argv, PROG)
    names = _names(config)
    if config.json is not None and not Path(config.json).resolve().parent.is_dir():
        raise UserError(f"cannot write {config.json}: its folder does not exist")
    import torch

    torch.set_num_threads(1)  # networks this small are slower on several
    report = measure(config, names, shlex.join([*PROG.split(), *argv]))
    print(render(report))
    return 0


def _names(config: ControlsConfig) -> tuple[str, ...]:
    from srwm_rl.agents.evaluation.controls import choose_controls

    names = choose_controls(config.only)
    if config.supervised:
        names = tuple(name for name in names if name != "random")
        if not names:
            raise UserError("--supervised has no control 'random': guesses are right half of the time; give others")
    return names


def measure(config: ControlsConfig, names: tuple[str, ...], command: str) -> dict[str, Any]:
    """Train and test every control with every seed; return everything the table and the JSON file say."""
    from srwm_rl.agents.evaluation.controls import Row, trainings

    study: ControlExperiment
    if config.supervised:
        study = ParityExperiment(config.n_timesteps, config.learning_rates, config.n_levels)
    else:
        study = TaskExperiment(config.task, config.n_timesteps, config.learning_rates, config.n_levels)
    rows = {name: Row(name) for name in names}
    report: dict[str, Any] = {}
    for seed in range(config.seeds):
        for training, shown in trainings(names).items():
            _train(config, study, training, [rows[name] for name in shown], seed)
            report = _report(config, study, rows, command)
            if config.json is not None:
                Path(config.json).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _train(config: ControlsConfig, study: ControlExperiment, training: str, rows: list[Row], seed: int) -> None:
    """Train one control with one seed, and add what it scored to its rows."""
    from srwm_rl.agents.evaluation.controls import CONTROLS, SELECTION_SEED, best_rate

    began = time.perf_counter()
    control = CONTROLS[training]
    if rows[0].learning_rate is None and control.core is not None:
        rate = best_rate(
            study.rates, lambda each: study.score(control, [training], SELECTION_SEED, each)[training].test
        )
        for row in rows:
            row.learning_rate = rate
    scores = study.score(control, [row.name for row in rows], seed, rows[0].learning_rate or 0.0)
    for row in rows:
        row.add(*scores[row.name])
    if config.verbose:
        said = ", ".join(f"{name} {score.test:.3f}" for name, score in scores.items())
        warn(f"seed {seed}: {said} ({time.perf_counter() - began:.0f} s)")


def _report(config: ControlsConfig, study: ControlExperiment, rows: dict[str, Row], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "task": config.task,
        "unit": study.unit,
        "random": study.bounds[0],
        "best": study.bounds[1],
        "solved_from": study.bounds[0] + study.solved * (study.bounds[1] - study.bounds[0]),
        "settings": study.describe(),
        "rows": [row.summary(*study.bounds, study.solved) for row in rows.values() if row.scores],
    }


def render(report: dict[str, Any]) -> str:
    """Return the table as text."""
    longer = any(row["train_mean"] is not None for row in report["rows"])
    head = ["control", "what", "parameters", "learning rate", "mean [95% interval]", "min", "max", "solved"]
    lines = [head + ["at training length"] * longer]
    for row in report["rows"]:
        low, high = ("?" if row[end] is None else f"{row[end]:.3f}" for end in ("low", "high"))
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        cells = [row["control"], row["what"], f"{row['parameters']:,}", rate, f"{row['mean']:.3f} [{low}, {high}]"]
        cells += [f"{row['min']:.3f}", f"{row['max']:.3f}", f"{row['solved']}/{row['seeds']}"]
        lines.append(cells + ["-" if row["train_mean"] is None else f"{row['train_mean']:.3f}"] * longer)
    lines.insert(1, ["---"] * len(lines[0]))
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    bounds = f"random {report['random']:g}, best {report['best']:g}, solved from {report['solved_from']:g}"
    return "\n".join([f"{report['task']}: {report['unit']}; {bounds}", "", *table])
