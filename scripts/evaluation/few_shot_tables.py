"""Few-shot evaluations as text tables, in percent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

AccuracyInterval = dict[str, float | None]
"""`mean`, `low` and `high` of an accuracy, from 0 to 1; None: of no episode, or an unknown end."""
N_BEFORE_END = 10  # positions before the end of a part


class AccuracyRow(TypedDict):
    """The accuracy of one agent in one part of the episodes; an interval is over episodes, or over runs."""

    name: str  # the agent, intervention or reference policy
    split: str
    ways: str  # classes per episode, or a range
    shots: str
    part: int  # 0, or 1 for the second data set of an episode
    data: str  # the part's data set
    episodes: int
    examples: AccuracyInterval | None  # over all questions about examples; None: there are none
    queries: AccuracyInterval | None  # over all queries, which follow the last part
    by_seen: list[AccuracyInterval | None]  # by examples of the class seen before: 0, 1, ...
    by_position: list[AccuracyInterval | None]  # of examples, by position in the part: 0, 1, ...
    before_end: list[AccuracyInterval | None]  # the last ones of these, the part's last example being the last


class Table(NamedTuple):
    """A table: its title, and its cells, of which the first row is the head."""

    title: str
    cells: list[list[str]]


def few_shot_tables(rows: Sequence[AccuracyRow]) -> list[Table]:
    """Return the tables of an evaluation.

    For each split those of the first setting, by examples seen or, of two data sets, by order and around the switch;
    then one of the queries of all settings.
    """
    tables: list[Table] = []
    if not rows:
        return tables
    first = [row for row in rows if (row["ways"], row["shots"]) == (rows[0]["ways"], rows[0]["shots"])]
    for split in dict.fromkeys(row["split"] for row in first):
        of_split = [row for row in first if row["split"] == split]
        if is_sequential(of_split):
            tables += [order_table(of_split), switch_table(of_split)]
        elif max(len(row["by_seen"]) for row in of_split) > 1:
            tables.append(seen_table(of_split))
    queries = [row for row in rows if row["queries"] is not None]
    return tables if is_sequential(rows) or not queries else [*tables, query_table(queries)]


def is_sequential(rows: Iterable[AccuracyRow]) -> bool:
    """Return whether the episodes have two parts."""
    return any(row["part"] for row in rows)


def seen_table(rows: Sequence[AccuracyRow]) -> Table:
    """Return the table of one setting and split: a row per agent, a column per number of examples seen."""
    n = max(len(row["by_seen"]) for row in rows)
    body = [[row["name"], *(percent(row["by_seen"][i : i + 1]) for i in range(n))] for row in rows]
    return Table(f"{_setting(rows)}, by examples of the class seen before", [["", *map(str, range(n))], *body])


def query_table(rows: Sequence[AccuracyRow]) -> Table:
    """Return the table of queries: a row per setting and split, a column per agent."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["split"], row["ways"], row["shots"]), {})[row["name"]] = percent([row["queries"]])
    body = [[*setting, *(of.get(name, "-") for name in names)] for setting, of in cells.items()]
    return Table("queries, after all examples", [["", "ways", "shots", *names], *body])


def orders(rows: Sequence[AccuracyRow]) -> list[tuple[AccuracyRow, AccuracyRow]]:
    """Return each agent's rows of the first and of the second part, for each order of the data sets."""
    return [
        (first, second)
        for first in rows
        for second in rows
        if (first["part"], second["part"]) == (0, 1)
        and (first["name"], first["split"]) == (second["name"], second["split"])
        and first["data"] != second["data"]
    ]


def order_table(rows: Sequence[AccuracyRow]) -> Table:
    """Return the table of two data sets: the accuracy in both parts, and what is left of both after the second."""
    head = ["", "order", "episodes", "first part", "second part", "first, asked after the second", "second, asked then"]
    body = []
    for first, second in orders(rows):
        cells = [percent([row["examples"]]) for row in (first, second)]
        cells += [percent([row["queries"]]) for row in (first, second)]
        body.append([first["name"], order_name(first, second), str(first["episodes"]), *cells])
    n = len(head) if any(row["queries"] for row in rows) else len(head) - 2
    return Table(_setting(rows), [cells[:n] for cells in [head, *body]])


def switch_table(rows: Sequence[AccuracyRow]) -> Table:
    """Return the table of accuracies by position around the switch: -1 is the first part's last example."""
    longest = max(len(row["by_position"]) for row in rows if row["part"])
    before, after = (-10, -5, -2, -1), [p for p in (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70) if p < longest]
    body = []
    for first, second in orders(rows):
        shown = [
            *(first["before_end"][at:][:1] for at in before),
            *(second["by_position"][at : at + 1] for at in after),
        ]
        cells = [percent(of, digits=0) for of in shown]
        body.append([first["name"], order_name(first, second), *cells])
    return Table(f"{_setting(rows)}, by position from the switch", [["", "order", *map(str, [*before, *after])], *body])


def order_name(first: AccuracyRow, second: AccuracyRow) -> str:
    """Return the order of two parts; of a folder the last part of its path."""
    return f"{Path(first['data']).name} then {Path(second['data']).name}"


def _setting(rows: Sequence[AccuracyRow]) -> str:
    row, n = rows[0], sum(of["episodes"] for of in rows if (of["name"], of["part"]) == (rows[0]["name"], 0))
    return f"{row['split']}, {row['ways']} ways, {row['shots']} shots, {n:,} episodes"


def percent(intervals: Sequence[AccuracyInterval | None], digits: int = 1) -> str:
    """Return the only accuracy of a list in percent, as `mean ±half`; a dash where there is none.

    Without digits only the mean is returned, and where the interval has no width.
    """
    interval = intervals[0] if intervals else None
    if interval is None or interval["mean"] is None:
        return "-"
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    text = f"{100 * mean:.{digits}f}"
    known = digits and low is not None and high is not None and high - low > 1e-9
    return f"{text} ±{50 * (high - low):.{digits}f}" if known and high is not None and low is not None else text
