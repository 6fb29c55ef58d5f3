"""Pages as files: well-formed, complete in themselves, safe, and readable at any width."""

import html
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.evaluation.play_levels import Episode, Episodes
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.paired import ComparedRuns, compare
from srwm_rl.scripts.reports.pages import comparison_page

pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}$x^2$"
LOADS = {"src", "srcset", "data", "poster", "action", "background", "formaction", "ping"}
MEASURE = """<script>
const right = each => each.getBoundingClientRect().right;
const wide = [...document.querySelectorAll("body *")].filter(each => right(each) > innerWidth + 1);
const said = top.document.body.dataset;
said.width = innerWidth;
said.scroll = document.documentElement.scrollWidth;
said.thin = [...document.querySelectorAll("tbody th")].filter(each => each.offsetWidth < 60).length;
said.wide = wide.map(each => each.tagName + "." + each.getAttribute("class")).join(" ");
</script></body>"""


@pytest.fixture(params=["recall_page", "procgen_page", "compare_page"])
def page(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def compare_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the comparison of agents on six games, two seeds a side."""
    pytest.importorskip("procgen", reason="its games are ProcGen's")
    games = ("bigfish", "fruitbot", "leaper", "maze", "plunder", "starpilot")
    head = {"env": "paper6", "mode": "easy", "actions": "stochastic", "repeats": 1, "num_timesteps": 50_000_000}
    sides = []
    for core in ("srwm", "feedforward"):
        evaluations = []
        for seed in range(2):
            rng = np.random.default_rng([seed, len(core)])
            played = itertools.product(games, range(1000, 1200))
            of = Episodes(Episode(game, level, float(rng.integers(-3, 30)), 9, None) for game, level in played)
            results = {"levels": {"held-out": "1000:1200"}, "trained_on": {}, "episodes": {"held-out": of}}
            evaluations.append(head | results)
        trained = [TrainConfig(env="paper6", core=core, seed=seed) for seed in range(2)]
        names = [f"logs/impala_{core}/paper6_{seed}" for seed in range(2)]
        sides.append(ComparedRuns(names, trained, evaluations))
    first, second = sides
    path = tmp_path_factory.mktemp("compare") / "compare.html"
    page = comparison_page((first, second), compare((first, second), 0), "srwm-rl compare")
    path.write_text(page, encoding="utf-8")
    return path


def test_tags_are_closed_in_order_and_ids_are_unique(page: Path, read_page: Any) -> None:
    read = read_page(page)
    ids = Counter(attributes["id"] for _, attributes in read.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    referred = set(re.findall(r"url\(#([^)]+)\)", read.source)) | set(re.findall(r'[ :]href="#([^"]+)"', read.source))
    assert referred <= ids.keys()
    assert len(read.all("h1")) == 1
    assert ("html", {"lang": "en"}) in read.tags


def test_pages_load_nothing_external(page: Path, read_page: Any) -> None:
    read = read_page(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "img", "form"} & {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in LOADS:
                assert str(value).startswith("data:video/mp4;base64,"), (tag, name, value)
            if name == "href":
                assert tag == "a" or str(value).startswith("#"), (tag, value)
    assert "@import" not in read.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", read.source))
    (policy,) = (meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)


def test_pictures_are_described(page: Path, read_page: Any) -> None:
    read = read_page(page)
    for attributes in read.all("svg"):
        assert attributes["role"] == "img"
        assert len(str(attributes["aria-label"])) > 20
    maps = [element for element in read.all("div") if "cells" in str(element.get("class")).split()]
    assert maps
    assert all(element["role"] == "img" and element["aria-label"] for element in maps)


def test_names_are_escaped(recall: Path, fake_evaluation: Any, tmp_path: Path, call: Any, read_page: Any) -> None:
    run = Path(shutil.copytree(recall, tmp_path / HOSTILE))
    config = json.loads((run / "config.json").read_text())
    config |= {"command": f"srwm-rl {HOSTILE}", "versions": {HOSTILE: HOSTILE}, "started": HOSTILE}
    (run / "config.json").write_text(json.dumps(config))
    evaluation = fake_evaluation(tmp_path / "eval.json", "recall", (HOSTILE, "b"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, f"srwm/{HOSTILE}": 1.0}) + "\n")
    result = call("report", run, "--eval", evaluation, "-o", tmp_path / "page.html")
    assert result.code == 0, result
    read = read_page(tmp_path / "page.html")
    assert not {"img", "script"} & {tag for tag, _ in read.tags}
    assert read.text.count(HOSTILE) >= 6  # game, folder, command, version twice, time, curve
    assert "{{7*7}}" in read.text


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_window(page: Path, width: int, browse: Any, read_page: Any, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    inner = html.escape(text.replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"  # a window of Chromium's own is never narrower than 500 pixels
    frame.write_text(
        f'<body><iframe style="width: {width}px; height: 900px" frameborder="0" srcdoc="{inner}"></iframe>'
    )
    body = re.search(r"<body ([^>]*)>", browse(frame, "--window-size=1400,1000", "--dump-dom").stdout)
    assert body is not None
    measured = dict(re.findall(r'data-(\w+)="([^"]*)"', body[1]))
    assert measured == {"width": str(width), "scroll": str(width), "thin": "0", "wide": ""}


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_logs_no_error(page: Path, width: int, browse: Any, tmp_path: Path) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    result = browse(page, f"--window-size={width},1200", f"--screenshot={shot}", "--enable-logging=stderr", "--v=0")
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 200  # smooth lines and letters
    assert counts.max() < 0.99 * len(pixels)
    assert tuple(colours[counts.argmax()]) == (255, 255, 255)
