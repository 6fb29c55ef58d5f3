"""The sections of a report, each on the runs that differ only in their seed, and the numbers of their tables."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from srwm_rl.agents.evaluation.head_costs import HeadCosts
from srwm_rl.agents.evaluation.statistics import difference_interval, t_interval
from srwm_rl.envs.make import resolve
from srwm_rl.envs.procgen.published import PROCGEN_EASY
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import own_code_options
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.few_shot import over_runs
from srwm_rl.scripts.evaluation.few_shot_tables import few_shot_tables
from srwm_rl.scripts.evaluation.protocol import BEST_CONSTANT
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits, level_returns, pool
from srwm_rl.scripts.evaluation.table import attempt_rows, constant_note, not_above_note
from srwm_rl.scripts.reports.charts import Charts
from srwm_rl.scripts.reports.curves import Curve, combine, read_curves
from srwm_rl.scripts.reports.few_shot_charts import page_charts
from srwm_rl.storage.run_folder import METRICS, Run

# Settings that may differ between the runs of one section: the seed, and those that do not change the agent.
FREE = {
    *("seed", "resume", "dry_run", "env_list", "progress", "verbose", "save_freq", "n_threads", "log_folder", "device"),
    *("supervise", "hang_seconds", "track", "video_freq", "profile", "config", "override", "verify", "print_config"),
    *("seeds", "jobs"),
}
N_SHADES = 9


class GameRow(NamedTuple):
    """The results on one game, or on "all games"."""

    game: str
    cells: dict[str, dict[str, Any]]  # by split, the evaluation's row
    gaps: dict[str, dict[str, float | None]]  # by held-out split, training minus held-out return: mean, low, high


class LevelMap(NamedTuple):
    """A value per level of one game and split."""

    game: str
    split: str
    cells: list[tuple[int, float, int]]  # level, value, shade
    low: float  # the value of the lightest shade
    high: float


@dataclass(frozen=True)
class SeedRun:
    """One run of a section; `name` is the model's on the command line: a folder, or RUN/best."""

    run: Run
    trained: TrainConfig
    evaluation: Evaluation
    bootstrap_seed: int
    drawn_with: int | None  # the seed of its sampled actions; None: not known, the evaluation is from a file
    name: str
    heads: HeadCosts | None = None

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Return the logged values by key."""
        return read_curves(self.run.path / METRICS)

    @property
    def head(self) -> GameRow:
        """Return the results over all games."""
        return returns_by_game(pool([self.evaluation], self.trained, self.bootstrap_seed), self.bootstrap_seed)[0]


def settings_key(trained: TrainConfig) -> tuple[Any, ...]:
    """Return the settings that the runs of one section have in common."""
    return tuple(getattr(trained, field.name) for field in fields(trained) if field.name not in FREE)


class Section:
    """The runs of one setting, which differ only in their seed; the template reads its attributes."""

    def __init__(self, runs: list[SeedRun], charts: Charts, seed: int, command: str) -> None:
        self.runs, self.trained = runs, runs[0].trained
        self.title, self.config = f"{self.trained.core} on {self.trained.env}", runs[0].run.config
        self.games = tuple(sorted(resolve(self.trained.env).names))
        self.evaluation = evaluation = pool([run.evaluation for run in runs], self.trained, seed)
        self.rows = returns_by_game(evaluation, seed)
        self.held_out = held_out_splits(evaluation)
        self.played = ["train"] * ("train" in evaluation["episodes"]) + self.held_out
        means = {split: [run.head.cells[split]["return"]["mean"] for run in runs] for split in self.played}
        self.over_seeds = {split: t_interval(np.array(values)).to_json() for split, values in means.items()}
        self.random = [name for split in self.held_out if (name := f"random, {split}") in evaluation["episodes"]]
        levels = evaluation["levels"]
        # Each split's name on the page, and its levels.
        self.labels = {name: (name.partition(" ")[0], levels[name]) for name in self.played}
        self.labels |= {name: ("random play", levels[name.removeprefix("random, ")]) for name in self.random}
        baselines = evaluation.get("baselines", [])
        self.labels |= {
            f"{baseline['name']}, {name}": (baseline["name"], levels[name])
            for baseline in baselines
            for name in baseline["episodes"]
        }
        self.constant = [
            f"{baseline['name']}, {name}"
            for baseline in baselines
            if baseline["name"] == BEST_CONSTANT
            for name in baseline["episodes"]
        ]
        self.baseline_notes = [constant_note(baseline) for baseline in baselines if "action" in baseline]
        self.baseline_notes += [not_above_note(row) for row in evaluation.get("not_above", ())]
        self.curves, self.scalars = self._learning_curves(charts), self._scalars(charts)
        self.interventions = [_by_game_and_split(**results) for results in evaluation.get("interventions", [])]
        self.heads = [(run, [run.heads.ranked(row.game) for row in self.rows]) for run in runs if run.heads]
        self.by_attempt = attempt_rows(evaluation)
        few_shot = [run.evaluation["few_shot"] for run in runs if "few_shot" in run.evaluation]
        rows = over_runs(few_shot) if len(few_shot) == len(runs) else []
        self.few_shot_tables, self.few_shot_charts = few_shot_tables(rows), page_charts(charts, rows)
        self.maps = level_maps(evaluation)
        # The published scores are of ProcGen's games in easy mode.
        self.published = [of for of in PROCGEN_EASY if evaluation["mode"] == "easy" and {*self.games} & {*of.scores}]
        trainings = [str(run.run.config["command"]) for run in runs if "command" in run.run.config]
        self.commands = [*trainings, *map(eval_command, runs), command]

    @property
    def settings(self) -> list[tuple[str, Any, bool]]:
        """Return every setting with its value, and whether it differs from the default for this environment."""
        trained = self.trained
        try:
            default = defaults(trained.env, None, trained.core, trained.algo, trained.atari)
        except UserError:  # a core or an environment that is not installed
            default = trained
        seeds = [run.trained.seed for run in self.runs]
        values = {**trained.to_json(), "seed": seeds[0] if len(seeds) == 1 else seeds}
        changed = {name for name in values if name not in FREE and getattr(trained, name) != getattr(default, name)}
        return [(name, value, name in changed) for name, value in values.items()]

    def _logged(self, key: str) -> list[Curve]:
        """Return the runs' curves of a logged value."""
        return [run.curves[key] for run in self.runs if key in run.curves]

    def _learning_curves(self, charts: Charts) -> list[Markup]:
        wanted: list[tuple[str, str, str, dict[str, Any]]] = []
        tests = self._logged("eval_test/mean_reward") if len(self.games) == 1 else []
        for game in self.games:
            cells = next((row for row in self.rows if row.game == game), self.rows[0]).cells
            more = {
                "held_out": (self.evaluation["num_timesteps"], cells[self.held_out[0]]["return"]),
                "random": cells[self.random[0]]["return"]["mean"] if self.random else None,
                "test": combine(tests).mean if tests else None,
            }
            key = "rollout/ep_rew_mean" if len(self.games) == 1 else f"rollout/{game}/ep_rew_mean"
            wanted.append((key, game, "mean return", more))
        if len(self.games) == 1:
            wanted.append(("rollout/accuracy", "accuracy", "fraction of right answers", {}))
            wanted.append(("rollout/success_rate", "success", "fraction of episodes", {}))
            wanted.append(("rollout/ep_len_mean", "episode length", "steps", {}))
        drawn = [(self._logged(key), title, unit, more) for key, title, unit, more in wanted]
        return [charts.curve(combine(curves), title, unit, **more) for curves, title, unit, more in drawn if curves]

    def _scalars(self, charts: Charts) -> list[Markup]:
        """Draw the statistics of the edits: per layer a chart for each kind, such as the four rates."""
        groups: dict[str, dict[str, Curve]] = {}
        for key in sorted({key for run in self.runs for key in run.curves if key.startswith("srwm/")}):
            layer, _, name = key.removeprefix("srwm/").rpartition("/")
            kind = name.partition("_")[0]
            groups.setdefault(f"{layer} {kind}".strip(), {})[name] = combine(self._logged(key)).mean
        return [charts.lines(curves, title) for title, curves in groups.items()]


def _by_game_and_split(name: str, rows: list[Any], differences: list[Any], **_: Any) -> dict[str, Any]:
    """Return the rows of an intervention, and the paired differences of the unchanged agent from it."""
    return {
        "name": name,
        "rows": {(row["game"], row["split"].removeprefix(f"{name}, ")): row for row in rows},
        "differences": {(row["game"], row["split"]): row for row in differences},
    }


def eval_command(run: SeedRun) -> str:
    """Return the `srwm-rl eval` command that repeats an evaluation, as far as it is known."""
    evaluation = run.evaluation
    argv = ["srwm-rl", "eval", run.name, *shlex.split(own_code_options(run.trained.to_json()))]
    argv += ["--repeats", str(evaluation["repeats"])]
    for split in held_out_splits(evaluation):
        argv += ["--eval-levels", evaluation["levels"][split]]
    train = evaluation["levels"].get("train", "none")
    if train != run.trained.levels and "," not in train:  # levels spread over the training range are the default
        argv += ["--train-levels", train]
    argv += ["--deterministic"] * (evaluation["actions"] == "deterministic")
    argv += ["--seed", str(run.drawn_with)] if run.drawn_with else []
    for name in (results["name"] for results in evaluation.get("interventions", [])):
        step = re.fullmatch(r"(?:edits|memory) frozen(?: from step (\d+) on)?", name)
        head = re.search(r"\d+\.\d+$", name)
        undone = re.fullmatch(r"edits of (.+) undone", name)
        argv += [f"--freeze-edits={step[1] or 0}"] if step else [f"--lesion={head[0]}"] if head else []
        argv += [f"--undo={undone[1].replace(', ', ',')}"] if undone else []
    baselines = evaluation.get("baselines", [])
    argv += [f"--beside={baseline['agent']}" for baseline in baselines if "agent" in baseline]
    if any("agent" not in baseline for baseline in baselines):
        return shlex.join([*argv, "--baselines"])
    return shlex.join([*argv, *["--random"] * any(split.startswith("random") for split in evaluation["episodes"])])


def returns_by_game(evaluation: Evaluation, seed: int) -> list[GameRow]:
    """Return a row per game, the one for all games first; `seed` is the bootstrap's."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in [
        *evaluation["rows"],
        *(row for baseline in evaluation.get("baselines", ()) for row in baseline["rows"]),
    ]:
        rows.setdefault(row["game"], {})[row["split"]] = row
    first, overall = next(iter(rows)), {gap["split"]: gap for gap in evaluation["generalization_gap"]}
    return [
        GameRow(game, cells, overall if game == first else _gaps(evaluation, game, seed))
        for game, cells in rows.items()
    ]


def _gaps(evaluation: Evaluation, game: str, seed: int) -> dict[str, dict[str, float | None]]:
    if "train" not in evaluation["episodes"]:
        return {}
    means = {split: level_returns(evaluation, split)[game][1] for split in ("train", *held_out_splits(evaluation))}
    train = means.pop("train")
    return {split: difference_interval(train, held_out, seed).to_json() for split, held_out in means.items()}


def level_maps(evaluation: Evaluation) -> dict[str, list[LevelMap]]:
    """Return `game -> maps of returns`, one for each split that the agent played, on one scale per game."""
    splits = [name for name in evaluation["episodes"] if name == "train" or name in held_out_splits(evaluation)]
    returns = {split: level_returns(evaluation, split) for split in splits}
    maps: dict[str, list[LevelMap]] = {}
    for game in sorted(set().union(*returns.values())):
        values = np.concatenate([games[game][1] for games in returns.values()])
        low, high = float(values.min()), float(values.max())
        for split, (levels, means) in ((split, games[game]) for split, games in returns.items()):
            shades = np.full(len(means), N_SHADES // 2)
            if high > low:
                shades = (N_SHADES * (means - low) / (high - low)).astype(int).clip(0, N_SHADES - 1)
            cells = list(zip(levels, means.tolist(), shades.tolist(), strict=True))
            maps.setdefault(game, []).append(LevelMap(game, split, cells, low, high))
    return maps


def difference_maps(differences: dict[str, dict[int, float]]) -> list[LevelMap]:
    """Return a map per game of the differences by level; only a difference of 0 has the middle shade."""
    maps, middle = [], N_SHADES // 2
    for game, by_level in differences.items():
        values = np.array(list(by_level.values()))
        high = max(1e-9, float(np.abs(values).max()))
        shades = middle + np.sign(values) * np.ceil(middle * np.abs(values) / high)
        cells = list(zip(by_level, values.tolist(), shades.astype(int).tolist(), strict=True))
        maps.append(LevelMap(game, "", cells, -high, high))
    return maps
