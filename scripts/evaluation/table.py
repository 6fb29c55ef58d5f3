"""Evaluations, comparisons and controls as text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srwm_rl.scripts.evaluation.held_out import chosen_note, count, explain

IntervalJson = dict[str, float | None]


def render_evaluation(report: dict[str, Any]) -> str:
    """Return an evaluation as text."""
    interventions = report.get("interventions", [])
    rows: list[tuple[str, ...]] = [
        ("split", "game", "levels", "return [95% interval]", "solved", "normalised", "length")
    ]
    for row in [*report["rows"], *(row for part in interventions for row in part["rows"])]:
        solved = "-" if row["solved"] is None else f"{row['solved']['mean']:.1%}"
        normalized = "-" if row["normalized"] is None else f"{row['normalized']:.3f}"
        split = row["split"]
        label = report["levels"].get(split.rpartition(", ")[2], "")
        shown = split if ":" in split or not label else f"{split} {label}"
        levels, length = str(row["levels"]), f"{row['length']:.1f}"
        rows.append((shown, row["game"], levels, interval_text(row["return"]), solved, normalized, length))
    title = (
        f"{_environment(report)}, core {report['core']}, {report['num_timesteps']:,} steps, "
        f"{report['actions']} actions, {report['repeats']} episode(s) per level"
    )
    lines = [title, "", *_aligned(rows), ""]
    lines += [
        f"generalisation gap (train - {gap['split']}): {interval_text(gap)}" for gap in report["generalization_gap"]
    ]
    lines += [_difference(part["name"], row) for part in interventions for row in part["differences"]]
    lines += [
        f"{len(levels)} level(s) of {game}, {split}, begin with a frame that begins a training level too"
        for split, games in report.get("same_first_frame", {}).items()
        for game, levels in games.items()
    ]
    if "chosen" in report:
        lines.append(chosen_note(report["chosen"]))
    if not report["valid"]:
        lines.append(f"INVALID as a held-out score: {report['overlap']:,} of the levels were trained on")
        lines += [f"  {line}" for line in explain(report["trained_on"])]
    return "\n".join(lines).rstrip()


def _difference(name: str, row: dict[str, Any]) -> str:
    """Return the line on what an intervention costs on one split of one game."""
    game = f", {row['game']}" if row["several"] else ""
    solved = "" if row["solved"] is None else f", solved {interval_text(row['solved'], '+.1%')}"
    return (
        f"as it is minus {name} ({row['split']}{game}; paired, {row['levels']} levels): "
        f"return {interval_text(row['return'])}{solved}"
    )


def render_comparison(report: dict[str, Any]) -> str:
    """Return a comparison as text."""
    title = (
        f"{_environment(report)}, held-out levels {', '.join(report['levels'])}, {report['actions']} actions, "
        f"{report['repeats']} episode(s) per level and run"
    )
    rows: list[tuple[str, ...]] = [
        ("game", "levels", "A", "B", "A - B [95% interval]", "A better, ties half", "won / tied / lost")
    ]
    for row in report["rows"]:
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        means = ["-" if row[letter] is None else f"{row[letter]:.2f}" for letter in "AB"]
        difference = "-" if row["difference"] is None else interval_text(row["difference"])
        game = f"{row['game']} (normalised)" if row["normalized"] else row["game"]
        rows.append((game, str(row["levels"]), *means, difference, interval_text(row["improvement"]), counts))
    sides = [f"{letter}: {report[letter]['label']}" for letter in "AB"]
    lines = [title, *sides, "", *_aligned(rows), "", *_seed_lines(report["seeds"])]
    return "\n".join([*lines, *(line for warning in warnings_of(report) for line in warning)]).rstrip()


def _seed_lines(seeds: dict[str, Any] | None) -> list[str]:
    if seeds is None:
        return ["The intervals are over levels, for these very agents: of other training seeds they say nothing."]
    means = ", ".join(f"{letter} {interval_text(seeds[letter]['interquartile_mean'])}" for letter in "AB")
    return [
        f"over training seeds ({seeds['unit']}, computed by {seeds['computed_by']}):",
        f"  interquartile mean: {means}",
        f"  P(a run of A > a run of B): {interval_text(seeds['improvement'])}",
    ]


def warnings_of(report: dict[str, Any]) -> list[list[str]]:
    """Return, for each side that was trained on some of the levels, a warning and the lines that list them."""
    return [
        [
            f"INVALID as a held-out score of {letter}: {count(trained_on)} of the levels were trained on",
            *explain(trained_on),
        ]
        for letter in "AB"
        if (trained_on := report[letter]["trained_on"])
    ]


def render_controls(report: dict[str, Any]) -> str:
    """Return the table of controls as Markdown."""
    with_training_length = any(row["train_mean"] is not None for row in report["rows"])
    head = ["control", "what", "parameters", "learning rate", "mean [95% interval]", "min", "max", "solved"]
    head += ["at training length"] * with_training_length
    rows = [head, ["---"] * len(head)]
    for row in report["rows"]:
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        cells = [row["control"], row["what"], f"{row['parameters']:,}", rate, interval_text(row, ".3f")]
        cells += [f"{row['min']:.3f}", f"{row['max']:.3f}", f"{row['solved']}/{row['seeds']}"]
        train_mean = "-" if row["train_mean"] is None else f"{row['train_mean']:.3f}"
        rows.append(cells + [train_mean] * with_training_length)
    bounds = f"random {report['random']:g}, best {report['best']:g}, solved from {report['solved_from']:g}"
    table = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([f"{report['task']}: {report['unit']}; {bounds}", "", *table])


def _environment(report: dict[str, Any]) -> str:
    env: str = report["env"]
    return f"{env} ({report['mode']})" if report["mode"] else env


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def interval_text(interval: IntervalJson, form: str = ".2f") -> str:
    """Return an interval as `mean [low, high]`; ends that are unknown are question marks."""
    mean, low, high = ("?" if interval[end] is None else format(interval[end], form) for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
