"""The evaluation's table as text."""

from __future__ import annotations

from typing import Any

from srwm_rl.scripts.evaluation.held_out import chosen_note, explain


def render(report: dict[str, Any]) -> str:
    """Return the table as text."""
    head = ("split", "game", "levels", "return [95% interval]", "solved", "normalised", "length")
    rows = [head]
    interventions = report.get("interventions", [])
    for row in [*report["rows"], *(row for each in interventions for row in each["rows"])]:
        solved = "-" if row["solved"] is None else f"{row['solved']['mean']:.1%}"
        normalized = "-" if row["normalized"] is None else f"{row['normalized']:.3f}"
        split = row["split"]
        label = report["levels"].get(split.rpartition(", ")[2], "")
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
    seen = [
        f"{len(levels)} level(s) of {game}, {split}, begin with a frame that begins a training level too"
        for split, games in report.get("same_first_frame", {}).items()
        for game, levels in games.items()
    ]
    chosen = [chosen_note(report["chosen"])] if "chosen" in report else []
    invalid = [f"INVALID as a held-out score: {report['overlap']:,} of the levels were trained on"]
    invalid += [f"  {line}" for line in explain(report["trained_on"])]
    changes = [_change(each["name"], row) for each in interventions for row in each["differences"]]
    return "\n".join(
        [title, "", *lines, "", *gaps, *changes, *seen, *chosen, *(() if report["valid"] else invalid)]
    ).rstrip()


def _change(name: str, row: dict[str, Any]) -> str:
    """Say what an intervention cost on one split of one game."""
    game = f", {row['game']}" if row["several"] else ""
    solved = ""
    if row["solved"] is not None:
        low, high = ("?" if row["solved"][end] is None else f"{row['solved'][end]:+.1%}" for end in ("low", "high"))
        solved = f", solved {row['solved']['mean']:+.1%} [{low}, {high}]"
    return (
        f"as it is minus {name} ({row['split']}{game}; paired, {row['levels']} levels): return {_text(row['return'])}"
        f"{solved}"
    )


def _text(interval: dict[str, float | None]) -> str:
    low, high = ("?" if each is None else f"{each:.2f}" for each in (interval["low"], interval["high"]))
    return f"{interval['mean']:.2f} [{low}, {high}]"
