"""Registers, spills, shared memory and shuffles of the Triton kernels, compiled ahead of time: a table that is held.

After a change of a kernel: `python -m tests.srwm_rl.ops.triton_compile > docs/results/triton_kernels.json`, then put
the rows that `test_the_page_has_the_table` prints on docs/results/README.md. `triton_kernels_before.json` has the
kernels that did not load ahead.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")
ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"
TABLE, BEFORE = (
    json.loads((RESULTS / f"{name}.json").read_text()) for name in ("triton_kernels", "triton_kernels_before")
)
SAME_COMPILER = version("triton") == TABLE["triton"]
DEFAULT = [name for name in TABLE["kernels"] if name.endswith("D16")]  # the default head size
WITH_SPILLS = {"scan backward D16 E49", "scan backward D64", "scan backward D64 retention bound"}


def compiled(names: list[str], cache: Path) -> dict[str, Any]:
    """Compile kernels in a process without Triton's interpreter; return their figures."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(cache)
    }
    command = [sys.executable, "-m", "tests.srwm_rl.ops.triton_compile", *names]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["kernels"]  # type: ignore[no-any-return]


def check(names: list[str], cache: Path) -> None:
    figures = compiled(names, cache)
    if SAME_COMPILER:
        assert figures == {name: TABLE["kernels"][name] for name in names}
    for name, by_architecture in figures.items():
        for architecture, row in by_architecture.items():
            assert name in WITH_SPILLS or (row["spills"], row["stack"]) == (0, 0), (name, architecture)


def test_kernels_of_the_default_head_size(tmp_path: Path) -> None:
    check(DEFAULT, tmp_path)


@pytest.mark.slow
def test_all_kernels(tmp_path: Path) -> None:
    check([name for name in TABLE["kernels"] if name not in DEFAULT], tmp_path)


def test_the_table_names_the_kernels_with_spills() -> None:
    spilled = {name for name, rows in TABLE["kernels"].items() if any(row["spills"] for row in rows.values())}
    assert spilled == WITH_SPILLS
    assert {row for rows in TABLE["kernels"].values() for row in rows} == {"sm_80", "sm_90", "sm_100"}


def page_rows() -> list[str]:
    """Return the rows of the page's table: each figure as "before -> after" for sm_80, sm_90 and sm_100."""
    rows = []
    for name, after in TABLE["kernels"].items():
        cells = [name]
        for figure in ("modelled_cycles_per_step", "shuffles", "registers", "spills"):
            values = [(BEFORE["kernels"][name][sm][figure], row[figure]) for sm, row in after.items()]
            cells.append(" / ".join(f"{a:,} -> {b:,}" if a != b else f"{b:,}" for a, b in values))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_page_has_the_table() -> None:
    page = (RESULTS / "README.md").read_text().splitlines()
    assert [row for row in page_rows() if row not in page] == []


def test_loading_ahead_takes_fewer_cycles_by_the_model_where_it_is_done() -> None:
    assert BEFORE["triton"] == TABLE["triton"]
    for name, rows in TABLE["kernels"].items():
        for architecture, row in rows.items():
            before = BEFORE["kernels"][name][architecture]["modelled_cycles_per_step"]
            if name.startswith("delta"):  # which loaded ahead from the beginning
                assert row["modelled_cycles_per_step"] == before
            else:  # a bound takes more than it saves at D = 64, by at most 3%
                limit = 1.03 if name == "scan forward D64 retention bound" else 1.0
                assert row["modelled_cycles_per_step"] < before * limit, (name, architecture)
