"""Settings in a YAML file."""

from dataclasses import fields
from pathlib import Path

import pytest

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.config_file import NAMES, OF_ONE_CALL, read_config_file, to_yaml
from srwm_rl.scripts.config.defaults import PRESETS, defaults
from srwm_rl.scripts.config.settings import ALGO_SETTINGS, TrainConfig
from srwm_rl.scripts.main import main


def _file(folder: Path, text: str) -> str:
    path = folder / "settings.yml"
    path.write_text(text)
    return str(path)


def test_values_mean_what_they_mean_on_the_command_line(tmp_path: Path) -> None:
    text = """
    learning-rate: 7e-4        # text in YAML 1.1
    levels: 10:20              # 620 in YAML 1.1
    env: 'bandit'
    target_kl: null
    normalize_reward: false
    inputs: [action, step]
    core_kwargs: {hidden_size: 16, key_init: 2.5, parts: [1, x], nested: {a: 1e-3, b: null}}
    env_kwargs: ["n_pulls:5"]
    """
    assert read_config_file(_file(tmp_path, text)) == {
        "learning_rate": 7e-4,
        "levels": "10:20",
        "env": "bandit",
        "target_kl": None,
        "normalize_reward": False,
        "inputs": ("action", "step"),
        "core_kwargs": ("hidden_size:16", "key_init:2.5", 'parts:[1,"x"]', 'nested:{"a":0.001,"b":null}'),
        "env_kwargs": ("n_pulls:5",),
    }


@pytest.mark.parametrize(
    ("preset", "algo"), [*((preset, None) for preset in PRESETS), *((None, algo) for algo in ALGO_SETTINGS)]
)
def test_a_printed_config_is_read_as_it_was(tmp_path: Path, preset: str | None, algo: str | None) -> None:
    config = defaults("recall" if preset is None else None, preset, None, algo)
    stored = read_config_file(_file(tmp_path, to_yaml(config)))
    assert {**{name: getattr(TrainConfig, name) for name in NAMES}, **stored} == {
        name: getattr(config, name) for name in NAMES
    }
    assert {*NAMES, *OF_ONE_CALL} == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no settings"),
        ("- env", "it has no settings"),
        ("env: [", "no YAML"),
        ("n_env: 3", "unknown setting 'n_env'; did you mean 'n_envs'"),
        ("resume: logs/1", "unknown setting 'resume'"),
        ("seed: 1\nseed: 2", "a name twice"),
        ("n-envs: 1\nn_envs: 2", "two spellings"),
        ("n_envs: many", "n_envs"),
        ("n_envs: 0", "n_envs"),
        ("env: null", "env"),
        ("a: &x [1]\nb: *x", "alias"),
        ("env: \xff", "no YAML"),
        ("[" * 10_000, "no YAML"),
        ("core_kwargs: [hidden_size]", "takes name:value"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_config_file(str(path))
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_config_file(str(tmp_path / "none.yml"))
    with pytest.raises(UserError, match="regular file"):
        read_config_file("/dev/zero")


def test_options_are_above_the_file_and_the_file_above_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path, "env: recall\nn_envs: 8\ngamma: 0.5\ncore_kwargs: {hidden_size: 16}\n")
    argv = ["train", "--config", path, "--gamma", "0.7", "--core-kwargs", "n_heads:4", "--print-config"]
    assert main(argv) == 0
    (tmp_path / "printed.yml").write_text(capsys.readouterr().out)
    printed = read_config_file(str(tmp_path / "printed.yml"))
    assert (printed["env"], printed["n_envs"], printed["gamma"], printed["gae_lambda"]) == ("recall", 8, 0.7, 0.3)
    assert {"hidden_size:16", "n_heads:4", "n_layers:1", "edit_lr_multiplier:3"} < {*printed["core_kwargs"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [("core: my_module:Core", "--core my_module:Core"), ("env: my_module:Env-v0", "--env my_module:Env-v0")],
)
def test_a_file_imports_no_code(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", _file(tmp_path, text), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_run_by_a_file_is_resumed_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, f"env: recall\nn_envs: 4\nbatch_size: 256\nn_timesteps: 256\nlog_folder: {tmp_path}\n")
    assert main(["train", "--config", path, "--no-progress"]) == 0
    (run,) = (tmp_path / "ppo_srwm").iterdir()
    assert main(["train", "--resume", str(run), "--config", path, "-n", "512", "--no-progress"]) == 2
    assert "leave out --config" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "-n", "512", "--no-progress"]) == 0
    assert "done: 512 steps" in capsys.readouterr().out
