"""`srwm-rl controls`: one task, the same settings, with and without each part that could explain the result."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated

import tyro

from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import check_writable, parse, write_json
from srwm_rl.scripts.config.settings import Count, check_bounds
from srwm_rl.scripts.evaluation.table import render_controls


@dataclass(frozen=True)
class ControlsConfig:
    """Train every control on a built-in task with the same settings, and print one table."""

    task: tyro.conf.Positional[str]
    """A built-in task: recall, bandit, parity, repeat_previous, associative_recall, hidden_controls or mdp."""
    seeds: Count = 5
    """Trainings per control, with seeds 0, 1, ..."""
    n_timesteps: Annotated[Count | None, tyro.conf.arg(aliases=["-n"])] = None
    """Environment steps per training (with --supervised: gradient steps). Default: enough for the task."""
    only: tuple[str, ...] = ()
    """The controls to train; default: all."""
    supervised: bool = False
    """parity: learn from the right answers instead of from rewards."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates; of several, each control gets its best on a seed that is not reported. Default: the task's one
    (with --supervised: 0.002 0.006 0.02)."""
    n_levels: Count = 500
    """Held-out levels (with --supervised: streams) that each trained agent is tested on."""
    json: str | None = None
    """Write everything, scores per seed included, to this file after each training."""
    verbose: int = 1
    """0: the table only, 1: a line per training, 2: tracebacks too."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if any(not 0 < rate <= 1 for rate in self.learning_rates):
            raise UserError("--learning-rates must be above 0 and at most 1")
        if self.task not in TASKS:
            raise UserError(f"there is no built-in task {self.task!r}{did_you_mean(self.task, TASKS)}")
        if self.supervised and self.task != "parity":
            raise UserError(f"--supervised is for parity alone, not for {self.task}")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ControlsConfig, argv, "srwm-rl controls")
    check_writable(config.json, "--json")
    from srwm_rl.scripts.evaluation.control_experiments import ParityExperiment, TaskExperiment, measure

    settings = (config.n_timesteps, config.learning_rates, config.n_levels)
    experiment = ParityExperiment(*settings) if config.supervised else TaskExperiment(config.task, *settings)
    report = {"command": shlex.join(["srwm-rl", "controls", *argv]), "task": config.task}
    for results in measure(experiment, config.only, config.seeds, verbose=config.verbose > 0):
        report |= results
        write_json(config.json, report)
    print(render_controls(report))
    return 0
