"""Few-shot evaluations: accuracy by examples seen, by position, over ways and shots, beside reference policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from srwm_rl.agents.evaluation.play_levels import Answered, Episodes
from srwm_rl.agents.evaluation.statistics import FloatArray, Interval, normal_interval, t_interval
from srwm_rl.envs.fewshot.episodes import Episodes as Steps
from srwm_rl.envs.make import resolve
from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.few_shot_tables import N_BEFORE_END, AccuracyInterval, AccuracyRow


def is_few_shot(trained: TrainConfig) -> bool:
    """Return whether a run is of few-shot episodes, each by itself."""
    return resolve(trained.env).names == ("fewshot",) and trained.attempts == 1


def with_outputs(trained: TrainConfig, changes: Iterable[str] = ()) -> TrainConfig:
    """Return settings with changes of the environment's, name:value, and labels as large as in training.

    Raises:
        UserError: more ways than the agent has labels for.
    """
    own = pairs(trained.env_kwargs, "env_kwargs")
    outputs = FewShotBatch(1, **own).protocol.outputs
    kwargs = (*trained.env_kwargs, *changes)
    most_ways = FewShotBatch(1, **pairs(kwargs, "env_kwargs") | {"outputs": 0}).protocol.outputs
    if most_ways > outputs:
        raise UserError(
            f"this agent was trained with {outputs} labels, too few for {most_ways} ways: give at most {outputs}, or "
            f"train with --ways 5:{most_ways}"
        )
    return replace(trained, env_kwargs=(*kwargs, f"outputs:{outputs}"))


def grid(trained: TrainConfig, ways: Sequence[int], shots: Sequence[int]) -> list[TrainConfig]:
    """Return the settings of each number of ways and shots, with at least one query, other than the run's own.

    Raises:
        UserError: as `with_outputs`, or the data have too few classes or images.
    """
    own = pairs(trained.env_kwargs, "env_kwargs")
    protocol = FewShotBatch(1, **own).protocol
    queries = max(1, protocol.queries)
    all_ways = [(n, n) for n in ways] or [protocol.ways]
    all_shots = [(n, n) for n in shots] or [protocol.shots]
    return [
        with_outputs(trained, (f"ways:{_bounds(n_ways)}", f"shots:{_bounds(n_shots)}", f"queries:{queries}"))
        for n_ways, n_shots in (product(all_ways, all_shots) if ways or shots else ())
        if (n_ways, n_shots, queries) != (protocol.ways, protocol.shots, protocol.queries)
    ]


def few_shot_rows(trained: TrainConfig, played: Mapping[str, Mapping[str, Episodes]]) -> list[AccuracyRow]:
    """Return the rows of agents, `name -> split -> episodes`, and of the reference policies beside them."""
    settings = pairs(trained.env_kwargs, "env_kwargs")
    env = FewShotBatch(1, **settings)
    names = [name.strip() for name in str(settings.get("data", "glyphs")).split(",")]
    rows: list[AccuracyRow] = []
    for split in dict.fromkeys(split for splits in played.values() for split in splits):
        levels = np.array(sorted(of.level for of in next(iter(played.values()))[split].answered), np.int64)
        steps = env.episodes(levels)
        right = {name: _as_array(splits[split].answered, steps) for name, splits in played.items() if split in splits}
        for name, of in (right | _references(env, steps)).items():
            rows += _rows(name, split, _bounds(env.protocol.ways), _bounds(env.protocol.shots), of, steps, names)
    return rows


def _bounds(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}:{high}"


def _as_array(answered: Sequence[Answered], steps: Steps) -> FloatArray:
    """Return 1 for right and 0 for wrong answers, `[n, T]`, of the episodes by level; 0 where nothing is asked."""
    right = np.zeros(steps.asked.shape)
    right[steps.asked] = [of for episode in sorted(answered) for of in episode.right]
    return right


def _references(env: FewShotBatch, steps: Steps) -> dict[str, FloatArray]:
    """Return how likely reference policies are right, `[n, T]` each; chance is that among an episode's own labels."""
    answers = env.reference_answers(steps)
    labels = np.where((steps.image >= 0), steps.label, steps.label[:, :1])
    n_ways = np.array([len(np.unique(row)) for row in labels])
    chance = steps.asked / n_ways[:, None]
    # With more labels than ways, the label told least often would be one that the episode does not have.
    alone = ["labels alone"] * (env.protocol.outputs == env.protocol.ways[0])
    shown = (*alone, "nearest pixels", "blurred cosine")
    return {"chance": chance, **{name: answers[name].astype(np.float64) for name in shown}}


def _rows(
    name: str, split: str, ways: str, shots: str, right: FloatArray, steps: Steps, data: Sequence[str]
) -> list[AccuracyRow]:
    """Return the rows of one agent, one for each part and data set."""
    rows: list[AccuracyRow] = []
    data_set = {part: _first(steps.data_set, steps.part == part) for part in range(len(data))}
    for part, of_part in data_set.items():
        for d, data_name in enumerate(data):
            episodes = of_part == d
            if not episodes.any():
                continue
            own = (steps.part == part) & (steps.image >= 0) & episodes[:, None]
            examples, queries = own & steps.asked & ~steps.query, own & steps.query
            # Of two parts, queries about the first are asked after the second.
            counted = examples | queries if len(data) == 1 else examples
            length = np.where(examples, steps.position, -1).max(axis=1, keepdims=True) + 1
            from_end = np.where(examples, N_BEFORE_END - length + steps.position, -1)
            row: AccuracyRow = {
                "name": name,
                "split": split,
                "ways": ways,
                "shots": shots,
                "part": part,
                "data": data_name,
                "episodes": int(episodes.sum()),
                "examples": _accuracy(right, examples),
                "queries": _accuracy(right, queries),
                "by_seen": _by(right, counted, steps.seen),
                "by_position": _by(right, examples, steps.position),
                "before_end": _by(right, examples & (from_end >= 0), from_end),
            }
            rows.append(row)
    return rows


def _first(values: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Return each row's first value `[n]` where a mask is set."""
    first: npt.NDArray[Any] = values[np.arange(len(values)), mask.argmax(axis=1)]
    return first


def _by(right: FloatArray, mask: npt.NDArray[np.bool_], key: npt.NDArray[Any]) -> list[AccuracyInterval | None]:
    """Return the accuracy for each value 0, 1, ... of a key `[n, T]`, where the mask is set."""
    n = int(key[mask].max()) + 1 if mask.any() else 0
    return [_accuracy(right, mask & (key == value)) for value in range(n)]


def _accuracy(right: FloatArray, mask: npt.NDArray[np.bool_]) -> AccuracyInterval | None:
    """Return the mean over episodes of the accuracy where a mask `[n, T]` is set, with its interval."""
    counts = mask.sum(axis=1)
    if not counts.any():
        return None
    means = (right * mask).sum(axis=1)[counts > 0] / counts[counts > 0]
    return _clipped(normal_interval(means))


def _clipped(interval: Interval) -> AccuracyInterval:
    """Return an interval of an accuracy, whose ends lie in [0, 1] where they are known."""
    ends = (float(np.clip(end, 0.0, 1.0)) if np.isfinite(end) else end for end in interval[1:])
    return Interval(interval.mean, *ends).to_json()


def over_runs(runs: Sequence[Sequence[AccuracyRow]]) -> list[AccuracyRow]:
    """Return the rows that all runs have, as means over runs with 95% t-intervals; of one run its own."""
    if len(runs) == 1:
        return list(runs[0])
    found: dict[tuple[Any, ...], list[AccuracyRow]] = {}
    for rows in runs:
        for row in rows:
            key = tuple(row[field] for field in ("name", "split", "ways", "shots", "part", "data"))
            found.setdefault(key, []).append(row)
    return [_mean_row(rows) for rows in found.values() if len(rows) == len(runs)]


def _mean_row(rows: Sequence[AccuracyRow]) -> AccuracyRow:
    def mean(intervals: Sequence[AccuracyInterval | None]) -> AccuracyInterval | None:
        means = [interval["mean"] for interval in intervals if interval is not None]
        return _clipped(t_interval(np.array(means, np.float64))) if len(means) == len(intervals) else None

    merged: Any = dict(rows[0])
    for field in ("examples", "queries"):
        merged[field] = mean([row[field] for row in rows])
    for field in ("by_seen", "by_position", "before_end"):
        merged[field] = [mean(column) for column in zip(*(row[field] for row in rows), strict=False)]  # type: ignore[literal-required]
    row: AccuracyRow = merged
    return row
