"""The README: short, with a small moving picture; its code runs, its links lead somewhere, its figures have sources."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srwm_rl import load
from srwm_rl.agents.evaluation.statistics import t_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text()
PICTURES = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
MAX_PICTURE = 3_000_000


def test_it_is_short() -> None:
    assert README.count("\n") < 150


def test_its_pictures_are_small_and_move() -> None:
    assert PICTURES
    for name in PICTURES:
        assert (ROOT / name).stat().st_size <= MAX_PICTURE
        with Image.open(ROOT / name) as picture:
            assert getattr(picture, "n_frames", 1) > 10


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, heading = link.partition("#")
        assert (ROOT / name).exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles], link


def test_the_environment_and_model_are_built() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code[: code.index("model.learn")], names)
    names["env"].close()
    assert names["model"].n_envs == 64


def rows() -> dict[str, dict[str, str]]:
    """Return the table of evidence, by task and column."""
    table = [line for line in README.splitlines() if line.startswith(("| task |", "| `"))]
    head, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {line[0].split("`")[1]: dict(zip(head, line, strict=True)) for line in lines}


@pytest.mark.parametrize("task", ["hidden_controls", "bandit", "recall", "parity"])
def test_constant_and_random_play_are_those_of_the_cards(task: str) -> None:
    card = load(f"zoo:{task}").card
    assert card is not None
    scores = {score.player: score.returns.mean for score in card.scores}
    for column, player in (("one constant action", "best constant action"), ("random play", "random play")):
        text = rows()[task][column]
        decimals = len(text.partition(".")[2])
        assert abs(float(text) - scores[player]) <= 0.51 * 10**-decimals, (column, text, scores[player])


@pytest.mark.parametrize("task", ["hidden_controls", "bandit", "recall", "parity"])
def test_edits_frozen_is_of_the_seeds_in_the_results(task: str) -> None:
    seeds = json.loads((RESULTS / "frozen.json").read_text())["tasks"][task]["seeds"]
    check_mean(rows()[task]["its edits frozen"], [seed["edits frozen"] for seed in seeds])


@pytest.mark.parametrize("task", ["bandit", "recall", "parity"])
def test_memories_are_of_the_seeds_in_the_results(task: str) -> None:
    results = json.loads((RESULTS / "task_defaults.json").read_text())
    for column, core in {"SRWM": "srwm", "GRU": "gru", "LSTM": "lstm", "no memory": "feedforward"}.items():
        check_mean(rows()[task][column], [seed["held_out"] for seed in results[f"{task} {core}"]])


def test_memories_in_the_room_are_of_the_seeds_in_the_results() -> None:
    results = json.loads((RESULTS / "hidden_controls.json").read_text())
    seeds = {"SRWM": [*results["srwm"], *results["srwm, 600,000 steps"]], "Delta Net": results["delta"]}
    seeds |= {"GRU": results["gru"], "LSTM": results["lstm, tuned here (learning rate 2e-2)"]}
    for column, runs in (seeds | {"no memory": results["ff"]}).items():
        check_mean(rows()["hidden_controls"][column], [run["held_out"] for run in runs])


def check_mean(text: str, values: list[float]) -> None:
    """Check a cell, "mean" or "mean ± half of the 95% t-interval", against the values of seeds."""
    cell = text.replace("*", "").split(" ± ")
    interval = t_interval(np.array(values))
    for number, expected in zip(cell, [interval.mean, interval.high - interval.mean], strict=False):
        decimals = len(number.partition(".")[2])
        assert abs(float(number) - expected) <= 0.51 * 10**-decimals, (text, values)
