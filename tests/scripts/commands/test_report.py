"""`srwm-rl report`: the numbers of the evaluation, all runs in one page, bad input in one line."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.evaluation.statistics import t_interval
from srwm_rl.scripts.evaluation import runner
from srwm_rl.scripts.main import main
from srwm_rl.scripts.reports import pages
from srwm_rl.storage.run_group import GroupRecord, RunGroup

pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")


class Text(HTMLParser):
    """A page's visible text, with single spaces."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.feed(re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL))
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def page(call: Any, folder: Path, *argv: object) -> str:
    file = folder / "page.html"
    result = call("report", *argv, "-o", file)
    assert result.code == 0, result
    assert result.err == ""
    assert re.fullmatch(rf"{re.escape(str(file))}: [\d,]+ kB\n", result.out)
    return file.read_text(encoding="utf-8")


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(value: dict[str, float]) -> str:
    return f"[{number(value['low'])}, {number(value['high'])}]"


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> Path:
    """Return a run that differs from `recall` in its seed alone."""
    logs = tmp_path_factory.mktemp("other")
    assert main(["train", *recall_argv, "--seed", "1", "-n", "256", "-f", str(logs), "--verbose", "0"]) == 0
    return logs / "ppo_srwm" / "recall_1"


def test_the_page_says_what_the_evaluation_says(call: Any, recall: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    assert call("eval", recall, "--baselines", "--freeze-edits", "-k", 2, "--json", file).code == 0
    report = json.loads(file.read_text())
    text = Text(page(call, tmp_path, recall, "--eval", file)).text
    (constant,) = report["baselines"]
    assert f"best constant action: {constant['action']['recall']}; the best by mean return on 12 of the" in text
    for row in report["not_above"]:
        assert f"NOT ABOVE {row['baseline']} (held-out; paired, 8 levels): " in text
    for row in [*report["rows"], *constant["rows"]]:
        assert f"{number(row['return']['mean'])} {interval(row['return'])}" in text
        assert f"normalised {number(row['normalized'], 3)} solved {row['solved']['mean']:.1%}" in text
    (gap,) = report["generalization_gap"]
    assert f"generalisation gap train \N{MINUS SIGN} held-out {'+' * (gap['mean'] >= 0)}{number(gap['mean'])}" in text
    assert interval(gap) in text
    for change in report["interventions"][0]["differences"]:
        assert (
            f"{'+' * (change['return']['mean'] >= 0)}{number(change['return']['mean'])} {interval(change['return'])}"
            in text
        )
    for row in report["interventions"][0]["rows"]:
        assert f"{number(row['return']['mean'])} frozen" in text


def test_every_level_has_its_cell(call: Any, recall: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    assert call("eval", recall, "-k", 2, "--json", file).code == 0
    episodes = json.loads(file.read_text())["episodes"]
    cells = re.findall(r'<i class="s(\d)" title="(\d+): ([^"]+)"></i>', page(call, tmp_path, recall, "--eval", file))
    assert [int(level) for _, level, _ in cells] == [*range(12), *range(100, 108)]
    means = {}
    for _, level, value, *_ in (episode for episodes_of_split in episodes.values() for episode in episodes_of_split):
        means.setdefault(level, []).append(value)
    for shade, level, value in cells:
        mean = sum(means[int(level)]) / 2
        assert value == number(mean)
        assert int(shade) == {0.0: 0, 0.5: 4, 1.0: 8}[mean]


def test_playing_gives_what_reading_gives(call: Any, recall: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    assert call("eval", recall, "--baselines", "--freeze-edits", "--seed", 3, "--json", file).code == 0
    played = page(call, tmp_path, recall, "--seed", 3, "--no-progress")
    read = page(call, tmp_path, recall, "--eval", file, "--seed", 3)  # the heads' costs are stored in the run by now
    assert read.partition("<h3>Commands</h3>")[0] == played.partition("<h3>Commands</h3>")[0]


def test_seeds_are_taken_together_and_other_settings_apart(
    call: Any, recall: Path, other_seed: Path, tmp_path: Path
) -> None:
    different = Path(shutil.copytree(other_seed, tmp_path / "different"))
    config = json.loads((different / "config.json").read_text())
    config["train"]["gamma"] = 0.5
    (different / "config.json").write_text(json.dumps(config))
    averaged = page(call, tmp_path, recall, other_seed)
    assert "seeds 0, 1" in Text(averaged).text
    assert "mean over 2 seeds" in Text(averaged).text
    assert "<h2" not in averaged
    assert averaged.count('aria-label="recall: mean return') == 1  # both seeds in one picture
    apart = page(call, tmp_path, recall, different)
    assert apart.count("<h2") == 2
    assert "mean over" not in Text(apart).text
    assert apart.count('aria-label="recall: mean return') == 2


def test_several_seeds_are_averaged_level_by_level(call: Any, recall: Path, other_seed: Path, tmp_path: Path) -> None:
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for run, file in zip((recall, other_seed), files, strict=True):
        assert call("eval", run, "--json", file).code == 0
    means = [json.loads(file.read_text())["rows"][1]["return"]["mean"] for file in files]
    text = Text(page(call, tmp_path, recall, other_seed, "--eval", files[0], "--eval", files[1])).text
    assert f"held-out 100:108 {number(sum(means) / 2)} [" in text
    over_seeds = t_interval(np.array(means))
    ends = f"{number(over_seeds.mean)} [{number(over_seeds.low)}, {number(over_seeds.high)}]"
    assert re.search(rf"mean 95% t-interval over 2 seeds .*?{re.escape(ends)}", text)
    for seed, run, mean in zip((0, 1), (recall, other_seed), means, strict=True):
        assert re.search(rf"{seed} {re.escape(str(run))} 256 \S+ \[.*?{re.escape(number(mean))} \[", text)


def test_scalars_of_self_modification_are_drawn_where_logged(call: Any, recall: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in line.items() if not key.startswith("srwm/")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert "Self-modification in training" not in page(call, tmp_path, run)
    logged = [{**row, "srwm/l0/rate_y": i, "srwm/l0/rate_key": 2 * i, "srwm/l1/drift": i} for i, row in enumerate(bare)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    drawn = page(call, tmp_path, run)
    assert "Self-modification in training" in drawn
    assert 'aria-label="l0 rate over training: rate_key 0 to 6, rate_y 0 to 3"' in drawn
    assert 'aria-label="l1 drift over training: drift 0 to 3"' in drawn


def test_frozen_edits_are_left_out_where_there_are_none(
    call: Any, recall: Path, recall_argv: list[str], tmp_path: Path
) -> None:
    assert "Live against frozen" in page(call, tmp_path, recall)
    assert "Live against frozen" not in page(call, tmp_path, recall, "--no-freeze")
    argv = [word for word in recall_argv if word not in ("--core-kwargs", "hidden_size:16", "n_layers:1")]
    train = ("train", *argv, "--core", "feedforward", "-n", 64, "-f", tmp_path / "logs", "--verbose", 0)
    assert call(*train).code == 0
    assert "Live against frozen" not in page(call, tmp_path, tmp_path / "logs" / "ppo_feedforward" / "recall_1")


def test_settings_versions_and_commands_are_there(call: Any, recall: Path, tmp_path: Path) -> None:
    text = Text(page(call, tmp_path, recall, "--deterministic", "--eval-levels", "200:204")).text
    config = json.loads((recall / "config.json").read_text())
    for name, value in config["train"].items():
        assert f"{name} {value if isinstance(value, str) else json.dumps(value)}" in text
    for name, value in config["versions"].items():
        assert f"{name} {value}" in text
    assert config["command"] in text
    evaluate = f"srwm-rl eval {recall} --repeats 1 --eval-levels 200:204 --deterministic --freeze-edits=0 --baselines"
    assert evaluate in text
    assert f"srwm-rl report {recall} --deterministic" in text


def test_a_video_is_taken_in(call: Any, recall: Path, tmp_path: Path) -> None:
    content = b"\0\0\0\x18ftypisom" + bytes(range(256))
    (tmp_path / "film.mp4").write_bytes(content)
    shown = page(call, tmp_path, recall, "--video", tmp_path / "film.mp4")
    match = re.search(r'<video[^>]*src="data:video/mp4;base64,([^"]*)"', shown)
    assert match is not None
    assert base64.b64decode(match[1]) == content


def test_a_run_without_a_record_of_its_training(call: Any, recall: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    assert "holds no record of its training" in page(call, tmp_path, run)


def test_reporting_changes_nothing_in_the_run(call: Any, recall: Path, snapshot: Any, tmp_path: Path) -> None:
    before = snapshot(recall)
    page(call, tmp_path, recall)
    assert snapshot(recall) == before


@pytest.fixture
def never_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an agent is played."""

    def play(*_: object) -> None:
        raise AssertionError("played before everything was checked")

    monkeypatch.setattr(pages, "evaluate", play)


REFUSED = [
    ([], "name a run folder"),
    (["{run}", "{run}"], "is given twice"),
    (["{tmp}/nowhere"], "there is no run at"),
    (["{run}/config.json"], "is no run folder"),
    (["{run}", "{tmp}/stopped"], "stopped has no model"),
    (["{run}", "-o", "{tmp}/nowhere/page.html"], "is no folder to write in"),
    (["{run}", "-o", "{tmp}"], "give -o the name of a file"),
    (["{run}", "--video", "{tmp}/nowhere.mp4"], "cannot read"),
    (["{run}", "--video", "{run}/config.json"], "is no MP4 video"),
    (["{run}", "--eval", "{tmp}/nowhere.json"], "cannot read"),
    (["{run}", "--eval", "{run}/config.json"], "was not written by srwm-rl eval --json"),
    (["{run}", "--eval", "{run}/metrics.jsonl"], "was not written by srwm-rl eval --json"),
    (["{run}", "--eval", "{tmp}/bandit.json"], "is of srwm on bandit, but"),
    (["{run}", "--eval", "{tmp}/recall.json", "--eval", "{tmp}/recall.json"], "2 --eval files for 1 runs"),
    (["{run}", "--eval", "{tmp}/recall.json", "-k", "2"], "leave out --repeats"),
    (["{run}", "--eval", "{tmp}/recall.json", "--deterministic"], "leave out --deterministic"),
    (["{run}", "-k", "0"], "--repeats must be at least 1"),
    (["{run}", "--seed", "-1"], "--seed must lie in"),
    (["{run}", "--device", "gpu"], "there is no device 'gpu'"),
    (["{run}", "--outptu", "x"], "unknown option '--outptu'"),
]


@pytest.mark.usefixtures("never_played")
@pytest.mark.parametrize(("argv", "part"), REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_played(
    argv: list[str], part: str, call: Any, recall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recall, tmp_path / "stopped", ignore=shutil.ignore_patterns("model-*"))
    episodes = {"held-out": [["recall", level, 1.0, 5, True] for level in range(3)]}
    head = {"run": "x", "mode": None, "core": "srwm", "actions": "stochastic", "repeats": 1, "num_timesteps": 1}
    for env in ("bandit", "recall"):
        evaluation = {**head, "env": env, "levels": {"held-out": "0:3"}, "episodes": episodes}
        (tmp_path / f"{env}.json").write_text(json.dumps(evaluation))
    monkeypatch.chdir(tmp_path)
    result = call("report", *(word.format(run=recall, tmp=tmp_path) for word in argv))
    assert part in result.error()
    assert result.out == ""
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    "change",
    [
        {"episodes": {}},
        {"episodes": {"held-out": []}},
        {"episodes": {"held-out": [["recall", 1, "1.0", 5, True]]}},
        {"episodes": {"held-out": [["recall", 1, float("nan"), 5, True]]}},
        {"episodes": {"held-out": [["recall", 1, 1.0, 5]]}},
        {"episodes": {"train": [["recall", 1, 1.0, 5, True]]}},
        {"episodes": {"held-out": [["a", 1, 1.0, 5, True]], "random, held-out": [["b", 1, 1.0, 5, True]]}},
        {"levels": {"held-out": 3}},
        {"levels": {}},
        {"core": None},
        {"interventions": {}},
        {"interventions": [{"name": "x"}]},
        {"interventions": [{"name": "x", "episodes": {"held-out": [["recall", 2, 1.0, 5, True]]}}]},
        {"baselines": [{"name": "x", "episodes": {"held-out": [["recall", 2, 1.0, 5, True]]}}]},
        {"baselines": [{"name": "x", "episodes": {"held-out": [["recall", 1, 1.0, 5, True]]}, "action": "8"}]},
    ],
)
def test_damaged_evaluations_are_refused(change: dict[str, Any], call: Any, recall: Path, tmp_path: Path) -> None:
    head = {"run": "x", "env": "recall", "mode": None, "core": "srwm", "actions": "stochastic", "repeats": 1}
    good = {"num_timesteps": 1, "levels": {"held-out": "0:1"}, "episodes": {"held-out": [["recall", 1, 1.0, 5, True]]}}
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(head | good))
    assert call("report", recall, "--eval", file, "-o", tmp_path / "page.html").code == 0
    file.write_text(json.dumps(head | good | change))
    result = call("report", recall, "--eval", file, "-o", tmp_path / "page.html")
    assert "was not written by srwm-rl eval --json" in result.error()


def test_a_runs_settings_import_nothing(call: Any, recall: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["train"]["env"] = "antigravity:Thing-v0"
    (run / "config.json").write_text(json.dumps(config))
    result = call("report", run, "-o", tmp_path / "page.html")
    assert "add --env antigravity:Thing-v0" in result.error()


def test_baselines_are_played_once_for_runs_of_one_environment(
    call: Any, recall: Path, other_seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played, play = [0], runner.play_baselines

    def counted(*args: Any) -> Any:
        played[0] += 1
        return play(*args)

    monkeypatch.setattr(runner, "play_baselines", counted)
    together = page(call, tmp_path, recall, other_seed, "--no-rank-heads", "--no-freeze")
    assert played == [1]
    assert "--seed 1" in together.partition("<h3>Commands</h3>")[2]  # with which the second run's actions are drawn
    files = []
    for i, run in enumerate((recall, other_seed)):
        files += ["--eval", tmp_path / f"{i}.json"]
        assert call("eval", run, "--baselines", "--seed", i, "--json", files[-1]).code == 0
    apart = page(call, tmp_path, recall, other_seed, "--no-rank-heads", *files)
    assert played == [3]
    assert "--seed 1" not in apart.partition("<h3>Commands</h3>")[2]  # the files do not say it
    assert apart.partition("<h3>Commands</h3>")[0] == together.partition("<h3>Commands</h3>")[0]
    without = Text(page(call, tmp_path, recall, "--no-rank-heads", "--no-baselines")).text
    assert "random play" in without
    assert "constant" not in without
    assert "random play on held-out" not in Text(page(call, tmp_path, recall, "--no-rank-heads", "--no-random")).text


def test_another_agent_is_on_the_page_and_in_the_command_that_repeats_it(
    call: Any, recall: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copyfile(next((recall / "checkpoints").glob("model-*")), other)
    page = tmp_path / "page.html"
    argv = ("--no-random", "--no-freeze", "--no-rank-heads", "--no-progress")
    assert call("report", recall, "--beside", other, "-o", page, *argv).code == 0
    text = page.read_text()
    assert f"--beside={other}" in text
    assert text.count(str(other)) > 2, "in both commands and in the table"


def test_a_single_level_has_no_interval_and_no_scale(call: Any, recall: Path, tmp_path: Path) -> None:
    results, page = tmp_path / "eval.json", tmp_path / "page.html"
    one = ("--eval-levels", "100:101", "--train-levels", "none", "--no-progress")
    table = call("eval", recall, *one, "--json", results)
    assert table.code == 0
    assert "?" not in table.out
    assert call("report", recall, "--eval", results, "-o", page, "--no-progress").code == 0
    text = page.read_text()
    assert "[?, ?]" not in text
    assert " on every level." in text
    assert 'class="key"' not in text


def test_one_evaluation_per_run_of_a_group_is_asked_for(call: Any, recall: Path, tmp_path: Path) -> None:
    group = RunGroup.create(tmp_path / "recall", GroupRecord([0, 1], ["train"], 1))
    for seed in (0, 1):
        shutil.copytree(recall, group.run_path(seed))
    argv = ["report", group.path, "--eval", tmp_path / "eval.json", "-o", tmp_path / "page.html"]
    assert "1 --eval files for 2 runs: give one per run" in call(*argv).error()
