"""`srwm-rl compare`: both agents play the same levels; runs that cannot be paired are refused."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.evaluation.statistics import rliable_version, t_interval, welch_interval
from srwm_rl.scripts.main import main


def report(call: Any, tmp_path: Path, *argv: object) -> dict[str, Any]:
    file = tmp_path / "compare.json"
    output = call("compare", *argv, "--json", file)
    assert output.code == 0, output
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> list[Path]:
    """Return three runs that differ from `recall` in the seed, one of them longer and with another core."""
    logs = tmp_path_factory.mktemp("others")
    argv = ["train", *recall_argv, "-f", str(logs), "--verbose", "0"]
    assert main([*argv, "--seed", "1", "-n", "256"]) == 0
    short = [word for word in argv if word not in ("--core-kwargs", "hidden_size:16", "n_layers:1")]
    for seed in ("0", "1"):
        assert main([*short, "--core", "feedforward", "--seed", seed, "-n", "128"]) == 0
    return [logs / "ppo_srwm" / "recall_1", *(logs / "ppo_feedforward" / f"recall_{i}" for i in (1, 2))]


def test_a_comparison_pairs_what_eval_plays(call: Any, recall: Path, other_runs: list[Path], tmp_path: Path) -> None:
    argv = ("-k", 2, "--seed", 5)
    comparison = report(call, tmp_path, recall, other_runs[0], *argv)
    returns = []
    for run in (recall, other_runs[0]):
        assert call("eval", run, *argv, "--train-levels", "none", "--json", tmp_path / "eval.json").code == 0
        episodes = json.loads((tmp_path / "eval.json").read_text())["episodes"]["held-out"]
        by_level = [np.mean([episode[2] for episode in episodes if episode[1] == level]) for level in range(100, 108)]
        returns.append(np.array(by_level))
    (row,) = comparison["rows"]
    difference = returns[0] - returns[1]
    assert row["game"] == "recall"
    assert row["levels"] == 8
    assert row["difference"]["mean"] == pytest.approx(difference.mean())
    assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
    assert (row["A"], row["B"]) == (pytest.approx(returns[0].mean()), pytest.approx(returns[1].mean()))
    counts = [int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum())]
    assert [row["wins"], row["ties"], row["losses"]] == counts
    assert row["improvement"]["mean"] == pytest.approx((counts[0] + counts[1] / 2) / 8)
    expected = [["recall", 100 + i, a, b] for i, (a, b) in enumerate(zip(*returns, strict=True))]
    assert comparison["returns"] == [
        [game, level, pytest.approx(a), pytest.approx(b)] for game, level, a, b in expected
    ]
    assert comparison["levels"] == ["100:108"]


def test_exchanged_sides_have_the_opposite_difference(
    call: Any, recall: Path, other_runs: list[Path], tmp_path: Path
) -> None:
    (row,) = report(call, tmp_path, recall, other_runs[0])["rows"]
    (exchanged,) = report(call, tmp_path, other_runs[0], recall)["rows"]
    assert exchanged["difference"]["mean"] == -row["difference"]["mean"]
    assert (exchanged["wins"], exchanged["losses"]) == (row["losses"], row["wins"])


def test_the_table(call: Any, recall: Path, other_runs: list[Path]) -> None:
    output = call("compare", recall, other_runs[0])
    assert output.code == 0
    for part in ("A: srwm, 256 steps, ", "B: srwm, 256 steps, ", "held-out levels 100:108", "won / tied / lost"):
        assert part in output.out
    assert "of other training seeds they say nothing" in output.out


def test_several_seeds_a_side(call: Any, recall: Path, other_runs: list[Path], tmp_path: Path) -> None:
    comparison = report(
        call, tmp_path, "--a", recall, other_runs[0], "--b", *other_runs[1:], "--eval-levels", "100:130"
    )
    seeds = comparison["seeds"]
    means = {}
    for seed, run in zip((0, 1, 0, 1), (recall, *other_runs), strict=True):  # the second of a side as with --seed 1
        opponent = recall if run != recall else other_runs[0]
        (row,) = report(call, tmp_path, run, opponent, "--eval-levels", "100:130", "--seed", str(seed))["rows"]
        means[run] = (row["A"] - 0.25) / 0.75  # recall's random and best returns
    assert seeds["A"]["scores"] == [[pytest.approx(means[recall])], [pytest.approx(means[other_runs[0]])]]
    assert seeds["B"]["scores"] == [[pytest.approx(means[other_runs[1]])], [pytest.approx(means[other_runs[2]])]]
    sides = (means[recall], means[other_runs[0]]), (means[other_runs[1]], means[other_runs[2]])
    better = [0.5 if a == pytest.approx(b) else a > b for a, b in itertools.product(*sides)]
    assert seeds["improvement"]["mean"] == pytest.approx(sum(better) / 4)
    assert seeds["A"]["interquartile_mean"]["mean"] == pytest.approx(np.mean([means[recall], means[other_runs[0]]]))
    first, second = map(np.array, sides)
    assert seeds["A"]["mean"] == pytest.approx(t_interval(first).to_json())
    assert seeds["difference"] == pytest.approx(welch_interval(first, second).to_json())
    assert seeds["unit"] == "normalised return"
    assert seeds["computed_by"] == ("srwm-rl" if rliable_version() is None else f"rliable {rliable_version()}")
    assert comparison["rows"][0]["levels"] == 30
    output = call("compare", "--a", recall, other_runs[0], "--b", *other_runs[1:])
    assert "\n  mean: A " in output.out
    assert "interquartile mean: A " in output.out


def test_one_run_against_several_has_no_statistics_over_seeds(
    call: Any, recall: Path, other_runs: list[Path], tmp_path: Path
) -> None:
    assert report(call, tmp_path, "--a", recall, "--b", *other_runs[1:])["seeds"] is None


def test_several_ranges_of_levels_are_one_set(call: Any, recall: Path, other_runs: list[Path], tmp_path: Path) -> None:
    argv = ("--eval-levels", "200:203", "--eval-levels", "300:305")
    comparison = report(call, tmp_path, recall, other_runs[0], *argv)
    assert [level for _, level, *_ in comparison["returns"]] == [200, 201, 202, 300, 301, 302, 303, 304]
    assert comparison["levels"] == ["200:203", "300:305"]


def test_games_are_compared_one_by_one_and_together(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    pytest.importorskip("procgen", reason="its games are ProcGen's")
    argv = ("train", "--env", "fruitbot,starpilot", *procgen_argv, "-n", 64, "--verbose", 0, "-f", tmp_path)
    assert call(*argv).code == 0
    assert call(*argv, "--seed", 1).code == 0
    runs = [tmp_path / "ppo_srwm" / f"fruitbot+starpilot_{i}" for i in (1, 2)]
    comparison = report(call, tmp_path, *runs, "--eval-levels", "1000:1003", "--n-envs", 6)
    overall, *games = comparison["rows"]
    assert [row["game"] for row in comparison["rows"]] == ["all games", "fruitbot", "starpilot"]
    assert overall["normalized"]
    widths = (33.9, 61.5)  # of the published easy ranges
    expected = np.mean([row["difference"]["mean"] / width for row, width in zip(games, widths, strict=True)])
    assert overall["difference"]["mean"] == pytest.approx(expected)
    assert overall["wins"] == sum(row["wins"] for row in games)


def test_the_page_and_the_file_agree(call: Any, recall: Path, other_runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    page = tmp_path / "compare.html"
    comparison = report(call, tmp_path, "--a", recall, other_runs[0], "--b", *other_runs[1:], "-o", page)
    text = page.read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    (row,) = comparison["rows"]
    assert f"<b>{row['difference']['mean']:+.2f}</b>" in text
    assert f"[{row['difference']['low']:.2f}, {row['difference']['high']:.2f}]" in text
    assert f"<b>{row['improvement']['mean']:.1%}</b>" in text
    assert text.count('<i class="d') == len(comparison["returns"]) + 9  # and the key
    assert "n_timesteps" in text  # a setting that differs
    assert "gamma" not in text  # one that does not


def test_comparing_changes_nothing_in_the_runs(call: Any, recall: Path, other_runs: list[Path], snapshot: Any) -> None:
    before = [snapshot(run) for run in (recall, *other_runs)]
    assert call("compare", recall, other_runs[0]).code == 0
    assert [snapshot(run) for run in (recall, *other_runs)] == before


REFUSED = [
    (["{a}"], "needs two runs, not 1"),
    (["{a}", "{b}", "{c}"], "needs two runs, not 3"),
    ([], "name two runs"),
    (["--a", "{a}"], "name two runs"),
    (["{a}", "{b}", "--a", "{c}"], "not both"),
    (["{a}", "{a}"], "is given twice"),
    (["{a}", "{tmp}/nowhere"], "there is no run at"),
    (["{a}", "{tmp}/stopped"], "has no model"),
    (["{a}", "{tmp}/bandit"], "differ in environment: recall and bandit"),
    (
        ["{a}", "{tmp}/longer"],
        "differ in settings of the environment: ['delay:10', 'n_symbols:4'] and ['delay:12', 'n_symbols:4']",
    ),
    (["{a}", "{tmp}/elsewhere"], "name levels that neither was trained on with --eval-levels"),
    (["{a}", "{b}", "--eval-levels", "10:14"], "were trained on"),
    (["{a}", "{b}", "--eval-levels", "14:10"], "hold no level"),
    (["{a}", "{b}", "--json", "{tmp}/no/x.json"], "is no folder to write in"),
    (["{a}", "{b}", "-o", "{tmp}"], "give -o the name of a file"),
    (["{a}", "{b}", "-k", "0"], "--repeats must be at least 1"),
    (["{a}", "{b}", "--repeat", "1"], "did you mean '--repeats'?"),
]


@pytest.mark.parametrize(("argv", "part"), REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_played(
    argv: list[str],
    part: str,
    call: Any,
    recall: Path,
    other_runs: list[Path],
    tmp_path: Path,
    incomparable: dict[str, Path],
) -> None:
    shutil.copytree(recall, tmp_path / "stopped", ignore=shutil.ignore_patterns("model-*"))
    for name, run in incomparable.items():
        (tmp_path / name).symlink_to(run)
    output = call("compare", *(word.format(a=recall, b=other_runs[0], c=other_runs[1], tmp=tmp_path) for word in argv))
    assert part in output.error()
    assert output.out == ""
    assert "episode" not in output.err


@pytest.fixture(scope="module")
def incomparable(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> dict[str, Path]:
    """Return runs that cannot be compared with `recall`."""
    logs = tmp_path_factory.mktemp("made")

    def train(name: str, *argv: str, env: str = "recall") -> Path:
        own = ["--env", env, *recall_argv[2:], *argv]
        if "--eval-levels" in argv:
            first = own.index("--eval-levels")
            del own[first : first + 2]
        assert main(["train", *own, "-n", "64", "-f", str(logs / name), "--verbose", "0"]) == 0
        return logs / name / "ppo_srwm" / f"{env}_1"

    return {
        "bandit": train("bandit", env="bandit"),
        "longer": train("longer", "--env-kwargs", "delay:12"),
        "elsewhere": train("elsewhere", "--eval-levels", "300:308"),
    }


def test_baselines_stand_beside_both(call: Any, recall: Path, other_runs: list[Path], tmp_path: Path) -> None:
    assert report(call, tmp_path, recall, other_runs[0])["baselines"] == []
    page = tmp_path / "page.html"
    comparison = report(call, tmp_path, recall, other_runs[0], "--baselines", "-o", page)
    assert call("eval", recall, "--baselines", "--json", tmp_path / "eval.json").code == 0
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    random, constant = comparison["baselines"]
    assert (random["name"], constant["name"]) == ("random play", "best constant action")
    assert constant["return"] == evaluation["baselines"][0]["rows"][0]["return"]
    assert random["return"] == evaluation["rows"][2]["return"]
    assert constant["A"] == evaluation["baselines"][0]["differences"][0]["return"]
    assert constant["A"]["mean"] - constant["B"]["mean"] == pytest.approx(comparison["rows"][0]["difference"]["mean"])
    assert "NOT ABOVE best constant action: A on recall" in call("compare", recall, other_runs[0], "--baselines").out
    assert "NOT ABOVE best constant action: A on recall" in page.read_text()
