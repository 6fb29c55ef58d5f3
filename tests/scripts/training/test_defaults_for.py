"""`srwm_rl.scripts.defaults_for`: training from Python as the command line does."""

from pathlib import Path
from typing import Any

import pytest
import torch

import srwm_rl
from srwm_rl import UserError
from srwm_rl.scripts import defaults_for
from srwm_rl.scripts.main import main
from srwm_rl.scripts.training.build import TRAINERS


@pytest.mark.parametrize(
    ("env", "algo", "changes"),
    [
        ("CartPole-v1", "ppo", {"core_kwargs": {"hidden_size": 16}}),
        ("CartPole-v1", "impala", {"synchronous": True}),
        ("recall", "ppo", {"encoder_kwargs": {"mlp": [8, 8]}, "learning_rate": 1e-3}),
        ("recall", "supervised", {}),
        ("recall", "ppo", {"core": "gru"}),
    ],
)
def test_python_trains_the_agent_of_the_command_line(
    env: str, algo: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"synchronous": ["--synchronous"], "encoder_kwargs": ["--encoder-kwargs", "mlp:[8,8]"]}
    words |= {"core_kwargs": ["--core-kwargs", "hidden_size:16"], "learning_rate": ["--learning-rate", "1e-3"]}
    words["core"] = ["--core", "gru"]
    options = [word for name in changes for word in words[name]]
    length = [*("--env", env, "--algo", algo, "-n", "2048", "--n-envs", "4", "--seed", "3", "--n-threads", "1")]
    assert main(["train", *length, *options, "--verbose", "0", "--no-progress"]) == 0
    (run,) = (tmp_path / "logs").glob("*/*")
    theirs = srwm_rl.load(run).policy

    settings: dict[str, Any] = {"n_timesteps": 2048, "n_envs": 4, "seed": 3, **changes}
    defaults = defaults_for(env, algo=algo, **settings)  # type: ignore[arg-type]
    model: Any = TRAINERS[algo]
    model = model("SRWMPolicy", defaults.make_env(), **defaults.kwargs)
    model.learn(defaults.n_timesteps)
    ours, expected = model.policy.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def test_wrong_names_are_one_line() -> None:
    for settings, words in (
        ({"env": "CartPol-v1"}, "CartPol"),
        ({"env": "recall", "n_env": 3}, "did you mean 'n_envs'"),
        ({"env": "recall", "gamma": 2.0}, "gamma must lie in"),
        ({"env": "recall", "preset": "papr"}, "did you mean 'paper'"),
        ({"env": "recall", "algo": "impala", "n_epochs": 2}, "a setting of ppo"),
        ({"env": "recall", "core": "nowhere:Core"}, "no module 'nowhere'"),
    ):
        with pytest.raises(UserError, match=words):
            defaults_for(**settings)  # type: ignore[arg-type]


def test_settings_by_name_are_merged_and_presets_are_taken() -> None:
    defaults = defaults_for("recall", core_kwargs={"n_heads": 4})
    assert defaults.kwargs["policy_kwargs"]["core_kwargs"] == {
        "hidden_size": 32, "n_layers": 1, "n_heads": 4, "key_init": 2, "edit_lr_multiplier": 3
    }  # fmt: skip
    paper = defaults_for("coinrun", algo="impala", preset="paper")
    assert paper.kwargs["policy_kwargs"]["core_kwargs"] == {"variant": "paper"}
    assert paper.n_timesteps == 50_000_000
