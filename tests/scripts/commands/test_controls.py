"""`srwm-rl controls`: every control on every task, end to end and tiny, and wrong input refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.envs import TASKS
from srwm_rl.scripts.config import defaults
from srwm_rl.scripts.evaluation import control_experiments
from srwm_rl.scripts.evaluation.control_experiments import CONTROLS
from srwm_rl.scripts.evaluation.few_shot_controls import FEW_SHOT_CONTROLS
from srwm_rl.scripts.evaluation.table import render_controls

TINY = ("--seeds", "1", "-n", "1", "--n-levels", "2", "--verbose", "0")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_experiments, "COMMON", {"hidden_size": 8, "n_layers": 1, "n_heads": 2})
    for name, settings in control_experiments.TASK_SETTINGS.items():
        small = settings | {"n_timesteps": 8, "n_envs": 4, "n_steps": 8, "batch_size": 16, "n_epochs": 1}
        monkeypatch.setitem(control_experiments.TASK_SETTINGS, name, small)


def test_every_task_has_a_row() -> None:
    assert {*control_experiments.TASK_SETTINGS, "fewshot"} == set(TASKS)


@pytest.mark.parametrize("task", control_experiments.TASK_SETTINGS)
def test_every_control_runs_on_every_task(call: Any, tmp_path: Path, task: str) -> None:
    path = tmp_path / "report.json"
    output = call("controls", task, "--json", path, *TINY)
    assert output.code == 0, output.err
    report = json.loads(path.read_text())
    assert [row["control"] for row in report["rows"]] == list(CONTROLS)
    assert output.out.strip() == render_controls(report)
    assert output.out.count("\n| ") == len(CONTROLS) + 2


@pytest.fixture
def tiny_few_shot(monkeypatch: pytest.MonkeyPatch, few_shot_folder: Path) -> None:
    kwargs = {"n_envs": 4, "n_steps": 40, "core_kwargs": ("hidden_size:8", "n_layers:2", "n_heads:1"), "aux_coef": 0.5}
    kwargs |= {"encoder_kwargs": ("mlp:[]", 'cnn:{"kind":"conv4","channels":[4,4]}')}
    kwargs |= {"env_kwargs": (f"data:{few_shot_folder}", "ways:3")}
    monkeypatch.setitem(defaults.SUPERVISED_TASK_SETTINGS, "fewshot", kwargs)


FEW_SHOT = ("controls", "fewshot", *TINY[2:])


def test_few_shot_learning_has_controls_of_its_own(call: Any, tiny_few_shot: None, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    output = call(*FEW_SHOT, "--seeds", 1, "--json", path)
    assert output.code == 0, output.err
    report = json.loads(path.read_text())
    rows = {row["control"]: row for row in report["rows"]}
    assert list(rows) == list(FEW_SHOT_CONTROLS)
    assert output.out.strip() == render_controls(report)
    assert output.out.count("\n| ") == len(FEW_SHOT_CONTROLS) + 2
    for size, name in (("state", "srwm"), ("small", "srwm_small")):
        assert rows[f"lstm_{size}"]["state"] == rows[f"gru_{size}"]["state"] == rows[name]["state"]
    assert rows["srwm_small"]["state"] == 2 * 4 * 20  # layers, heads of 2: 2 x (3 x 2 + 4)
    for name in ("lstm", "gru"):
        assert rows[name]["parameters"] == pytest.approx(rows["srwm"]["parameters"], rel=0.2)
    assert all(set(row["more"]) == {f"after {n}" for n in range(6)} for row in report["rows"])
    assert rows["srwm"]["more"]["after 1"]["scores"] == rows["srwm"]["scores"]


def test_a_file_is_continued_and_equals_one_in_one_go(call: Any, tiny_few_shot: None, tmp_path: Path) -> None:
    only = ("--only", "srwm", "no_shift", "delta")
    once, again = tmp_path / "once.json", tmp_path / "again.json"
    assert call(*FEW_SHOT, *only, "--seeds", 2, "--json", once).code == 0
    assert call(*FEW_SHOT, "--only", "srwm", "--seeds", 1, "--json", again, "--resume").code == 0
    assert call(*FEW_SHOT, *only[:-1], "--seeds", 1, "--json", again, "--resume").code == 0
    before = json.loads(again.read_text())["rows"][0]["seconds"]
    assert call(*FEW_SHOT, *only, "--seeds", 2, "--json", again, "--resume").code == 0
    reports = [json.loads(path.read_text()) for path in (once, again)]
    assert reports[1]["rows"][0]["seconds"][: len(before)] == before
    for report in reports:
        for row in report["rows"]:
            del row["seconds"]
        del report["command"]
    assert reports[0] == reports[1]


def test_a_file_of_something_else_is_not_continued(call: Any, tiny_few_shot: None, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    argv = (*FEW_SHOT, "--only", "delta", "--seeds", 1, "--json", path, "--resume")
    assert call(*argv).code == 0
    assert "other settings" in call(*argv, "--learning-rates", 0.5).error()
    for content in ("[1]", "{}", "no json", '{"task": "fewshot", "settings": 1, "rows": 2}'):
        path.write_text(content)
        assert str(path) in call(*argv).error()
    assert "--resume continues a file" in call(*FEW_SHOT, "--resume").error()


def test_a_tasks_file_is_not_continued_with_other_rates(call: Any, tmp_path: Path) -> None:
    argv = ("controls", "recall", "--only", "random", *TINY, "--json", tmp_path / "report.json")
    assert call(*argv).code == 0
    assert call(*argv, "--resume").code == 0
    assert "other settings" in call(*argv, "--resume", "--learning-rates", 0.5).error()


def test_the_supervised_version_runs_and_chooses_rates(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    output = call("controls", "parity", "--supervised", "--learning-rates", 0.001, 0.01, "--json", path, *TINY)
    assert output.code == 0, output.err
    rows = json.loads(path.read_text())["rows"]
    assert [row["control"] for row in rows] == [name for name in CONTROLS if name != "random"]
    assert {row["learning_rate"] for row in rows} <= {0.001, 0.01}
    assert all(row["train_mean"] is not None for row in rows)


def test_only_the_named_controls_run(call: Any) -> None:
    output = call("controls", "recall", "--only", "no_shift", "random", *TINY)
    assert output.code == 0, output.err
    assert [line.split(" | ")[0] for line in output.out.splitlines()[4:]] == ["| no_shift", "| random"]


def test_each_seed_is_a_training_of_its_own_and_can_be_repeated(call: Any, tmp_path: Path) -> None:
    scores = []
    for n_seeds in (2, 1):
        path = tmp_path / f"{n_seeds}.json"
        argv = ("--only", "srwm", "-n", 16, "--n-levels", 20, "--verbose", 0, "--json", path)
        assert call("controls", "bandit", "--seeds", n_seeds, *argv).code == 0
        scores.append(json.loads(path.read_text())["rows"][0]["scores"])
    assert [len(scores_of_row) for scores_of_row in scores] == [2, 1]
    assert scores[0][0] == scores[1][0] != scores[0][1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["recal"], "did you mean 'recall'"),
        (["coinrun"], "there is no built-in task"),
        (["recall", "--only", "detla"], "did you mean 'delta'"),
        (["recall", "--supervised"], "parity alone"),
        (["parity", "--supervised", "--only", "random"], "no control 'random'"),
        (["recall", "--seeds", "0"], "--seeds must be at least 1"),
        (["recall", "--learning-rates", "0"], "--learning-rates"),
        (["recall", "--json", "/no/such/folder/x.json"], "cannot write"),
    ],
)
def test_wrong_input_is_one_line(call: Any, argv: list[str], says: str) -> None:
    assert says in call("controls", *argv).error()
