"""The evaluation's table as text."""

from __future__ import annotations

from typing import Any


def render(report: dict[str, Any]) -> str:
    """Return the table as text."""
    head = ("split", "game", "levels", "return [95% interval]", "solved", "normalised", "length")
    rows = [head]
    for row in report["rows"]:
        solved = "-" if row["solved"] is None else f"{row['solved']['mean']:.1%}"
        normalized = "-" if row["normalized"] is None else f"{row['normalized']:.3f}"
        split = row["split"]
        label = report["levels"].get(split.removeprefix("random, "), "")
        shown = split if ":" in split or not label else f"{split} {label}"
        rows.append(
            (shown, row["game"], str(row["levels"]), _text(row["return"]), solved, normalized, f"{row['length']:.1f}")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    env = report["env"] + (f" ({report['mode']})" if report["mode"] else "")
    title = (
        f"{env}, core {report['core']}, {report['num_timesteps']:,} steps, "
        f"{report['actions']} actions, {report['repeats']} episode(s) per level"
    )
    gaps = [f"generalisation gap (train - {gap['split']}): {_text(gap)}" for gap in report["generalization_gap"]]
    overlap = [f"INVALID as a held-out score: {report['overlap']:,} of the levels were trained on"] * bool(
        report["overlap"]
    )
    return "\n".join([title, "", *lines, "", *gaps, *overlap]).rstrip()


def _text(interval: dict[str, float | None]) -> str:
    low, high = ("?" if each is None else f"{each:.2f}" for each in (interval["low"], interval["high"]))
    return f"{interval['mean']:.2f} [{low}, {high}]"
