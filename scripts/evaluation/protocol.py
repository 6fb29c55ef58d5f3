"""The evaluation protocol: which levels are played, how often and how, for every command that evaluates."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from srwm_rl.envs.levels import LevelRange, check_levels
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import Count, Seed, TrainConfig, check_bounds, pairs
from srwm_rl.scripts.evaluation.held_out import count, explain, levels_trained_on
from srwm_rl.storage.seen_levels import SeenLevels

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
    allow_overlap: bool = False
    """Accept held-out levels that were trained on; the result is marked invalid."""
    n_envs: Count | None = None
    """Environments that step together, a multiple of the number of games. Default: the most up to 64."""
    seed: Seed = 0
    """Of sampled actions and of the bootstrap."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The environment, if it is of a module of your own: my_module:MyEnv-v0."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, tyro.conf.arg(aliases=["-P"])] = True
    """Show progress bars."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def eval_config(self, run: str, **options: Any) -> EvalConfig:
        """Return the settings with which a run is evaluated: these, and further ones."""
        shared = {field.name: getattr(self, field.name) for field in fields(PlayOptions)}
        return EvalConfig(run=run, **shared, **options)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(PlayOptions):
    """Play every training level and every held-out level exactly k times, and print the returns."""

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest."""
    train_levels: str | None = None
    """Training levels to play; "none" to leave them out. Default: all the run trained on (of more than 1,000, as many
    spread evenly over them)."""
    protocol: Literal["paper"] | None = None
    """paper: as the SRWM's authors evaluate: the most probable action, 200 episodes per game on each of the levels
    0:200, 1000:1200, 1200:1400 and 1400:1600 (here every level once, where theirs are drawn)."""
    random: bool = False
    """Play the held-out levels with random actions too, for comparison."""
    freeze_edits: Annotated[int, Meta(ge=0)] | None = None
    """Play once more with the network's edits of itself frozen: its weights stay as they were learnt. With a number,
    --freeze-edits=5: from that step of each episode on they stay as they are then."""
    lesion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of one head left out, layer.head, counted from 0; repeat the option for others,
    each by itself."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment other than in training, as name:value, such as a longer task."""
    json: str | None = None
    """Write everything, returns per level included, to this file."""
    trust: bool = False
    """Load a zip that model.save() wrote. Reading one can run code that is in it: only if you trust its author.
    It does not hold what it was trained on: give --env, --train-levels and --eval-levels too."""
    env: str | None = None
    """The environment of such a zip; or of a model, if it is of a module of your own: my_module:MyEnv-v0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = [name for name in PAPER if self.protocol and getattr(self, name) != getattr(EvalConfig, name)]
        if fixed:
            raise UserError(f"--protocol paper decides --{fixed[0].replace('_', '-')}; leave one of them out")
        pairs(self.env_kwargs, "env_kwargs")
        for lesion in self.lesion:
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
    training = LevelRange.parse(trained.levels)
    held_out = [LevelRange.parse(text) for text in config.eval_levels or (trained.eval_levels,)]
    if not config.allow_overlap:
        for levels in held_out:
            _check_held_out(levels, trained, seen)
    for first, second in combinations(held_out, 2):
        n_shared = first.overlap(second)
        if first == second or (n_shared and not config.allow_overlap):
            raise UserError(f"--eval-levels {first} and {second} overlap in {n_shared} levels; separate them")
    names = ["held-out"] if len(held_out) == 1 else [f"held-out {levels}" for levels in held_out]
    splits = [Split(name, _listed(levels), str(levels)) for name, levels in zip(names, held_out, strict=True)]
    if config.train_levels is None:
        splits.insert(0, _training_split(training))
    elif config.train_levels != "none":
        chosen = LevelRange.parse(config.train_levels)
        if training.overlap(chosen) < len(chosen):
            raise UserError(
                f"--train-levels {chosen} were not all trained on ({training}); use --eval-levels for others"
            )
        splits.insert(0, Split("train", _listed(chosen), str(chosen)))
    return splits


def _check_held_out(levels: LevelRange, trained: TrainConfig, seen: SeenLevels | None) -> None:
    trained_on = levels_trained_on(trained, seen, {str(levels): _listed(levels)})
    if trained_on:
        raise UserError(
            f"levels {levels} were trained on ({trained.levels}): {count(trained_on)} of {len(levels)} "
            f"({'; '.join(explain(trained_on))}); choose others with --eval-levels, or insist with --allow-overlap"
        )


def _listed(levels: LevelRange) -> tuple[int, ...]:
    return tuple(check_levels(levels).tolist())


def _training_split(levels: LevelRange) -> Split:
    if len(levels) <= MAX_TRAINING_LEVELS:
        return Split("train", tuple(levels), str(levels))
    step = len(levels) // MAX_TRAINING_LEVELS
    chosen = tuple(range(levels.start, levels.stop, step))[:MAX_TRAINING_LEVELS]
    return Split("train", chosen, f"{levels}, every {step:,}th")
