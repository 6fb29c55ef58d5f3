"""Copies, launches and waits of an acting step and an update: at most so many, and the page has them.

`checks.py` counts them anew. After a change: `python -m tests.simulated_cuda.counts > docs/results/gpu_counts.json`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results"
BEFORE: dict[str, Any] = json.loads((RESULTS / "gpu_counts_before.json").read_text())
TABLE: dict[str, Any] = json.loads((RESULTS / "gpu_counts.json").read_text())
COLUMNS = ("copies in", "copies out", "launches", "graphs", "waits")


@pytest.mark.parametrize("algo", ["PPO", "IMPALA"])
def test_an_acting_step_is_a_copy_each_way_a_graph_and_a_wait(algo: str) -> None:
    step = TABLE[algo]["acting step"]
    assert 1 <= step["copies in"] < 1.3  # IMPALA's last observation, of two parts, is copied alone
    assert step["copies out"] == step["graphs"] == step["waits"] == 1
    # Beside these three, where a training sequence begins, its core state, and IMPALA's last observation.
    assert step["launches"] < 3 + 1


def test_an_update_of_impala_waits_once() -> None:
    update = TABLE["IMPALA"]["update"]
    assert (update["graphs"], update["waits"]) == (1, 1)


def page_rows() -> list[str]:
    """Return the rows of the page's table: each figure as "before -> after"."""
    rows = []
    for algo, parts in TABLE.items():
        for part, after in parts.items():
            pairs = [(BEFORE[algo][part].get(name), after.get(name)) for name in COLUMNS]
            cells = ["" if b is None else f"{a:g} -> {b:g}" if a != b else f"{b:g}" for a, b in pairs]
            rows.append(" ".join(f"| {cell}".rstrip() for cell in (algo, part, *cells)) + " |")
    return rows


def test_the_page_has_the_table() -> None:
    page = (RESULTS / "README.md").read_text().splitlines()
    assert [row for row in page_rows() if row not in page] == []
