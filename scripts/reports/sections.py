"""The parts of a report: runs that differ in nothing but their seed, and all there is to show of them."""

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
from srwm_rl.scripts.reports.charts import Estimate, Pictures, short_number
from srwm_rl.scripts.reports.curves import Curve, combine, read_curves
from srwm_rl.scripts.reports.tables import (
    GameRow,
    LevelMap,
    PublishedTable,
    level_maps,
    published_scores,
    returns_by_game,
    score_bounds,
)
from srwm_rl.storage.run_folder import METRICS, Run

# What may differ between the runs of one section: the seed, and what does not change the agent.
FREE = {
    "seed",
    "resume",
    "dry_run",
    "env_list",
    "progress",
    "verbose",
    "save_freq",
    "n_threads",
    "log_folder",
    "device",
}
MAX_COLUMNS = 4  # that stand beside each other on a phone
PROCGEN_SCALE = "0 and 1 stand for the published ends of each game's scale"
TASK_SCALE = "0 stands for random and 1 for the best possible play"


@dataclass(frozen=True)
class SeedRun:
    """One run of a section: its folder, its settings, how it played and what it logged."""

    run: Run
    trained: TrainConfig
    evaluation: Evaluation
    bootstrap_seed: int = 0
    given: str | None = None

    @property
    def name(self) -> str:
        """Return how the model is named on the command line: the folder, or RUN/best."""
        return self.given or str(self.run.path)

    @property
    def seed(self) -> int:
        """Return the training seed."""
        return self.trained.seed

    @property
    def steps(self) -> int:
        """Return how many steps the evaluated agent was trained for."""
        steps: int = self.evaluation["num_timesteps"]
        return steps

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Return what was logged."""
        return read_curves(self.run.path / METRICS)

    @cached_property
    def head(self) -> GameRow:
        """Return the results over all games."""
        return returns_by_game(pool([self.evaluation], self.trained, self.bootstrap_seed), self.bootstrap_seed)[0]


def settings_key(trained: TrainConfig) -> tuple[Any, ...]:
    """Return what runs of one section have in common."""
    return tuple(getattr(trained, field.name) for field in fields(trained) if field.name not in FREE)


class Intervention:
    """What the agent earned with part of its self-modification withheld, beside what it earns as it is.

    Attributes:
        name: of the intervention.
        rows: by game and split, what was earned; as in the evaluation's own table.
        differences: by game and split: as it is minus with the intervention, paired.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        self.name: str = found["name"]
        prefix = f"{self.name}, "
        self.rows = {(row["game"], row["split"].removeprefix(prefix)): row for row in found["rows"]}
        self.differences = {(each["game"], each["split"]): each for each in found["differences"]}


class Section:
    """What the page says of the runs of one setting; the template reads its attributes.

    Args:
        runs: they differ in nothing but their seed.
        pictures: draws.
        seed: of the bootstrap.
        command: what made the page.
        video: an MP4 as a data URL.
    """

    def __init__(
        self, runs: list[SeedRun], pictures: Pictures, seed: int, command: str, video: str | None = None
    ) -> None:
        self.runs, self.video = runs, video
        self.trained = trained = runs[0].trained
        self.evaluation = evaluation = pool([each.evaluation for each in runs], trained, seed)
        self.rows = returns_by_game(evaluation, seed)
        self.held_out = held_out_splits(evaluation)
        self.played = ["train"] * ("train" in evaluation["episodes"]) + self.held_out
        self.random = [name for each in self.held_out if (name := f"random, {each}") in evaluation["episodes"]]
        self.splits = self.played + self.random
        self.stacked = len(self.played) + len(self.rows[0].gaps) > MAX_COLUMNS
        self.title = f"{trained.core} on {trained.env}"
        self.curves = self._learning_curves(pictures)
        self.scalars = self._scalars(pictures)
        self.interventions = [Intervention(each) for each in evaluation.get("interventions", [])]
        self.maps: dict[str, list[LevelMap]] = level_maps(evaluation)
        self.published: PublishedTable | None = published_scores(trained, runs[0].steps)
        trainings = [str(each.run.config["command"]) for each in runs if "command" in each.run.config]
        self.commands = [*trainings, *map(eval_command, runs), command]
        versions = runs[0].run.config.get("versions")
        self.versions = list(versions.items()) if isinstance(versions, dict) else []
        self.started = runs[0].run.config.get("started")

    @property
    def labels(self) -> dict[str, tuple[str, str]]:
        """Return what each split is called on the page, and its levels."""
        levels = self.evaluation["levels"]
        labels = {name: (name.partition(" ")[0], levels[name]) for name in self.played}
        return labels | {name: ("random play", levels[name.removeprefix("random, ")]) for name in self.random}

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Return what has to be known of the runs, with names."""
        trained, evaluation = self.trained, self.evaluation
        mode = f" ({trained.mode})" if evaluation["mode"] else ""
        steps = sorted({each.steps for each in self.runs})
        repeats = evaluation["repeats"]
        return [
            ("environment", f"{trained.env}{mode}"),
            ("memory", " ".join((trained.core, *trained.core_kwargs))),
            ("trainer", trained.algo),
            ("trained for", f"{' to '.join(f'{each:,}' for each in (steps[0], steps[-1])[: len(steps)])} steps"),
            ("seeds", ", ".join(str(each.seed) for each in self.runs)),
            ("evaluated with", f"{evaluation['actions']} actions, {repeats} episode{'s' * (repeats > 1)} per level"),
        ]

    @property
    def warning(self) -> str | None:
        """Return what makes the evaluation no held-out score, if anything does."""
        found = self.evaluation["trained_on"]
        which = "; ".join(explain(found))
        return (
            f"Invalid as a held-out score: {count(found)} of the levels were trained on ({which})." if found else None
        )

    @property
    def notes(self) -> list[str]:
        """Return what else is to be known of the held-out levels: which look like others, and what they decided."""
        of_runs = [run.evaluation for run in self.runs]
        alike = [
            f"{len(levels)} level(s) of {game}, {split}, begin with a frame that begins a training level too."
            for split, games in of_runs[0].get("same_first_frame", {}).items()
            for game, levels in games.items()
        ]
        chosen = [f"In this report {chosen_note(each['chosen'])}." for each in of_runs if "chosen" in each]
        return [*alike, *dict.fromkeys(chosen)]

    @property
    def scale(self) -> str | None:
        """Return what normalised scores mean, if there are any."""
        if not score_bounds(self.trained):
            return None
        return PROCGEN_SCALE if resolve(self.trained.env).kind == "procgen" else TASK_SCALE

    @property
    def settings(self) -> list[tuple[str, Any, bool]]:
        """Return every setting with its value, and whether it is not the default for this environment."""
        trained = self.trained
        try:
            usual = defaults(trained.env, None, trained.core, trained.algo)
        except UserError:  # a core or an environment that is not here
            usual = trained
        seeds = [each.seed for each in self.runs]
        shown = {**trained.to_json(), "seed": seeds[0] if len(seeds) == 1 else seeds}
        changed = {name for name in shown if name not in FREE and getattr(trained, name) != getattr(usual, name)}
        return [(name, value, name in changed) for name, value in shown.items()]

    def _learning_curves(self, pictures: Pictures) -> list[Markup]:
        names = sorted(resolve(self.trained.env).names)
        drawn = []
        for game in names:
            key = "rollout/ep_rew_mean" if len(names) == 1 else f"rollout/{game}/ep_rew_mean"
            row = next((row for row in self.rows if row.game == game), self.rows[0])
            held_out = self.runs[0].steps, _estimate(row.cells[self.held_out[0]])
            random = row.cells[self.random[0]]["return"]["mean"] if self.random else None
            test = "eval_test/mean_reward" if len(names) == 1 else None
            drawn += self._curve(pictures, key, game, "mean return", held_out, random, test)
        if len(names) == 1:
            drawn += self._curve(pictures, "rollout/success_rate", "success", "fraction of episodes")
            drawn += self._curve(pictures, "rollout/ep_len_mean", "episode length", "steps")
        return drawn

    def _scalars(self, pictures: Pictures) -> list[Markup]:
        """Draw what the network did to itself: of each layer a picture per kind of value, such as its four rates."""
        groups: dict[str, dict[str, Curve]] = {}
        for key in sorted({key for each in self.runs for key in each.curves if key.startswith("srwm/")}):
            layer, _, name = key.removeprefix("srwm/").rpartition("/")
            kind = name.partition("_")[0]
            mean = combine([each.curves[key] for each in self.runs if key in each.curves]).mean
            groups.setdefault(f"{layer} {kind}".strip(), {})[name] = mean
        return [pictures.lines(curves, title) for title, curves in groups.items()]

    def _curve(
        self,
        pictures: Pictures,
        key: str,
        title: str,
        unit: str,
        held_out: tuple[float, Estimate] | None = None,
        random: float | None = None,
        test: str | None = None,
    ) -> list[Markup]:
        curves, tests = ([each.curves[name] for each in self.runs if name in each.curves] for name in (key, test))
        if not curves:
            return []
        tested = combine(tests).mean if tests else None
        return [pictures.curve(combine(curves), title, unit, held_out, random, tested)]


def _estimate(row: dict[str, Any]) -> Estimate:
    found = row["return"]
    return found["mean"], found["low"], found["high"]


def summary_line(sections: list[Section]) -> str:
    """Return the page's subtitle."""
    n_runs = sum(len(each.runs) for each in sections)
    steps = max(run.steps for each in sections for run in each.runs)
    return f"{n_runs} run{'s' * (n_runs > 1)}, up to {short_number(steps)} environment steps each"


def eval_command(run: SeedRun) -> str:
    """Return the `srwm-rl eval` command that plays what the page shows, as far as the evaluation tells."""
    evaluation = run.evaluation
    words = ["srwm-rl", "eval", run.name, "--repeats", str(evaluation["repeats"])]
    for split in held_out_splits(evaluation):
        words += ["--eval-levels", evaluation["levels"][split]]
    train = evaluation["levels"].get("train", "none")
    if train != run.trained.levels and "every" not in train:
        words += ["--train-levels", train]
    words += ["--deterministic"] * (evaluation["actions"] == "deterministic")
    for name in (each["name"] for each in evaluation.get("interventions", [])):
        step, head = re.fullmatch(r"edits frozen(?: from step (\d+) on)?", name), re.search(r"\d+\.\d+$", name)
        words += [f"--freeze-edits={step[1] or 0}"] if step else [f"--lesion={head[0]}"] if head else []
    return shlex.join([*words, *["--random"] * any(each.startswith("random") for each in evaluation["episodes"])])
