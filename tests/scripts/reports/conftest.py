"""Report pages, and a strict parser for them."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.scripts.main import main

VOID = {"meta", "br", "img", "hr", "input", "link", "source", "col"}
GAMES = ("bigfish", "fruitbot", "leaper", "maze", "plunder", "starpilot")


class Page(HTMLParser):
    """A page's tags and text; raises where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    @property
    def text(self) -> str:
        """Return the page's visible text, with single spaces."""
        return " ".join(" ".join(self.pieces).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        """Return the attributes of every tag of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag, in line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.pieces.append(data)


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Page]:
    """Return a function that reads a page and checks that its tags are closed in order."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


BLOCKS = {"held-out 1000:1040": 1000, "held-out 1200:1240": 1200, "held-out 1400:1440": 1400}


def write_evaluation(
    path: Path, env: str, games: tuple[str, ...], blocks: dict[str, int] | None = None, frozen: bool = False
) -> Path:
    """Write an evaluation file of agents that solve every third level, and none with frozen edits."""
    starts = blocks or {"held-out": 1000}
    starts = {"train": 0, **starts} | {f"random, {name}": start for name, start in starts.items()}
    episodes = {split: _episodes(games, start) for split, start in starts.items()}
    nothing = {
        split: [[game, level, 0.0, 9, False] for game, level, *_ in of]
        for split, of in episodes.items()
        if not split.startswith("random")
    }
    head = {"run": "run", "env": env, "mode": "easy", "core": "srwm", "num_timesteps": 256}
    labels = {split: f"{start}:{start + 40}" for split, start in starts.items() if split in nothing}
    played = {"actions": "stochastic", "repeats": 1, "levels": labels, "episodes": episodes}
    changed = {"interventions": [{"name": "edits frozen", "episodes": nothing}]} if frozen else {}
    path.write_text(json.dumps(head | played | changed))
    return path


def _episodes(games: tuple[str, ...], start: int) -> list[list[Any]]:
    levels = range(start, start + 40)
    return [[game, level, 1.5 * (level % 3 == 0), 7, level % 3 == 0] for game in games for level in levels]


@pytest.fixture
def fake_evaluation() -> Callable[..., Path]:
    """Return `write_evaluation`."""
    return write_evaluation


@pytest.fixture(scope="session")
def recall_page(tmp_path_factory: pytest.TempPathFactory, recall: Path, recall_argv: list[str]) -> Path:
    """Return the report of two seeds of a tiny run, with everything a report can show."""
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    folder = tmp_path_factory.mktemp("page")
    argv = ["train", *recall_argv, "--seed", "1", "-n", "256", "-f", str(folder), "--verbose", "0"]
    assert main(argv) == 0
    second_seed = folder / "ppo_srwm" / "recall_1"
    with (second_seed / "metrics.jsonl").open() as lines:
        logged = [{**json.loads(line), "srwm/beta_y": i / 7} for i, line in enumerate(lines)]
    (second_seed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    video = folder / "video.mp4"
    video.write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    page = folder / "report.html"
    assert (
        main(["report", str(recall), str(second_seed), "-o", str(page), "--video", str(video), "--verbose", "0"]) == 0
    )
    return page


@pytest.fixture(scope="session")
def procgen_page(tmp_path_factory: pytest.TempPathFactory, recall: Path) -> Path:
    """Return the report of a run whose settings name the paper's six games."""
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    pytest.importorskip("procgen", reason="its games are ProcGen's")
    folder = tmp_path_factory.mktemp("procgen")
    run = Path(shutil.copytree(recall, folder / "run"))
    config = json.loads((run / "config.json").read_text())
    config["train"] |= {"env": "paper6", "levels": "0:200", "eval_levels": "1000:1200"}
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(0, 20_000, 64):
            of_games = {f"rollout/{game}/ep_rew_mean": step % 7 / (2 + i) for i, game in enumerate(GAMES)}
            file.write(json.dumps({"step": step, **of_games}) + "\n")
    evaluation = write_evaluation(folder / "eval.json", "paper6", GAMES, BLOCKS, frozen=True)
    page = folder / "report.html"
    assert main(["report", str(run), "--eval", str(evaluation), "-o", str(page), "--verbose", "0"]) == 0
    return page
