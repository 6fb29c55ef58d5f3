"""The sections of a report: each shows the runs that differ only in their seed."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from markupsafe import Markup

from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.held_out import chosen_note, count, explain
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits, pool
from srwm_rl.scripts.reports.charts import Charts, Estimate, estimate, short_number
from srwm_rl.scripts.reports.curves import Curve, combine, read_curves
from srwm_rl.scripts.reports.tables import (
    GameRow,
    is_normalised,
    level_maps,
    published_scores,
    returns_by_game,
)
from srwm_rl.storage.run_folder import METRICS, Run

# Settings that may differ between the runs of one section: the seed, and those that do not change the agent.
FREE = {
    *("seed", "resume", "dry_run", "env_list", "progress", "verbose", "save_freq", "n_threads", "log_folder", "device"),
}
MAX_COLUMNS = 4  # of a table on a phone
PROCGEN_SCALE = "0 and 1 are the published ends of each game's scale"
TASK_SCALE = "0 is random play, 1 the best possible return"


@dataclass(frozen=True)
class SeedRun:
    """One run of a section."""

    run: Run
    trained: TrainConfig
    evaluation: Evaluation
    bootstrap_seed: int
    name: str
    """Of the model on the command line: a folder, or RUN/best."""

    @property
    def steps(self) -> int:
        """Return the environment steps that the evaluated agent was trained for."""
        steps: int = self.evaluation["num_timesteps"]
        return steps

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Return the logged values by key."""
        return read_curves(self.run.path / METRICS)

    @cached_property
    def head(self) -> GameRow:
        """Return the results over all games."""
        return returns_by_game(pool([self.evaluation], self.trained, self.bootstrap_seed), self.bootstrap_seed)[0]


def settings_key(trained: TrainConfig) -> tuple[Any, ...]:
    """Return the settings that the runs of one section have in common."""
    return tuple(getattr(trained, field.name) for field in fields(trained) if field.name not in FREE)


class Section:
    """The runs of one setting, which differ only in their seed; the template reads its attributes."""

    def __init__(self, runs: list[SeedRun], charts: Charts, seed: int, command: str, video: str | None = None) -> None:
        self.runs, self.video = runs, video
        self.trained = trained = runs[0].trained
        self.evaluation = evaluation = pool([run.evaluation for run in runs], trained, seed)
        self.rows = returns_by_game(evaluation, seed)
        self.held_out = held_out_splits(evaluation)
        self.played = ["train"] * ("train" in evaluation["episodes"]) + self.held_out
        self.random = [name for split in self.held_out if (name := f"random, {split}") in evaluation["episodes"]]
        self.splits = self.played + self.random
        self.stacked = len(self.played) + len(self.rows[0].gaps) > MAX_COLUMNS
        self.title = f"{trained.core} on {trained.env}"
        self.curves = self._learning_curves(charts)
        self.scalars = self._scalars(charts)
        self.interventions = [_by_game_and_split(**results) for results in evaluation.get("interventions", [])]
        self.maps = level_maps(evaluation)
        self.published = published_scores(trained, runs[0].steps)
        trainings = [str(run.run.config["command"]) for run in runs if "command" in run.run.config]
        self.commands = [*trainings, *map(eval_command, runs), command]
        versions = runs[0].run.config.get("versions")
        self.versions = list(versions.items()) if isinstance(versions, dict) else []
        self.started = runs[0].run.config.get("started")

    @property
    def labels(self) -> dict[str, tuple[str, str]]:
        """Return each split's name on the page, and its levels."""
        levels = self.evaluation["levels"]
        labels = {name: (name.partition(" ")[0], levels[name]) for name in self.played}
        return labels | {name: ("random play", levels[name.removeprefix("random, ")]) for name in self.random}

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Return the main facts about the runs: name and value."""
        trained, evaluation = self.trained, self.evaluation
        mode = f" ({trained.mode})" if evaluation["mode"] else ""
        steps = [f"{ends(run.steps for run in self.runs):,}" for ends in (min, max)]
        repeats = evaluation["repeats"]
        return [
            ("environment", f"{trained.env}{mode}"),
            ("memory", " ".join((trained.core, *trained.core_kwargs))),
            ("trainer", trained.algo),
            ("trained for", f"{' to '.join(dict.fromkeys(steps))} steps"),
            ("seeds", ", ".join(str(run.trained.seed) for run in self.runs)),
            ("evaluated with", f"{evaluation['actions']} actions, {repeats} episode{'s' * (repeats > 1)} per level"),
        ]

    @property
    def warning(self) -> str | None:
        """Return why the results are no held-out scores, if so."""
        trained_on = self.evaluation["trained_on"]
        if not trained_on:
            return None
        levels = f"{count(trained_on)} of the levels were trained on ({'; '.join(explain(trained_on))})"
        return f"Invalid as a held-out score: {levels}."

    @property
    def notes(self) -> list[str]:
        """Return notes on the held-out levels: those that look like training levels, and what they decided."""
        evaluations = [run.evaluation for run in self.runs]
        same_frames = [
            f"{len(levels)} level(s) of {game}, {split}, begin with a frame that begins a training level too."
            for split, games in evaluations[0].get("same_first_frame", {}).items()
            for game, levels in games.items()
        ]
        notes = [f"In this report {chosen_note(results['chosen'])}." for results in evaluations if "chosen" in results]
        return [*same_frames, *dict.fromkeys(notes)]

    @property
    def scale(self) -> str | None:
        """Return the meaning of normalised scores, if there are any."""
        if not is_normalised(self.trained):
            return None
        return PROCGEN_SCALE if resolve(self.trained.env).kind == "procgen" else TASK_SCALE

    @property
    def settings(self) -> list[tuple[str, Any, bool]]:
        """Return every setting with its value, and whether it differs from the default for this environment."""
        trained = self.trained
        try:
            default = defaults(trained.env, None, trained.core, trained.algo)
        except UserError:  # a core or an environment that is not installed
            default = trained
        seeds = [run.trained.seed for run in self.runs]
        values = {**trained.to_json(), "seed": seeds[0] if len(seeds) == 1 else seeds}
        changed = {name for name in values if name not in FREE and getattr(trained, name) != getattr(default, name)}
        return [(name, value, name in changed) for name, value in values.items()]

    def _learning_curves(self, charts: Charts) -> list[Markup]:
        names = sorted(resolve(self.trained.env).names)
        drawn = []
        for game in names:
            key = "rollout/ep_rew_mean" if len(names) == 1 else f"rollout/{game}/ep_rew_mean"
            row = next((row for row in self.rows if row.game == game), self.rows[0])
            held_out = self.runs[0].steps, estimate(row.cells[self.held_out[0]]["return"])
            random = row.cells[self.random[0]]["return"]["mean"] if self.random else None
            test = "eval_test/mean_reward" if len(names) == 1 else None
            drawn += self._curve(charts, key, game, "mean return", held_out, random, test)
        if len(names) == 1:
            drawn += self._curve(charts, "rollout/success_rate", "success", "fraction of episodes")
            drawn += self._curve(charts, "rollout/ep_len_mean", "episode length", "steps")
        return drawn

    def _scalars(self, charts: Charts) -> list[Markup]:
        """Draw the statistics of the edits: per layer a chart for each kind, such as the four rates."""
        groups: dict[str, dict[str, Curve]] = {}
        for key in sorted({key for run in self.runs for key in run.curves if key.startswith("srwm/")}):
            layer, _, name = key.removeprefix("srwm/").rpartition("/")
            kind = name.partition("_")[0]
            mean = combine([run.curves[key] for run in self.runs if key in run.curves]).mean
            groups.setdefault(f"{layer} {kind}".strip(), {})[name] = mean
        return [charts.lines(curves, title) for title, curves in groups.items()]

    def _curve(
        self,
        charts: Charts,
        key: str,
        title: str,
        unit: str,
        held_out: tuple[float, Estimate] | None = None,
        random: float | None = None,
        test: str | None = None,
    ) -> list[Markup]:
        curves, tests = ([run.curves[name] for run in self.runs if name in run.curves] for name in (key, test))
        if not curves:
            return []
        tested = combine(tests).mean if tests else None
        return [charts.curve(combine(curves), title, unit, held_out, random, tested)]


def _by_game_and_split(name: str, rows: list[Any], differences: list[Any], **_: Any) -> dict[str, Any]:
    """Return the rows of an intervention, and the paired differences of the unchanged agent from it."""
    return {
        "name": name,
        "rows": {(row["game"], row["split"].removeprefix(f"{name}, ")): row for row in rows},
        "differences": {(row["game"], row["split"]): row for row in differences},
    }


def summary_line(sections: list[Section]) -> str:
    """Return the page's subtitle."""
    n_runs = sum(len(section.runs) for section in sections)
    steps = max(run.steps for section in sections for run in section.runs)
    return f"{n_runs} run{'s' * (n_runs > 1)}, up to {short_number(steps)} environment steps each"


def eval_command(run: SeedRun) -> str:
    """Return the `srwm-rl eval` command that repeats an evaluation, as far as it is known."""
    evaluation = run.evaluation
    argv = ["srwm-rl", "eval", run.name, "--repeats", str(evaluation["repeats"])]
    for split in held_out_splits(evaluation):
        argv += ["--eval-levels", evaluation["levels"][split]]
    train = evaluation["levels"].get("train", "none")
    if train != run.trained.levels and "every" not in train:
        argv += ["--train-levels", train]
    argv += ["--deterministic"] * (evaluation["actions"] == "deterministic")
    for name in (results["name"] for results in evaluation.get("interventions", [])):
        step, head = re.fullmatch(r"edits frozen(?: from step (\d+) on)?", name), re.search(r"\d+\.\d+$", name)
        argv += [f"--freeze-edits={step[1] or 0}"] if step else [f"--lesion={head[0]}"] if head else []
    return shlex.join([*argv, *["--random"] * any(split.startswith("random") for split in evaluation["episodes"])])
