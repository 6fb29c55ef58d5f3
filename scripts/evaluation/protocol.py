"""The evaluation protocol: which levels are played, how often and how, and whether they were held out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from msgspec import Meta

from srwm_rl.envs.levels import LevelRange, check_levels
from srwm_rl.envs.make import resolve
from srwm_rl.envs.tasks import TASKS, TaskBatch
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import Count, Seed, TrainConfig, Wrappers, check_bounds, check_wrappers, pairs
from srwm_rl.scripts.config.tested_levels import tested_range
from srwm_rl.storage.seen_levels import SeenLevels

TrainedOn = dict[str, dict[str, list[int]]]
"""`split -> game -> levels` that were trained on, without empty entries."""

Options = TypeVar("Options", bound="PlayOptions")

BEST_CONSTANT = "best constant action"
"""The name of this baseline in tables, files and pages."""

MAX_LISTED = 10
MAX_TRAINING_LEVELS = 1000
# IDSIA/modern-srwm, reinforcement_learning/README.md and polybeast_learner.py, function test.
PAPER: dict[str, Any] = {
    "train_levels": "0:200",
    "eval_levels": ("1000:1200", "1200:1400", "1400:1600"),
    "repeats": 1,
    "deterministic": True,
}


@dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """Options of every command that plays held-out levels."""

    eval_levels: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Held-out levels, start:stop; repeat the option for several splits. Default: those the run was started with."""
    repeats: Annotated[Count, tyro.conf.arg(aliases=["-k"])] = 1
    """Episodes per level and run."""
    deterministic: bool = False
    """Take the most probable action instead of sampling one."""
    baselines: bool = False
    """Play the held-out levels also with random actions, with the best constant action (chosen on up to 100 training
    levels) and by the task's reference policies, and say where the agent is not above them."""
    allow_overlap: bool = False
    """Accept held-out levels that were trained on; the result is marked invalid."""
    n_envs: Count | None = None
    """Environments that step together, a multiple of the number of games. Default: the most up to 64."""
    seed: Seed = 0
    """Of sampled actions and of the bootstrap. Of several runs the second is played with seed + 1, and so on."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The environment, if it is of a module of your own: my_module:MyEnv-v0."""
    wrapper: tyro.conf.UseAppendAction[Wrappers] = ()
    """The wrappers that the run was trained with, as in srwm-rl train."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, tyro.conf.arg(aliases=["-P"])] = True
    """Show progress bars."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_wrappers(self.wrapper)

    def eval_config(self, run: str, **options: Any) -> EvalConfig:
        """Return the settings with which a run is evaluated: these, and further ones."""
        shared = {field.name: getattr(self, field.name) for field in fields(PlayOptions)}
        return EvalConfig(run=run, **shared, **options)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(PlayOptions):
    """Play every training level and every held-out level exactly k times, and print the returns."""

    run: tyro.conf.Positional[str]
    """A run folder, a group of runs, or a model file; RUN/best is the best model of a run, RUN its newest; zoo:NAME one
    that comes with the package."""
    train_levels: str | None = None
    """Training levels to play; "none" to leave them out. Default: all the run trained on (of more than 1,000, as many
    spread evenly over them)."""
    protocol: Literal["paper"] | None = None
    """paper: as the SRWM's authors evaluate: the most probable action, 200 episodes per game on each of the levels
    0:200, 1000:1200, 1200:1400 and 1400:1600 (here every level once, where theirs are drawn)."""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play the held-out levels with another agent of the same environment too: a run, a model file or zoo:NAME; repeat
    the option for several."""
    random: bool = False
    """Play the held-out levels with random actions too, for comparison; --baselines plays them and more."""
    freeze_edits: Annotated[int, Meta(ge=0)] | None = None
    """Play once more with the network's edits of itself frozen: its weights stay as they were learnt. With a number,
    --freeze-edits=5: from that step of each episode on they stay as they are then. The state of an LSTM or GRU, which
    edit no weights, is frozen likewise and called memory."""
    lesion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of one head left out, layer.head, counted from 0; repeat the option for others,
    each by itself."""
    undo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of these columns of every head undone after every step: y, query, key, beta, or
    several with commas, such as query,key,beta; repeat the option for others, each by itself."""
    ways: tuple[int, ...] = ()
    """fewshot: play the held-out levels also with each of these numbers of classes, such as 5 20."""
    shots: tuple[int, ...] = ()
    """fewshot: play the held-out levels also with each of these numbers of examples per class, such as 1 2 5 10."""
    chart: str | None = None
    """fewshot: draw the accuracy by examples seen, or by position, into this file: .svg or .png."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment other than in training, as name:value, such as a longer task."""
    attempts: Annotated[int, Meta(ge=2, le=1000)] | None = None
    """Another number of attempts per trial than in training, of a run that was trained with several."""
    json: str | None = None
    """Write everything, returns per level included, to this file."""
    trust: bool = False
    """Load a zip that model.save() wrote. Reading one can run code that is in it: only if you trust its author.
    It does not hold what it was trained on: give --env, --train-levels and --eval-levels too."""
    env: str | None = None
    """The environment of such a zip; or of a model, if it is of a module of your own: my_module:MyEnv-v0."""
    mode: str = "easy"
    """ProcGen's mode in which such a zip was trained: easy, hard, extreme, memory, exploration."""
    atari: bool = False
    """Such a zip was trained with --atari."""
    frame_stack: Annotated[int, Meta(ge=1, le=64)] = 1
    """The observations that are stacked for such a zip."""
    shuffle_actions: bool = False
    """Such a zip was trained with --shuffle-actions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = [name for name in PAPER if self.protocol and getattr(self, name) != getattr(EvalConfig, name)]
        if fixed:
            raise UserError(f"--protocol paper decides --{fixed[0].replace('_', '-')}; leave one of them out")
        pairs(self.env_kwargs, "env_kwargs")
        for name, least in (("ways", 2), ("shots", 1)):
            if any(number < least for number in getattr(self, name)):
                raise UserError(f"--{name} takes whole numbers of at least {least}, such as --ways 5 20 --shots 1 5")
        check_lesions(self.lesion)
        if self.chart is not None and not self.chart.lower().endswith((".svg", ".png")):
            raise UserError(f"--chart draws .svg and .png files, not {self.chart}")


def check_lesions(lesions: Iterable[str]) -> None:
    """Raise a `UserError` unless each is layer.head."""
    for lesion in lesions:
        if not re.fullmatch(r"\d{1,9}\.\d{1,9}", lesion, re.ASCII):
            raise UserError(f"--lesion takes layer.head, such as 0.3, not {lesion!r}")


@dataclass(frozen=True)
class Split:
    """Levels that are played and reported together."""

    name: str
    levels: tuple[int, ...]
    label: str


def choose_splits(config: EvalConfig, trained: TrainConfig, seen: SeenLevels | None = None) -> list[Split]:
    """Return the training split (if any) and the held-out ones.

    Raises:
        UserError: ranges that cannot be read, or that overlap, or were trained on, without --allow-overlap.
    """
    held_out = held_out_ranges(config, trained)
    names = ["held-out" if len(held_out) == 1 else f"held-out {levels}" for levels in held_out]
    splits = [_split(name, levels) for name, levels in zip(names, held_out, strict=True)]
    for split in () if config.allow_overlap else splits:
        trained_on = levels_trained_on(trained, seen, {split.label: split.levels})
        if trained_on:
            raise UserError(
                f"levels {split.label} were trained on ({trained.levels}): {count(trained_on)} of {len(split.levels)} "
                f"({'; '.join(explain(trained_on))}); choose others with --eval-levels, or insist with --allow-overlap"
            )
    for first, second in combinations(held_out, 2):
        n_shared = first.overlap(second)
        if first == second or (n_shared and not config.allow_overlap):
            raise UserError(f"--eval-levels {first} and {second} overlap in {n_shared} levels; separate them")
    return [*_training_splits(config, LevelRange.parse(trained.levels)), *splits]


def with_own_draws(configs: Iterable[Options]) -> list[Options]:
    """Return the settings of runs that are evaluated together, where run i draws its actions with `seed` + i.

    With the same draws the runs' errors would be correlated, and an interval over the runs too short.
    """
    return [replace(config, seed=(config.seed + i) % 2**31) for i, config in enumerate(configs)]


def held_out_ranges(config: PlayOptions, trained: TrainConfig) -> list[LevelRange]:
    """Return the ranges of held-out levels that are played: those of the options, or those a run is tested on."""
    return [LevelRange.parse(text) for text in config.eval_levels] or [tested_range(trained)]


def play_options(config: Options, trained: TrainConfig) -> Options:
    """Return the options with which a run is played: one that learned from right answers gives its most probable."""
    return replace(config, deterministic=True) if trained.algo == "supervised" else config


def _split(name: str, levels: LevelRange) -> Split:
    return Split(name, tuple(check_levels(levels).tolist()), str(levels))


def _training_splits(config: EvalConfig, training: LevelRange) -> list[Split]:
    if config.train_levels == "none":
        return []
    if config.train_levels is None and len(training) > MAX_TRAINING_LEVELS:
        step, rest = divmod(len(training), MAX_TRAINING_LEVELS)
        which = f"{MAX_TRAINING_LEVELS:,} spread evenly" if rest else f"every {step:,}th"
        return [Split("train", tuple(training.spread(MAX_TRAINING_LEVELS)), f"{training}, {which}")]
    levels = training if config.train_levels is None else LevelRange.parse(config.train_levels)
    if training.overlap(levels) < len(levels):
        raise UserError(f"--train-levels {levels} were not all trained on ({training}); use --eval-levels for others")
    return [_split("train", levels)]


def levels_trained_on(trained: TrainConfig, seen: SeenLevels | None, splits: Mapping[str, Sequence[int]]) -> TrainedOn:
    """Return the levels of held-out splits that belong to the training set.

    It consists of the range in the settings, of levels with the same content, such as classes of images, and of what
    the record holds beyond these, as of an environment that chooses levels itself. If the range is "all", it is what
    was played or, without a complete record, every level.
    """
    training, spec = LevelRange.parse(trained.levels), resolve(trained.env)
    trained_on: TrainedOn = {}
    for game in spec.names:
        task = TASKS[game] if spec.kind == "task" else TaskBatch
        has_record = seen is not None and seen.is_complete(game) and not task.levels_share_content
        for split, levels in splits.items():
            numbers = np.array(levels, np.int64)
            recorded = set() if seen is None else set(seen.among(game, levels))
            if not (str(training) == "all" and has_record):
                recorded |= {*numbers[task.trained_levels(training, numbers)].tolist()}
            if overlap := [level for level in levels if level in recorded]:
                trained_on.setdefault(split, {})[game] = overlap
    return trained_on


def merged(parts: Iterable[TrainedOn]) -> TrainedOn:
    """Return the levels that any of several runs was trained on."""
    union: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for part in parts:
        for split, games in part.items():
            for game, levels in games.items():
                union[split][game].update(levels)
    return {split: {game: sorted(levels) for game, levels in games.items()} for split, games in union.items()}


def count(trained_on: TrainedOn) -> int:
    """Return the number of levels; a level of several games counts once in each split."""
    return sum(len(set().union(*games.values())) for games in trained_on.values())


def explain(trained_on: TrainedOn) -> list[str]:
    """Return a line that lists the levels for each split and game."""
    lines = []
    for split, games in trained_on.items():
        for game, levels in games.items():
            more = f" and {len(levels) - MAX_LISTED:,} more" if len(levels) > MAX_LISTED else ""
            lines.append(f"{game}, {split}: {', '.join(map(str, levels[:MAX_LISTED]))}{more}")
    return lines


def chosen_note(chosen: Mapping[str, Any]) -> str:
    """Return by what score a best model was chosen, and what that means for its evaluation."""
    note = f"the model is its run's best by {chosen['of']} ({chosen['score']:.4g})"
    if "held-out" not in chosen["of"]:
        return note
    return f"{note}: on those levels it looks better than it is; evaluate it on others with --eval-levels"
