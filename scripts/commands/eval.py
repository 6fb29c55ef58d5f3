"""`srwm-rl eval`: every training and every held-out level, exactly k times each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import OptionalValue, check_writable, parse
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.held_out import TrainedOn, count, explain, levels_trained_on
from srwm_rl.scripts.evaluation.table import render

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.play_levels import Episodes, Predictor
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.storage.seen_levels import SeenLevels

Arg = tyro.conf.arg
PROG = "srwm-rl eval"
MAX_TRAINING_LEVELS = 1000
MAX_ENVS = 64


@dataclass(frozen=True)
class EvalConfig:
    """Play every training level and every held-out level exactly k times, and print the returns."""

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest."""
    eval_levels: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Held-out levels, start:stop; repeat the option for several splits. Default: those the run was started with."""
    train_levels: str | None = None
    """Training levels to play; "none" to leave them out. Default: all the run trained on (of more than 1,000, as many
    spread evenly over them)."""
    protocol: Literal["paper"] | None = None
    """paper: as the SRWM's authors evaluate: the most probable action, 200 episodes per game on each of the levels
    0:200, 1000:1200, 1200:1400 and 1400:1600 (here every level once, where theirs are drawn)."""
    repeats: Annotated[int, Arg(aliases=["-k"])] = 1
    """Episodes per level."""
    deterministic: bool = False
    """Take the most probable action instead of sampling one."""
    random: bool = False
    """Play the held-out levels with random actions too, for comparison."""
    freeze_edits: Annotated[int | None, OptionalValue("0", r"(?:after=)?(\d+)")] = None
    """Play once more with the network's edits of itself frozen: its weights stay as they were learnt. With a number,
    --freeze-edits=5: from that step of each episode on they stay as they are then."""
    lesion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of one head left out, layer.head, counted from 0; repeat the option for others,
    each by itself."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment other than in training, as name:value, such as a longer task."""
    json: str | None = None
    """Write everything, returns per level included, to this file."""
    allow_overlap: bool = False
    """Accept held-out levels that were trained on; the result is marked invalid."""
    n_envs: int | None = None
    """Environments that step together, a multiple of the number of games. Default: the most up to 64."""
    seed: int = 0
    """Of sampled actions and of the bootstrap."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    trust: bool = False
    """Load a zip that model.save() wrote. Reading one can run code that is in it: only if you trust whoever made it.
    It does not say what it was trained on: give --env, --train-levels and --eval-levels too."""
    env: str | None = None
    """The environment of such a zip; or of a model, if it is of a module of your own: my_module:MyEnv-v0."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        for name in ("repeats", "n_envs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        fixed = [name for name in PAPER if self.protocol and getattr(self, name) != getattr(EvalConfig, name)]
        if fixed:
            raise UserError(f"--protocol paper decides --{fixed[0].replace('_', '-')}; leave one of them out")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must lie in [0, {2**31 - 1}], not {self.seed}")
        pairs(self.env_kwargs, "env_kwargs")
        if self.freeze_edits is not None and self.freeze_edits < 0:
            raise UserError(f"--freeze-edits must be at least 0, not {self.freeze_edits}")
        for each in self.lesion:
            if not re.fullmatch(r"\d{1,9}\.\d{1,9}", each, re.ASCII):
                raise UserError(f"--lesion takes layer.head, such as 0.3, not {each!r}")


# IDSIA/modern-srwm, reinforcement_learning/README.md and polybeast_learner.py, function test.
PAPER: dict[str, Any] = {
    "train_levels": "0:200",
    "eval_levels": ("1000:1200", "1200:1400", "1400:1600"),
    "repeats": 1,
    "deterministic": True,
}


@dataclass(frozen=True)
class Split:
    """Levels that are played and reported together."""

    name: str
    levels: tuple[int, ...]
    label: str


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(EvalConfig, argv, PROG)
    if config.protocol == "paper":
        config = replace(config, protocol=None, **PAPER)
    if config.json is not None:
        check_writable(Path(config.json), "--json")
    from srwm_rl.scripts.evaluation.runner import evaluate

    report = evaluate(config)
    print(render(report))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0


def choose_splits(config: EvalConfig, trained: TrainConfig, played: SeenLevels | None = None) -> list[Split]:
    """Return the training split (if any) and the held-out ones.

    Args:
        config: the command's settings.
        trained: the run's settings.
        played: the record of the levels that it played, if there is one.

    Raises:
        UserError: ranges that cannot be read, or that overlap, or were trained on, without --allow-overlap.
    """
    from srwm_rl.envs.levels import LevelRange

    training = LevelRange.parse(trained.levels)
    held_out = [LevelRange.parse(text) for text in config.eval_levels or (trained.eval_levels,)]
    if not config.allow_overlap:
        for each in held_out:
            _check_held_out(each, trained, played)
    for one, other in combinations(held_out, 2):
        if one == other or (one.overlap(other) and not config.allow_overlap):
            raise UserError(f"--eval-levels {one} and {other} overlap in {one.overlap(other)} levels; separate them")
    names = ["held-out"] if len(held_out) == 1 else [f"held-out {each}" for each in held_out]
    splits = [Split(name, _listed(each), str(each)) for name, each in zip(names, held_out, strict=True)]
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


def _check_held_out(levels: LevelRange, trained: TrainConfig, played: SeenLevels | None) -> None:
    name = str(levels)
    met = levels_trained_on(trained, played, {name: _listed(levels)})
    if not met:
        return
    raise UserError(
        f"levels {name} were trained on ({trained.levels}): {count(met)} of {len(levels)} ({'; '.join(explain(met))}); "
        "choose others with --eval-levels, or insist with --allow-overlap"
    )


def _listed(levels: LevelRange) -> tuple[int, ...]:
    from srwm_rl.envs.levels import check_levels

    return tuple(check_levels(levels).tolist())


def _training_split(levels: LevelRange) -> Split:
    if len(levels) <= MAX_TRAINING_LEVELS:
        return Split("train", tuple(levels), str(levels))
    step = len(levels) // MAX_TRAINING_LEVELS
    some = tuple(range(levels.start, levels.stop, step))[:MAX_TRAINING_LEVELS]
    return Split("train", some, f"{levels}, every {step:,}th")


def _play(agent: Predictor, split: Split, config: EvalConfig, trained: TrainConfig) -> Episodes:
    from tqdm.auto import tqdm

    from srwm_rl.agents.evaluation.play_levels import play_levels
    from srwm_rl.envs.make import make_levels_env

    env = make_levels_env(
        trained.env,
        config.n_envs or _default_n_envs(trained.env),
        split.levels,
        config.repeats,
        config.seed,
        trained.mode,
        pairs(trained.env_kwargs, "env_kwargs"),
        trained.inputs,
        trained.reward_clip or None,
    )
    try:
        total = env.remaining  # type: ignore[attr-defined]
        quiet = None if config.progress else True  # None: quiet where stderr is no terminal
        with tqdm(total=total, desc=split.name, unit="episode", disable=quiet, leave=False) as bar:
            return play_levels(agent, env, config.deterministic, bar.update)
    finally:
        env.close()


def _default_n_envs(env: str) -> int:
    from srwm_rl.envs.make import resolve

    n_games = len(resolve(env).names)
    return MAX_ENVS // n_games * n_games


def summarise(
    config: EvalConfig,
    trained: TrainConfig,
    steps: int,
    labels: dict[str, str],
    results: dict[str, Episodes],
    trained_on: TrainedOn,
) -> dict[str, Any]:
    """Return everything the table and the JSON file say; with levels that were trained on it is marked invalid."""
    from srwm_rl.agents.evaluation.statistics import difference_interval
    from srwm_rl.envs.make import resolve

    gaps = []
    if "train" in results:
        for name, episodes in results.items():
            if name != "train" and not name.startswith("random"):
                gap = difference_interval(results["train"].level_means(), episodes.level_means(), config.seed)
                gaps.append({"split": name, **interval_json(gap)})
    return {
        "run": config.run,
        "env": trained.env,
        "mode": trained.mode if resolve(trained.env).kind == "procgen" else None,
        "core": trained.core,
        "num_timesteps": steps,
        "actions": "deterministic" if config.deterministic else "stochastic",
        "repeats": config.repeats,
        "levels": labels,
        "valid": not trained_on,
        "overlap": count(trained_on),
        "trained_on": trained_on,
        "rows": [row for name, episodes in results.items() for row in split_rows(name, episodes, config, trained)],
        "generalization_gap": gaps,
        "episodes": {name: episodes_json(episodes) for name, episodes in results.items()},
        "episode_fields": ["game", "level", "return", "length", "solved"],
    }


def split_rows(name: str, episodes: Episodes, config: EvalConfig, trained: TrainConfig) -> list[dict[str, Any]]:
    """Return the table's rows of one split: each game's and, of several, that of all together."""
    from srwm_rl.envs.make import normalizer

    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
    return [
        {"split": name, "game": game, **_row(chosen, bounds, config.seed)} for game, chosen in by_game(episodes).items()
    ]


def by_game(episodes: Episodes) -> dict[str, Episodes]:
    """Return the episodes of each game and, if there are several, before them those of all."""
    games = {game: episodes.of(game) for game in episodes.games()}
    return games if len(games) == 1 else {"all games": episodes, **games}


def episodes_json(episodes: Episodes) -> list[list[Any]]:
    """Return the episodes in JSON's types, in order."""
    return [list(each) for each in sorted(episodes)]


def _row(episodes: Episodes, bounds: dict[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    from srwm_rl.agents.evaluation.statistics import mean_interval

    solved = episodes.solved()
    games = episodes.games()
    normalized = None
    if all(game in bounds for game in games):
        # The mean over games of normalised means, as the ProcGen paper aggregates.
        each = [(episodes.of(g).level_means().mean() - bounds[g][0]) / (bounds[g][1] - bounds[g][0]) for g in games]
        normalized = float(sum(each) / len(each))
    return {
        "levels": len(episodes.level_means()),
        "return": interval_json(mean_interval(episodes.level_means(), seed)),
        "length": sum(each.length for each in episodes) / len(episodes),
        "solved": None if solved is None else interval_json(mean_interval(solved, seed)),
        "normalized": normalized,
    }


def interval_json(interval: Any) -> dict[str, float | None]:
    """Return an interval in JSON's types; None where nothing is known of the spread."""
    return {
        key: value if abs(value) != float("inf") else None
        for key, value in zip(("mean", "low", "high"), interval, strict=True)
    }
