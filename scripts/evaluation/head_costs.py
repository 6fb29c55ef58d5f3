"""What each head's edits earn: every head lesioned by itself, paired by level on held-out levels, cached in the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import msgspec

from srwm_rl.agents.evaluation.head_costs import HeadCost, HeadCosts
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError
from srwm_rl.nn.diagnostics import count_heads
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.evaluation.load_agent import open_agent
from srwm_rl.scripts.evaluation.protocol import EvalConfig, PlayOptions, held_out_ranges, play_options
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.storage.run_folder import CHECKPOINTS, CONFIG
from srwm_rl.storage.safe_file import MAX_BYTES, write_whole
from srwm_rl.storage.strict_json import convert, parse_json

FILE = "head_costs.json"
MAX_FILE_BYTES = 2**22
KEEP = 8  # results in a run's file: of its newest and its best model, and of other levels
MAX_LEVELS = {"task": 500, "procgen": 64, "gymnasium": 32}
"""Held-out levels that are played once per head and game."""


class HeadCostsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a run's `FILE`."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    results: tuple[HeadCosts, ...] = ()


def head_costs(config: EvalConfig, play: bool = True) -> HeadCosts | None:
    """Return what each head of a run's agent earns, from the run folder or by playing and then storing it there.

    Played are the first levels of the first held-out split that the settings name, once per head. A stored result
    counts only for the very model file (its sha256), levels and kind of actions.

    Args:
        config: as for `evaluate`; its other interventions are not played.
        play: play if nothing is stored.

    Returns:
        None if the agent has no two heads that carry something, is no run's, or nothing is stored and `play` is false.

    Raises:
        UserError: as `evaluate`.
    """
    agent, trained = open_agent(config, check_device(config.device))
    core, path = agent.policy.core, getattr(agent, "path", None)
    heads = [f"{layer}.{head}" for layer in range(core.state_layers) for head in range(count_heads(core))]
    if path is None or len(heads) < 2 or not core.carries_over:
        return None
    config, held_out = play_options(config, trained), held_out_ranges(config, trained)[0]
    levels = str(LevelRange(held_out.start, min(held_out.stop, held_out.start + MAX_LEVELS[resolve(trained.env).kind])))
    model = hashlib.sha256(read_small(path, MAX_BYTES)).hexdigest()
    actions = "deterministic" if config.deterministic else "stochastic"
    stored = _read(path)
    for result in stored:
        same = (result.model, result.levels, result.actions) == (model, levels, actions)
        if same and _is_complete(result, heads, resolve(trained.env).names):
            return result
    if not play:
        return None
    options = {field.name: getattr(config, field.name) for field in fields(PlayOptions)}
    options |= {"eval_levels": (levels,), "repeats": 1, "baselines": False}
    evaluation = evaluate(EvalConfig(run=str(path), **options, train_levels="none", lesion=tuple(heads)))
    result = HeadCosts(model, agent.num_timesteps, levels, actions, _costs(evaluation))
    _write(path, (result, *stored)[:KEEP])
    return result


def _is_complete(result: HeadCosts, heads: Sequence[str], games: Sequence[str]) -> bool:
    """Whether a file's result has every head of every game once."""
    rows = [*games, *["all games"] * (len(games) > 1)]
    return sorted((cost.game, cost.name) for cost in result.costs) == sorted(product(rows, heads))


def _costs(evaluation: dict[str, Any]) -> tuple[HeadCost, ...]:
    costs = []
    for part in evaluation["interventions"]:
        layer, head = map(int, part["name"].rpartition(" ")[2].split("."))
        for row in part["differences"]:
            costs.append(HeadCost(layer, head, row["game"], *(row["return"][end] for end in ("mean", "low", "high"))))
    return tuple(costs)


def _file(model: Path) -> Path | None:
    """Return where the results of a model file are stored, or None for a file outside of a run."""
    run = model.parent.parent
    return run / FILE if model.parent.name == CHECKPOINTS and (run / CONFIG).is_file() else None


def _read(model: Path) -> tuple[HeadCosts, ...]:
    """Return the stored results; none if the file is missing or damaged, as they can be computed again."""
    file = _file(model)
    if file is None:
        return ()
    try:
        return convert(parse_json(read_small(file, MAX_FILE_BYTES)), HeadCostsFile, str(file)).results
    except (UserError, ValueError):
        return ()


def _write(model: Path, results: tuple[HeadCosts, ...]) -> None:
    file = _file(model)
    if file is not None:
        with suppress(OSError):  # a run of someone else: the results are shown and not stored
            write_whole(file, msgspec.json.encode(HeadCostsFile(results=results)) + b"\n")
