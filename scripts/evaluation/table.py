"""Evaluations, comparisons and controls as text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srwm_rl.scripts.evaluation.few_shot_tables import AccuracyRow, few_shot_tables, percent
from srwm_rl.scripts.evaluation.protocol import BEST_CONSTANT, chosen_note, count, explain

MAX_ATTEMPTS = 6  # columns of a table
MEANS = ("mean", "interquartile_mean")  # of a side over seeds
Number = float | dict[str, float | None] | None
"""A number, or an interval in JSON's types."""


def render_evaluation(report: dict[str, Any]) -> str:
    """Return an evaluation as text."""
    interventions = report.get("interventions", [])
    rows = [["split", "game", "levels", "return [95% interval]", "solved", "normalised", "length"]]
    compared = [*report.get("baselines", []), *interventions]
    for row in [*report["rows"], *(row for part in compared for row in part["rows"])]:
        split = row["split"]
        name = split.rpartition(", ")[2]
        label = "" if ":" in name else report["levels"].get(name, "")
        solved = row["solved"] and row["solved"]["mean"]
        cells = [f"{split} {label}".rstrip(), row["game"], str(row["levels"]), text(row["return"])]
        rows.append([*cells, text(solved, ".1%"), text(row["normalized"], ".3f"), text(row["length"] or None, ".1f")])
    title = (
        f"{_environment(report)}, core {report['core']}, {report['num_timesteps']:,} steps, "
        f"{report['actions']} actions, {report['repeats']} episode(s) per level"
    )
    lines = [title, "", *aligned(rows), ""]
    by_attempt = attempt_rows(report)
    lines += [*aligned(by_attempt), ""] if by_attempt else []
    lines += render_few_shot(report.get("few_shot", ()))
    lines += [f"generalisation gap (train - {gap['split']}): {text(gap)}" for gap in report["generalization_gap"]]
    lines += [_difference(part["name"], row) for part in compared for row in part["differences"]]
    lines += [constant_note(part) for part in compared if "action" in part]
    lines += [not_above_note(row) for row in report.get("not_above", ())]
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


def render_few_shot(rows: Sequence[AccuracyRow], over: str = "episodes (1.96 standard errors)") -> list[str]:
    """Return the lines of the tables of a few-shot evaluation, none where there are no rows."""
    tables = few_shot_tables(rows)
    lines = [line for table in tables for line in (table.title, "", *aligned(table.cells), "")]
    return [f"accuracy in %, 95% intervals over {over}", "", *lines] if tables else []


def attempt_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table of returns by attempt, [] where there are none.

    Of more than `MAX_ATTEMPTS` attempts, the first ones, one in the middle and the last are shown.
    """
    parts = report, *report.get("baselines", ()), *report.get("interventions", ())
    by_attempt = [row for part in parts for row in part.get("return_by_attempt", ())]
    if not by_attempt:
        return []
    n = max(len(row["return"]) for row in by_attempt)
    first = MAX_ATTEMPTS - 2
    shown = [*range(n)] if n <= MAX_ATTEMPTS else [*range(first), max(first, n // 2), n - 1]
    head = ["return by attempt", "game", "levels", *(f"attempt {k + 1} of {n}" for k in shown)]
    rows = [head]
    for row in by_attempt:
        returns = [text(row["return"][k]) if k < len(row["return"]) else "-" for k in shown]
        rows.append([row["split"], row["game"], str(row["levels"]), *returns])
    return rows


def constant_note(part: dict[str, Any]) -> str:
    """Return which constant action is the best one, and how it was found."""
    several = len(part["action"]) > 1
    actions = ", ".join(f"{game}: {action}" if several else action for game, action in part["action"].items())
    return f"{part['name']}: {actions}; the best by mean return on {part['chosen_on']}, tried: {part['tried']}"


def not_above_note(row: dict[str, Any]) -> str:
    """Return the line that says where an agent is not better than a baseline."""
    return f"NOT ABOVE {row['baseline']} {_levels(row)}: the difference is {text(row['return'], '+.2f')}"


def _levels(row: dict[str, Any]) -> str:
    game = f", {row['game']}" if row["several"] else ""
    return f"({row['split']}{game}; paired, {row['levels']} levels)"


def _difference(name: str, row: dict[str, Any]) -> str:
    """Return the line on the agent minus an intervention or a baseline on one split of one game."""
    solved = "" if row["solved"] is None else f", solved {text(row['solved'], '+.1%')}"
    return f"as it is minus {name} {_levels(row)}: return {text(row['return'])}{solved}"


def render_comparison(report: dict[str, Any]) -> str:
    """Return a comparison as text."""
    title = (
        f"{_environment(report)}, held-out levels {', '.join(report['levels'])}, {report['actions']} actions, "
        f"{report['repeats']} episode(s) per level and run"
    )
    rows = [["game", "levels", "A", "B", "A - B [95% interval]", "A better, ties half", "won / tied / lost"]]
    for row in report["rows"]:
        game = f"{row['game']} (normalised)" if row["normalized"] else row["game"]
        numbers = [text(row[name]) for name in ("A", "B", "difference", "improvement")]
        rows.append([game, str(row["levels"]), *numbers, f"{row['wins']} / {row['ties']} / {row['losses']}"])
    sides = [f"{letter}: {report[letter]['label']}" for letter in "AB"]
    lines = [title, *sides, "", *aligned(rows), "", *_baseline_lines(report["baselines"])]
    lines += _seed_lines(report["seeds"])
    return "\n".join([*lines, *(line for warning in warnings_of(report) for line in warning)]).rstrip()


def _baseline_lines(baselines: list[dict[str, Any]]) -> list[str]:
    """Return the table of the baselines beside A and B, and where these are not above one that they should exceed."""
    if not baselines:
        return []
    rows = [["on the same levels", "game", "return", "A minus it [95% interval]", "B minus it"]]
    rows += [[row["name"], row["game"], *(text(row[key]) for key in ("return", "A", "B"))] for row in baselines]
    return [*aligned(rows), "", *side_notes(baselines)]


def side_notes(baselines: list[dict[str, Any]]) -> list[str]:
    """Return a line for each side, game and baseline that the side is not above, of those that any agent should be."""
    return [
        f"NOT ABOVE {row['name']}: {letter} on {row['game']}"
        for row in baselines
        for letter in "AB"
        if row["name"] in ("random play", BEST_CONSTANT) and (row[letter]["low"] is None or row[letter]["low"] <= 0)
    ]


def _seed_lines(seeds: dict[str, Any] | None) -> list[str]:
    if seeds is None:
        return ["The intervals are over levels, for these very agents: of other training seeds they say nothing."]
    means, middles = (", ".join(f"{letter} {text(seeds[letter][name])}" for letter in "AB") for name in MEANS)
    return [
        f"over training seeds ({seeds['unit']}):",
        f"  mean: {means}, A - B {text(seeds['difference'])} (95% intervals by Student's and Welch's t)",
        f"  interquartile mean: {middles} (bootstrap, computed by {seeds['computed_by']})",
        f"  P(a run of A > a run of B): {text(seeds['improvement'])}",
    ]


def warnings_of(report: dict[str, Any]) -> list[list[str]]:
    """Return, for each side that was trained on some of the levels, a warning and the lines that list them."""
    sides = {letter: report[letter]["trained_on"] for letter in "AB"}
    return [
        [f"INVALID as a held-out score of {letter}: {count(levels)} of the levels were trained on", *explain(levels)]
        for letter, levels in sides.items()
        if levels
    ]


def render_controls(report: dict[str, Any]) -> str:
    """Return the table of controls as Markdown."""
    if report["task"] == "fewshot":
        return _render_few_shot_controls(report)
    with_training_length = any(row["train_mean"] is not None for row in report["rows"])
    head = ["control", "what", "parameters", "learning rate", "mean [95% interval]", "min", "max", "solved"]
    rows = [[*head, "at training length"], ["---"] * (len(head) + 1)]
    for row in report["rows"]:
        cells = [row["control"], row["what"], text(row["parameters"], ","), text(row["learning_rate"], "g")]
        cells += [text(row, ".3f"), text(row["min"], ".3f"), text(row["max"], ".3f")]
        rows.append([*cells, f"{row['solved']}/{row['seeds']}", text(row["train_mean"], ".3f")])
    bounds = f"random {report['random']:g}, best {report['best']:g}, solved from {report['solved_from']:g}"
    table = ["| " + " | ".join(cells[: len(head) + with_training_length]) + " |" for cells in rows]
    return "\n".join([f"{report['task']}: {report['unit']}; {bounds}", "", *table])


def _render_few_shot_controls(report: dict[str, Any]) -> str:
    """Return the table of the controls of few-shot learning as Markdown: accuracies in percent, t-intervals."""
    shown = [
        name for name in ("after 0", "after 1", "after 2", "after 3", "after 4") if name in report["rows"][0]["more"]
    ]
    head = ["control", "what", "parameters", "state", "learning rate", *(f"{name} examples" for name in shown)]
    rows = [[*head, "seeds", "s per training"], ["---"] * (len(head) + 2)]
    for row in report["rows"]:
        cells = [row["control"], row["what"], text(row["parameters"], ","), text(row["state"], ",")]
        cells += [text(row["learning_rate"], "g"), *(percent([row["more"][name]]) for name in shown)]
        seconds = sum(row["seconds"]) / len(row["seconds"])
        rows.append([*cells, str(row["seeds"]), f"{seconds:.0f}"])
    table = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(
        [f"fewshot: accuracy in % by examples of the class seen, {report['unit'].partition(', ')[2]}", "", *table]
    )


def _environment(report: dict[str, Any]) -> str:
    env: str = report["env"]
    return f"{env} ({report['mode']})" if report["mode"] else env


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in ruled]


def text(value: Number, form: str = ".2f") -> str:
    """Return a number, or an interval as `mean [low, high]`; None is a dash, an unknown end a question mark.

    The interval of a single value, of which both ends are unknown, is left out.
    """
    if isinstance(value, dict) and value["low"] is None and value["high"] is None:
        return text(value["mean"], form)
    if isinstance(value, dict):
        mean, low, high = ("?" if value[end] is None else format(value[end], form) for end in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"
    return "-" if value is None else format(value, form)
