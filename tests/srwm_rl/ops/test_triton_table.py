"""Registers, spills, shared memory and shuffles of the Triton kernels, compiled ahead of time: a table that is held.

After a change of a kernel: `python -m tests.srwm_rl.ops.triton_compile > docs/results/triton_kernels.json`.
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
TABLE: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "triton_kernels.json").read_text())
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
