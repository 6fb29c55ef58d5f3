"""Evaluations for other commands: played as `srwm-rl eval` plays them, read from its files, pooled over runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import allow_core, check_device
from srwm_rl.scripts.commands.eval import EvalConfig, Split, _play, choose_splits, summarise
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.held_out import TrainedOn, is_chosen, is_levels, levels_trained_on, merged
from srwm_rl.scripts.evaluation.load_agent import open_agent

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.play_levels import Episodes, Predictor
    from srwm_rl.agents.evaluation.statistics import FloatArray
    from srwm_rl.storage.seen_levels import SeenLevels

Evaluation = dict[str, Any]
"""What `srwm-rl eval --json` writes."""

SAME: dict[str, Any] = {"env": str, "mode": (str, type(None)), "core": str, "actions": str, "repeats": int}
FIELDS: dict[str, Any] = {**SAME, "run": str, "num_timesteps": int, "levels": dict, "episodes": dict}
EPISODE: tuple[Any, ...] = (str, int, (int, float), int, (bool, type(None)))


def evaluate(config: EvalConfig, freeze: bool = False) -> Evaluation:
    """Play what `srwm-rl eval` would and return what it would write.

    Args:
        config: the settings of `srwm-rl eval`.
        freeze: play with frozen edits too, if the agent's core carries anything from step to step.

    Raises:
        UserError: no model, settings that do not fit it, overlapping levels.
    """
    from srwm_rl.agents.evaluation.play_levels import RandomAgent
    from srwm_rl.scripts.evaluation.interventions import choose_interventions, compare

    if config.core is not None:
        allow_core(config.core, config.core)
    agent, trained, steps = open_agent(config, check_device(config.device))
    trained = replace(trained, env_kwargs=(*trained.env_kwargs, *config.env_kwargs))  # of two, the later one counts
    core = agent.policy.core  # type: ignore[attr-defined]
    if freeze and core.carries_over and core.state_layers * core.state_size:
        config = replace(config, freeze_edits=config.freeze_edits or 0)
    played: SeenLevels | None = getattr(agent, "levels_played", None)  # what came from a zip has none
    splits = choose_splits(config, trained, played)
    held_out = {split.name: split.levels for split in splits if split.name != "train"}
    labels = {split.name: split.label for split in splits}

    def play(player: Predictor, skip: str = "", prefix: str = "") -> dict[str, Episodes]:
        return {
            f"{prefix}{each.name}": _play_split(player, each, config, trained) for each in splits if each.name != skip
        }

    interventions = choose_interventions(config, agent)
    results = play(agent)
    if config.random:
        results |= play(RandomAgent(agent.policy.action_space, config.seed), "train", "random, ")  # type: ignore[attr-defined]
    found = summarise(config, trained, steps, labels, results, levels_trained_on(trained, played, held_out))
    found["same_first_frame"] = _same_first_frames(trained, splits)
    if (chosen := getattr(agent, "chosen", None)) is not None:
        found["chosen"] = chosen
    held = [compare(name, config, trained, results, play(each)) for name, each in interventions.items()]
    return found | ({"interventions": held} if held else {})


MAX_COMPARED = 2_000  # training levels whose first frames are looked at


def _same_first_frames(trained: TrainConfig, splits: list[Split]) -> dict[str, dict[str, list[int]]]:
    """Return, by split and game, the held-out levels that begin with a training level's first frame.

    Held out by number, they are not held out by sight (in easy mode 10 of 200 mazes). ProcGen only; nothing is said
    where a run trained on more levels than it is worth looking at.
    """
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.envs.make import resolve
    from srwm_rl.envs.procgen.games import OPTIONS

    spec, training = resolve(trained.env), LevelRange.parse(trained.levels)
    if spec.kind != "procgen" or len(training) > MAX_COMPARED:
        return {}
    from srwm_rl.envs.procgen.leakage import same_first_frame

    given = pairs(trained.env_kwargs, "env_kwargs")
    options = {name: value for name, value in given.items() if name in OPTIONS}
    same: dict[str, dict[str, list[int]]] = {}
    for split in splits:
        if split.name != "train":
            games = {
                game: same_first_frame(game, trained.mode, list(training), split.levels, **options)
                for game in spec.names
            }
            same[split.name] = {game: levels for game, levels in games.items() if levels}
    return same


def _play_split(player: Predictor, split: Split, config: EvalConfig, trained: TrainConfig) -> Episodes:
    import torch

    torch.manual_seed(config.seed)  # the luck of the sampled actions is the same for all who play
    return _play(player, split, config, trained)


def read_evaluation(path: str) -> Evaluation:
    """Read what `srwm-rl eval --json` wrote.

    Raises:
        UserError: no such file, or one that something else wrote.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        found = None
    if not _is_evaluation(found):
        raise UserError(f"{path} was not written by srwm-rl eval --json; give a file that was")
    evaluation: Evaluation = found
    return evaluation


def _is_evaluation(found: Any) -> bool:
    if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in FIELDS.items()):
        return False
    if not all(is_levels(found.get(name, {})) for name in ("trained_on", "same_first_frame")):
        return False
    if "chosen" in found and not is_chosen(found["chosen"]):
        return False
    splits, changed = found["episodes"], found.get("interventions", [])
    if any(not isinstance(found["levels"].get(name), str) for name in splits if not name.startswith("random, ")):
        return False
    if not _same_games(splits) or not held_out_splits(found) or not isinstance(changed, list):
        return False
    return all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("episodes"), dict)
        and _same_games(each["episodes"])
        and all(_played(splits.get(split, [])) == _played(of) for split, of in each["episodes"].items())
        for each in changed
    )


def _same_games(splits: dict[str, Any]) -> bool:
    if not all(isinstance(each, list) and each and all(map(_is_episode, each)) for each in splits.values()):
        return False
    return len({frozenset(each[0] for each in of) for of in splits.values()}) == 1


def _played(episodes: list[list[Any]]) -> set[tuple[str, int]]:
    return {(game, level) for game, level, *_ in episodes}


def _is_episode(found: Any) -> bool:
    return (
        isinstance(found, list)
        and len(found) == len(EPISODE)
        and all(isinstance(value, kind) for value, kind in zip(found, EPISODE, strict=True))
        and math.isfinite(found[2])
    )


def pool(evaluations: list[Evaluation], trained: TrainConfig, seed: int) -> Evaluation:
    """Take the episodes of several runs for one agent's, level by level, and summarise them as `srwm-rl eval` does.

    Args:
        evaluations: of runs that differ in nothing but their seed; one is enough.
        trained: their settings.
        seed: of the bootstrap.

    Raises:
        UserError: they did not play the same levels equally often.
    """
    from srwm_rl.scripts.evaluation.interventions import compare

    first, changed = evaluations[0], [each.get("interventions", []) for each in evaluations]
    names = [[each["name"] for each in of] for of in changed]
    if any(other[name] != first[name] for other in evaluations for name in (*SAME, "levels")) or any(
        set(other["episodes"]) != set(first["episodes"]) for other in evaluations
    ):
        raise UserError("the evaluations of runs with the same settings differ in levels, repeats or actions")
    if any(each != names[0] for each in names):
        raise UserError("the evaluations of runs with the same settings differ in what was frozen")
    config = EvalConfig(
        run=first["run"], repeats=first["repeats"], deterministic=first["actions"] == "deterministic", seed=seed
    )
    results = _pooled([each["episodes"] for each in evaluations])
    trained_on = merged(trained_on_of(each, trained) for each in evaluations)
    found = summarise(config, trained, first["num_timesteps"], first["levels"], results, trained_on)
    held = [
        compare(name, config, trained, results, _pooled([of[i]["episodes"] for of in changed]))
        for i, name in enumerate(names[0])
    ]
    return found | ({"interventions": held} if held else {})


def trained_on_of(evaluation: Evaluation, trained: TrainConfig) -> TrainedOn:
    """Return which held-out levels were trained on; of an older version's evaluation, by the run's settings."""
    if "trained_on" in evaluation:
        found: TrainedOn = evaluation["trained_on"]
        return found
    levels = {
        split: sorted({each[1] for each in evaluation["episodes"][split]}) for split in held_out_splits(evaluation)
    }
    return levels_trained_on(trained, None, levels)


def _pooled(parts: list[dict[str, list[list[Any]]]]) -> dict[str, Episodes]:
    return {split: _merged([each.get(split, []) for each in parts]) for split in parts[0]}


def _merged(parts: list[list[list[Any]]]) -> Episodes:
    from srwm_rl.agents.evaluation.play_levels import Episode, Episodes

    return Episodes(Episode(*each) for part in parts for each in part)


def level_returns(evaluation: Evaluation, split: str) -> dict[str, tuple[list[int], FloatArray]]:
    """Return `game -> (levels, their mean returns [n_levels])` of a split, by level."""
    episodes = _merged([evaluation["episodes"][split]])
    games = {game: episodes.of(game) for game in episodes.games()}
    return {game: (sorted({each.level for each in of}), of.level_means()) for game, of in games.items()}


def held_out_splits(evaluation: Evaluation) -> list[str]:
    """Return the names of the held-out splits, in the order in which they were played."""
    return [name for name in evaluation["episodes"] if name == "held-out" or name.startswith("held-out ")]
