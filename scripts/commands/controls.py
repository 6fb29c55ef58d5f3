"""`srwm-rl controls`: one task, the same settings, with and without each part that could explain the result."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.scripts.config.settings import Count, check_bounds
from srwm_rl.scripts.evaluation.table import render_controls
from srwm_rl.storage.strict_json import MAX_BYTES, parse_json


@dataclass(frozen=True)
class ControlsConfig:
    """Train every control on a built-in task with the same settings, and print one table."""

    task: tyro.conf.Positional[str]
    """A built-in task: recall, bandit, parity, repeat_previous, associative_recall, hidden_controls, mdp, or fewshot,
    which learns from right answers and has controls of its own."""
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
    resume: bool = False
    """Continue the file of --json, if it exists: trainings that it has results of are not repeated."""
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
        if self.resume and self.json is None:
            raise UserError("--resume continues a file: name it with --json")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ControlsConfig, argv, "srwm-rl controls")
    check_writable(config.json, "--json")
    from srwm_rl.scripts.evaluation.control_experiments import Experiment, ParityExperiment, TaskExperiment, measure
    from srwm_rl.scripts.evaluation.few_shot_controls import FewShotExperiment
    from srwm_rl.storage.safe_file import write_whole

    settings = (config.n_timesteps, config.learning_rates, config.n_levels)
    experiment: Experiment
    if config.task == "fewshot":
        experiment = FewShotExperiment(*settings)
    elif config.supervised:
        experiment = ParityExperiment(*settings)
    else:
        experiment = TaskExperiment(config.task, *settings)
    known = _known_rows(config, experiment.settings)
    report = {"command": shlex.join(["srwm-rl", "controls", *argv]), "task": config.task}
    for results in measure(experiment, config.only, config.seeds, config.verbose > 0, known):
        report |= results
        if config.json is not None:
            write_whole(Path(config.json), (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print(render_controls(report))
    return 0


def _known_rows(config: ControlsConfig, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the file that is continued.

    Raises:
        UserError: it is of other settings, or was not written by this command.
    """
    if not (config.resume and config.json and Path(config.json).exists()):
        return []
    content = read_small(Path(config.json), MAX_BYTES)
    try:
        stored = parse_json(content)
        same = (stored["task"], stored["settings"]) == (config.task, json.loads(json.dumps(settings)))
        rows: list[dict[str, Any]] = stored["rows"]
        complete = all({"scores", "train_scores", "seconds"} <= row.keys() for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config.json} was not written by srwm-rl controls; name another file") from error
    if not (same and complete):
        raise UserError(f"{config.json} holds controls with other settings; name another file")
    return rows
