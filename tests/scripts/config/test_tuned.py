"""Settings that a search found, per environment and core."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srwm_rl import UserError
from srwm_rl.scripts import defaults_for
from srwm_rl.scripts.config import tuned
from srwm_rl.scripts.config.config_file import read_config_file
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import KWARGS, TrainConfig, parse_seeds
from srwm_rl.scripts.config.tuned import read_tuned
from srwm_rl.scripts.evaluation.card import shareable, training_command
from tests.scripts.conftest import Call

SHIPPED = sorted(tuned.FOLDER.glob("*.yml"))
FOUND_BY = "{command: srwm-rl tune --env CartPole-v1, trials: 8, seeds: '100:102', date: 2026-01-01}"
TEXT = f"""
srwm:
  found_by: {FOUND_BY}
  n_timesteps: 2048
  learning_rate: 3e-3
  n_steps: 32
  batch_size: 256
  core_kwargs: {{hidden_size: 16, n_heads: 2}}
lstm:
  found_by: {FOUND_BY}
  algo: impala
  gamma: 0.9
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have such settings for CartPole alone."""
    (tmp_path / "CartPole-v1.yml").write_text(TEXT)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(call: Call, *options: str) -> dict[str, Any]:
    """Return the settings of `srwm-rl train`."""
    result = call("train", *options, "--print-config")
    assert result.code == 0, result.err
    Path("printed.yml").write_text(result.out)
    return read_config_file("printed.yml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_can_be_trained_with_and_was_sought_alike_for_every_core(path: Path) -> None:
    by_core = read_tuned(path)
    assert {"srwm", "lstm"} <= by_core.keys()
    found_by = [of.found_by for of in by_core.values()]
    assert len({of.trials for of in found_by}) == 1 or all("by hand" in of.command for of in found_by)
    for core, of in by_core.items():
        config = replace(TrainConfig(), **{name: value for name, value in of.settings.items() if name not in KWARGS})
        assert config.n_envs * config.n_steps >= config.batch_size, core
        assert min(parse_seeds(of.found_by.seeds)) >= 100, "seeds below 100 are those of reports"


def test_train_begins_with_them_and_options_are_above(call: Call) -> None:
    settings = settings_of(call, "--env", "CartPole-v1", "--learning-rate", "2e-3", "--core-kwargs", "n_heads:4")
    assert (settings["preset"], settings["n_steps"], settings["learning_rate"]) == ("tuned", 32, 2e-3)
    assert {*settings["core_kwargs"]} == {"hidden_size:16", "n_heads:4", "n_layers:1"}
    assert settings["gamma"] == defaults("CartPole-v1", None).gamma
    assert settings_of(call, "--config", "printed.yml") == settings


def test_each_core_has_its_own(call: Call) -> None:
    settings = settings_of(call, "--env", "CartPole-v1", "--core", "lstm")
    assert (settings["algo"], settings["gamma"]) == ("impala", 0.9)
    ppo = settings_of(call, "--env", "CartPole-v1", "--core", "lstm", "--algo", "ppo")
    assert "preset" not in ppo, "they are of another trainer"
    assert "preset" not in settings_of(call, "--env", "CartPole-v1", "--core", "gru")


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "none"),
        ("--frame-stack", "2"),
        ("--frame_stack=2",),
        ("--env-kwargs", "sutton_barto_reward:True"),
        ("--shuffle-actions",),
    ],
    ids=" ".join,
)
def test_they_are_left_out_where_asked_for_and_in_other_environments(call: Call, options: tuple[str, ...]) -> None:
    settings = settings_of(call, "--env", "CartPole-v1", *options)
    assert settings.get("preset") in (None, "none")
    assert settings["n_steps"] == defaults("CartPole-v1", None).n_steps
    if "none" not in options:
        assert settings_of(call, "--env", "CartPole-v1", *options, "--preset", "tuned")["n_steps"] == 32


def test_a_wanted_preset_that_does_not_exist_is_one_line(call: Call) -> None:
    message = call("train", "--env", "recall", "--preset", "tuned", "--dry-run").error()
    assert "no tuned settings of recall with core srwm" in message
    assert "did you mean 'tuned'" in call("train", "--preset", "tunde").error()


def test_a_run_says_that_it_has_them_and_is_resumed_without_them(call: Call, folder: Path) -> None:
    result = call("train", "--env", "CartPole-v1", "--n-envs", "8", "--n-threads", "1", "--no-progress")
    assert "preset tuned (--preset none: without it)" in result.out
    (run,) = (folder / "logs" / "ppo_srwm").iterdir()
    (folder / "CartPole-v1.yml").unlink()
    result = call("train", "--resume", run, "-n", "4096", "--no-progress")
    assert "preset tuned\n" in result.out
    assert "done: 4096 steps" in result.out


def test_python_has_the_settings_of_the_command_line(call: Call) -> None:
    ours = defaults_for("CartPole-v1", n_envs=8).config
    settings = settings_of(call, "--env", "CartPole-v1", "--n-envs", "8")
    assert {name: getattr(ours, name) for name in settings} == settings
    assert defaults_for("CartPole-v1", frame_stack=2).config.n_steps == 128
    assert defaults_for("CartPole-v1", preset="none").config.n_steps == 128
    assert defaults_for("CartPole-v1", core="lstm").config.gamma == 0.99  # algo="ppo" is Python's default


@pytest.mark.parametrize("preset", [None, "tuned", "none"])
def test_the_command_of_a_card_gives_the_settings(call: Call, preset: str | None) -> None:
    trained = shareable(replace(defaults("CartPole-v1", preset), gamma=0.5))
    words = shlex.split(training_command(trained))
    config = settings_of(call, *words[2:])
    assert {name: getattr(trained, name) for name in config if name != "preset"} == {
        name: value for name, value in config.items() if name != "preset"
    }


@pytest.mark.heavy
def test_a_search_begins_without_them(call: Call, folder: Path) -> None:
    size = ("-n", "256", "--trials", "1", "--seeds", "100,101", "--levels", "2000000:2000002", "--jobs", "1")
    (folder / "fixed.yml").write_text("n_envs: 2\nbatch_size: 256\n")
    assert call("tune", "--env", "CartPole-v1", *size, "--config", "fixed.yml").code == 0
    best = settings_of(call, "--config", "tune/CartPole-v1_srwm_ppo_1/best.yml")
    assert (best["preset"], best["n_steps"]) == ("none", 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("srwm:\n  gamma: 0.9", "found_by"),
        ("srwm:\n  gama: 0.9", "unknown setting 'gama'"),
        ("srwm:\n  gamma: 2", "gamma: Expected `float` <= 1.0"),
        ("srwm:\n  env: recall", "does not hold env"),
        ("srwm:\n  wrapper: [[os:System]]", "does not hold wrapper"),
        ("srwm:\n  wrapper: [[]]", "takes my_module:MyWrapper, not"),
        ("srwm:\n  wrapper: [[srwm_rl.envs:OneHotImage], [os:System]]", "does not hold wrapper"),
        (f"srwm:\n  found_by: {FOUND_BY.replace('8', 'many')}", "trials"),
        (f"srwm:\n  found_by: {FOUND_BY.replace('date', 'day')}", "date"),
        ("srwm: 1", "no sections"),
        ("- 1", "no sections"),
        ("srwm: [", "no YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(call: Call, folder: Path, text: str, message: str) -> None:
    (folder / "CartPole-v1.yml").write_text(text)
    error = call("train", "--env", "CartPole-v1", "--dry-run").error()
    assert message in error
    assert str(folder / "CartPole-v1.yml") in error
    with pytest.raises(UserError, match="CartPole-v1"):
        defaults_for("CartPole-v1")
