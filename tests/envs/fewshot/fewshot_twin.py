"""The few-shot protocol step by step for one episode, as shared papers describe it: no arrays, no padding."""

from __future__ import annotations

from typing import Any


def steps_of(parts: list[list[tuple[int, int]]], queries: list[list[tuple[int, int]]], labels: str) -> list[Any]:
    """Return `(image, told label or None, right answer or None, seen, part, is query)` for each step.

    `parts` and `queries` are lists of (image, label), by part.
    """
    shown: list[tuple[int, int, int, int, bool]] = []
    counts: dict[tuple[int, int], int] = {}
    for part, examples in enumerate(parts):
        for image, label in examples:
            shown.append((image, label, counts.get((part, label), 0), part, False))
            counts[part, label] = counts.get((part, label), 0) + 1
    for part, asked in enumerate(queries):
        shown += [(image, label, counts.get((part, label), 0), part, True) for image, label in asked]
    steps: list[Any] = []
    before = 0  # the delayed format's first label
    for image, label, seen, part, is_query in shown:
        place = seen, part, is_query
        if labels == "ask":
            steps.append((image, None, label, *place))
            if not is_query:
                steps.append((image, label, None, *place))
        elif labels == "sync":
            steps.append((image, 0, label, *place) if is_query else (image, label, None, *place))
        else:
            steps.append((image, before, label, *place))
        before = label
    return steps
