"""The notebooks run, and what they say of their figures holds."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute a notebook's code and return its variables."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": name}
    try:
        for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        names["n_figures"] = len(plt.get_fignums())
    finally:
        plt.close("all")
    return names


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == ["few_shot", "hidden_controls"]


def test_hidden_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("hidden_controls", monkeypatch)
    agent, withheld = (names["by_attempt"][of].mean(axis=0) for of in ("agent", "edits withheld"))
    assert agent[-1] > agent[0] + 0.05, "the agent finds out the controls"
    assert (agent - withheld > 0.3).all()
    assert names["edits"].shape[1] == 2
    assert names["n_figures"] == 3


def test_few_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("few_shot", monkeypatch)
    agent, withheld = names["accuracy"]["agent"], names["accuracy"]["edits withheld"]
    assert agent[0] < 0.5 < 0.75 < agent[1] < agent[3]
    assert max(withheld) < 0.3
    assert names["n_figures"] == 2
