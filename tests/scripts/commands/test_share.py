"""`srwm-rl share`: one file that acts as the run, with the scores of its evaluation and the command that trained it."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import load
from srwm_rl.scripts.cli import parse, peek
from srwm_rl.scripts.config.defaults import defaults, with_defaults
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.card import shareable, training_command
from srwm_rl.scripts.main import main
from srwm_rl.storage.safe_file import read_file, write_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> Path:
    logs = tmp_path_factory.mktemp("share")
    assert main(["train", *recall_argv, "-n", "64", "-f", str(logs), "--verbose", "0"]) == 0
    return next(logs.glob("*/*"))


def test_a_shared_agent_is_the_runs_and_has_its_evaluation(call: Any, run: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "agent.safetensors", tmp_path / "eval.json"
    result = call("share", run, "-o", file, "--note", "a test's", "--no-progress", "-k", 2)
    assert result.code == 0, result
    card = load(file).card
    assert card is not None
    words = shlex.split(card.evaluation.replace("FILE", str(file)))[1:]
    assert call(*words, "--json", table, "--no-progress").code == 0
    report = json.loads(table.read_text())
    rows = [row for part in (report, *report["baselines"], *report["interventions"]) for row in part["rows"]]
    assert [score.player for score in card.scores] == ["agent", "random play", "best constant action", "edits frozen"]
    for score, row in zip(card.scores, rows, strict=True):
        assert (score.game, score.levels, score.n_levels) == ("recall", "100:108", 8)
        assert (score.returns.mean, score.returns.low, score.returns.high) == tuple(row["return"].values())
    assert "a test's" in result.out
    mine, theirs = load(run).policy.state_dict(), load(file).policy.state_dict()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine | theirs)


def test_a_shared_file_names_no_folder_and_no_user(call: Any, run: Path, tmp_path: Path) -> None:
    assert call("share", run, "-o", tmp_path / "a", "--no-progress", "--no-baselines", "--no-freeze").code == 0
    assert str(run.parent.parent).encode() not in (tmp_path / "a").read_bytes()


def test_the_card_of_a_file_is_printed_and_a_model_without_one_says_how_to_get_it(
    call: Any, run: Path, tmp_path: Path
) -> None:
    assert call("share", run, "-o", tmp_path / "a", "--no-progress", "--no-freeze", "--verbose", 0).out == ""
    assert "trained by    srwm-rl train --env recall" in call("zoo", tmp_path / "a").out
    model = next((run / "checkpoints").glob("model-*"))
    assert "has no card; srwm-rl share RUN -o FILE" in call("zoo", model).error()


def test_wrong_input_is_one_line(call: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    assert "there exists already" in call("share", run, "-o", tmp_path / "there").error()
    assert "one line of ASCII" in call("share", run, "-o", tmp_path / "a", "--note", "two\nlines").error()
    overlap = ("--eval-levels", "0:4", "--allow-overlap", "--no-progress")
    assert "trained on say nothing" in call("share", run, "-o", tmp_path / "a", *overlap).error()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("entry", ["scores", "command", "format"])
def test_a_damaged_card_is_refused(call: Any, run: Path, tmp_path: Path, entry: str) -> None:
    file = tmp_path / "agent"
    assert call("share", run, "-o", file, "--no-progress", "--no-baselines", "--no-freeze").code == 0
    arrays, meta = read_file(file)
    meta["card"] |= (
        {"scores": []} if entry == "scores" else {"command": "\x1b[2J"} if entry == "command" else {"new": 1}
    )
    write_file(file, arrays, meta)
    assert "is damaged: card" in call("eval", file).error()


ARGV = (
    ("--env", "recall"),
    ("--env", "parity", "--core", "gru", "--seed", "3", "-n", "5000"),
    ("--env", "coinrun,maze", "--algo", "impala", "--synchronous", "--inputs", "reward"),
    ("--env", "fewshot", "--core-kwargs", "hidden_size:16"),
    ("--env", "fewshot", "--algo", "ppo", "--n-epochs", "2"),
    ("--preset", "demo", "--no-normalize-reward", "--loss-reward-clip", "1"),
    ("--env", "recall", "--env-kwargs", "delay:3", "n_symbols:5", "--attempts", "2"),
    ("--env", "CartPole-v1", "--preset", "none", "--core-kwargs", "hidden_size:16", "--encoder-kwargs", "mlp:[8]"),
    ("--env", "CartPole-v1", "--preset", "tuned", "--core", "lstm", "-n", "5000", "--inputs"),
)


def read(argv: list[str]) -> TrainConfig:
    """Return the settings of `srwm-rl train`."""
    default = defaults(peek(argv, "--env"), peek(argv, "--preset"), peek(argv, "--core"), peek(argv, "--algo"))
    return with_defaults(parse(TrainConfig, argv, "srwm-rl train", default), default)


def command_of(file: Path) -> str:
    card = load(file).card
    assert card is not None
    return card.command


def test_a_card_names_the_commands_that_changed_the_run(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    assert call("train", *recall_argv, "-n", 128, "-f", tmp_path).code == 0
    run = tmp_path / "ppo_srwm" / "recall_1"
    first = next((run / "checkpoints").glob("model-*"))
    shutil.copy(first, tmp_path / "first.safetensors")
    assert call("train", "--resume", run, "-n", 192).code == 0
    more = ("--learning-rate", 1e-4, "--device", "cpu")  # the device is no part of what is learned
    assert call("train", "--resume", run, "-n", 256, *more, "--override").code == 0
    assert {*json.loads((run / "config.json").read_text())["history"][-1]["changed"]} > {"learning_rate", "device"}
    argv = ("--no-baselines", "--no-freeze", "-o", tmp_path / "agent.safetensors")
    assert call("share", run, *argv).code == 0
    began, *changes = command_of(tmp_path / "agent.safetensors").split("; ")
    assert read(shlex.split(began)[2:]) == shareable(read([*map(str, recall_argv), "-n", "128"]))
    assert changes == [
        "at 128 steps srwm-rl train --resume RUN --n-timesteps 192",
        "at 192 steps srwm-rl train --resume RUN --n-timesteps 256 --learning-rate 0.0001 --override",
    ]
    shutil.copy(tmp_path / "first.safetensors", first)  # which knows nothing of what came later
    assert call("share", first, *argv, "--force").code == 0
    assert command_of(tmp_path / "agent.safetensors") == began


@pytest.mark.parametrize("argv", ARGV, ids=" ".join)
def test_the_command_of_a_card_gives_the_settings(argv: tuple[str, ...]) -> None:
    trained = shareable(read([*argv, "--verbose", "0", "--n-threads", "1", "-f", "/tmp/x"]))
    words = shlex.split(training_command(trained))
    assert words[:2] == ["srwm-rl", "train"]
    assert read(words[2:]) == trained
    assert len(words) < 25
