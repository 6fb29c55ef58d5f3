"""`srwm-rl eval` of few-shot runs: their tables, their levels, and what other commands make of such runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srwm_rl.scripts.evaluation.few_shot import over_runs
from srwm_rl.scripts.evaluation.few_shot_tables import percent
from srwm_rl.scripts.evaluation.table import render_evaluation

LEVELS = ("--eval-levels", "2000000:2000012", "--train-levels", "none")


def report(call: Any, tmp_path: Path, *argv: object) -> tuple[dict[str, Any], str]:
    file = tmp_path / "report.json"
    output = call("eval", *argv, "--json", file)
    assert output.code == 0, output
    return json.loads(file.read_text()), output.out


def test_the_table_has_every_agent_setting_and_reference(
    call: Any, few_shot: Path, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    lstm = train_few_shot(core="lstm")
    argv = ("--freeze-edits", "--lesion", "1.0", "--undo", "query,key,beta", "--beside", lstm, "--ways", 2, 5)
    result, out = report(call, tmp_path, few_shot, *LEVELS, *argv, "--shots", 1, 4, "--chart", tmp_path / "chart.png")
    names = ["srwm", "edits frozen", "no edits in head 1.0", "edits of query, key, beta undone", "lstm"]
    references = ["chance", "nearest pixels", "blurred cosine"]
    settings = [("3:5", "1:3"), ("2", "1"), ("2", "4"), ("5", "1"), ("5", "4")]
    found = [(row["ways"], row["shots"], row["name"]) for row in result["few_shot"] if row["name"] != "labels alone"]
    assert found == [(*setting, name) for setting in settings for name in (*names, *references)]
    assert {row["episodes"] for row in result["few_shot"]} == {12}
    assert result["actions"] == "deterministic"
    assert out.strip() == render_evaluation(result)
    lines = out.splitlines()
    assert "held-out, 3:5 ways, 1:3 shots, 12 episodes, by examples of the class seen before" in lines
    assert [line.split()[1:3] for line in lines if line.startswith("held-out  ")] == [[*of] for of in settings]
    assert Image.open(tmp_path / "chart.png").size[0] > 900
    # The return is the accuracy over all questions, and a frozen agent's that of a policy without a memory.
    frozen = result["interventions"][0]
    assert frozen["name"] == "edits frozen"
    assert frozen["rows"][0]["return"] != result["rows"][0]["return"]


def test_without_options_it_plays_1000_levels_of_test_classes(call: Any, few_shot: Path, tmp_path: Path) -> None:
    result, _ = report(call, tmp_path, few_shot, "--train-levels", "0:2")
    assert result["levels"] == {"train": "0:2", "held-out": "2000000:2001000"}
    assert {row["split"] for row in result["few_shot"]} == {"train", "held-out"}


def test_levels_that_draw_trained_classes_are_refused(call: Any, few_shot: Path) -> None:
    for levels in ("3000000:3000004", "999990:1000004"):
        assert "were trained on (0:1000000)" in call("eval", few_shot, "--eval-levels", levels).error()
    output = call("eval", few_shot, "--eval-levels", "3000000:3000004", "--train-levels", "none", "--allow-overlap")
    assert "INVALID as a held-out score: 4 of the levels were trained on" in output.out


@pytest.mark.parametrize("levels", [("0:1000", "5000:6000"), ("all", "2000000:2000100"), ("2000000:3000000", "1:9")])
def test_training_on_the_classes_held_out_is_refused(call: Any, few_shot_folder: Path, levels: tuple[str, str]) -> None:
    argv = ("--env", "fewshot", "--algo", "supervised", "--env-kwargs", f"data:{few_shot_folder}", "--dry-run")
    result = call("train", *argv, "--levels", levels[0], "--eval-levels", levels[1])
    assert ("draw the same classes" in result.err) == (levels[0] != "2000000:3000000"), result


def test_two_data_sets_give_orders_and_a_chart(
    call: Any, few_shot_folder: Path, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(few_shot_folder)
    run = train_few_shot(data=f"{few_shot_folder},{tmp_path / 'other'}", ways=3, labels="delayed", queries=0, shots=3)
    chart = tmp_path / "chart.svg"
    result, out = report(call, tmp_path, run, *LEVELS, "--env-kwargs", "queries:4", "--chart", chart)
    own = [row for row in result["few_shot"] if row["name"] == "srwm"]
    assert sorted((row["part"], Path(row["data"]).name) for row in own) == sorted(
        (part, name) for part in (0, 1) for name in (few_shot_folder.name, "other")
    )
    assert all(row["queries"] is not None for row in own)
    assert "first, asked after the second" in out
    assert "by position from the switch" in out
    assert chart.read_text().count('<g id="axes_') == 2


def test_a_group_of_seeds_has_means_over_runs(call: Any, train_few_shot: Callable[..., Path], tmp_path: Path) -> None:
    runs = train_few_shot("--seeds", "0:2").parent / "fewshot_1"
    result, out = report(call, tmp_path, runs, *LEVELS, "--chart", tmp_path / "c.svg")
    assert result["few_shot"] == over_runs([run["few_shot"] for run in result["runs"]])
    assert "accuracy in %, 95% intervals over 2 runs (t)" in out


def test_a_report_shows_the_curves_played_or_read(call: Any, few_shot: Path, tmp_path: Path) -> None:
    pages = []
    result, _ = report(call, tmp_path, few_shot, *LEVELS, "--freeze-edits", "--baselines")
    for argv in ([*LEVELS], ["--eval", tmp_path / "report.json"]):
        output = call("report", few_shot, *argv, "-o", tmp_path / "page.html")
        assert output.code == 0, output.err
        pages.append((tmp_path / "page.html").read_text())
        assert "Learning within an episode" in pages[-1]
        assert "accuracy by examples seen, at the end srwm" in pages[-1]
    row = result["few_shot"][0]
    assert row["name"] == "srwm"
    cell = f'data-label="1"><span>{percent([row["by_seen"][1]])}</span>'
    assert [cell in page for page in pages] == [True, True]


def test_the_best_model_is_chosen_by_the_most_probable_answers_on_validation_classes(
    call: Any, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    run = train_few_shot("--eval-freq", "160", "--eval-episodes", "20")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (score,) = {line["eval_test/mean_reward"] for line in metrics if "eval_test/mean_reward" in line}
    levels = [f"{level}:{level + 1}" for level in range(1_000_000, 1_001_000, 50)]
    argv = [word for level in levels for word in ("--eval-levels", level)]
    result, out = report(call, tmp_path, run / "best", *argv, "--train-levels", "none")
    returns = [row["return"]["mean"] for row in result["rows"]]
    assert sum(returns) / len(returns) == pytest.approx(score, abs=1e-6)
    assert "the model is its run's best by mean return on 20 held-out levels of 1000000:1001000" in out


def test_compare_and_export_take_few_shot_runs(
    call: Any, few_shot: Path, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    lstm = train_few_shot(core="lstm")
    compared = call("compare", few_shot, lstm, "--eval-levels", "2000000:2000012", "--json", tmp_path / "c.json")
    assert compared.code == 0, compared.err
    assert json.loads((tmp_path / "c.json").read_text())["actions"] == "deterministic"
    exported = call("export", few_shot, "--format", "onnx", "-o", tmp_path / "agent.onnx")
    assert exported.code == 0, exported.err


def test_trials_of_several_attempts_are_evaluated_by_attempt(
    call: Any, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    result, _ = report(call, tmp_path, train_few_shot("--attempts", "2"), *LEVELS)
    assert "few_shot" not in result
    assert len(result["return_by_attempt"][0]["return"]) == 2


def test_a_zip_of_sb3_is_evaluated_alike(call: Any, few_shot: Path, few_shot_folder: Path, tmp_path: Path) -> None:
    exported = call("export", few_shot, "--format", "sb3", "-o", tmp_path / "model.zip")
    assert (exported.code, exported.err) == (0, ""), exported
    assert "srwm_rl.agents.Supervised.load(" in exported.out
    levels = ("--eval-levels", "2000000:2000012", "--train-levels", "0:3")
    expected, _ = report(call, tmp_path, few_shot, *levels)
    kwargs = (f"data:{few_shot_folder}", "ways:3:5", "shots:1:3")
    argv = ("--trust", "--env", "fewshot", "--env-kwargs", *kwargs)
    result, _ = report(call, tmp_path, tmp_path / "model.zip", *levels, *argv)
    assert result["few_shot"] == expected["few_shot"]
    assert result["actions"] == "deterministic"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--ways", "6"), "trained with 5 labels, too few for 6 ways"),
        (("--shots", "0"), "--shots takes whole numbers of at least 1"),
        (("--ways", "1"), "--ways takes whole numbers of at least 2"),
        (("--shots", "12"), "a train class of 12 images, fewer than shots + queries (13)"),
        (("--chart", "x.pdf"), "--chart draws .svg and .png files"),
        (("--chart", "/no/such/folder/x.png"), "cannot write"),
    ],
)
def test_wrong_input_is_one_line(call: Any, few_shot: Path, argv: tuple[str, str], says: str) -> None:
    assert says in call("eval", few_shot, *argv).error()


@pytest.mark.parametrize("argv", [("--ways", "5"), ("--shots", "5"), ("--chart", "x.png")])
def test_options_of_few_shot_runs_are_refused_for_others(call: Any, recall: Path, argv: tuple[str, str]) -> None:
    assert f"{argv[0]} is for few-shot runs" in call("eval", recall, *argv).error()
