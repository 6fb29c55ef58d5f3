"""What a search varies."""

from dataclasses import replace
from pathlib import Path

import pytest

from srwm_rl.errors import UserError
from srwm_rl.nn.cores import core_defaults
from srwm_rl.scripts.config.config_file import dump_yaml, from_mapping
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import ALGO_SETTINGS
from srwm_rl.scripts.tuning.space import (
    CORES,
    Range,
    default_space,
    default_values,
    parse_space,
    read_space,
    space_to_mapping,
    to_settings,
)


def test_a_file_gives_ranges_and_choices(tmp_path: Path) -> None:
    path = tmp_path / "space.yml"
    path.write_text(
        "learning-rate: {low: 1e-4, high: 1e-2, log: true}\nn_epochs: {low: 1, high: 4}\n"
        "lr_decay: [none, linear]\nnormalize_reward: [true, false]\n"
        "core_kwargs.hidden_size: [16, 32]\nn_minibatches: [1, 2]\n"
    )
    assert read_space(str(path)) == {
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "n_epochs": Range(1, 4),
        "lr_decay": ("none", "linear"),
        "normalize_reward": (True, False),
        "core_kwargs.hidden_size": (16, 32),
        "n_minibatches": (1, 2),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no settings to vary"),
        ("[a]", "no settings to vary"),
        ("learning_rat: [1]", "did you mean 'learning_rate'"),
        ("seeds: [1]", "unknown setting 'seeds'"),
        ("core_kwargs: [1]", "unknown setting 'core_kwargs'"),
        ("gamma.x: [1]", "unknown setting"),
        ("gamma: 0.9", "give a list"),
        ("gamma: []", "give a list"),
        ("gamma: [0.9, 0.9]", "different"),
        ("inputs: [[action]]", "different"),
        ("gamma: {low: 0.9}", "give a list"),
        ("gamma: {low: 0.9, high: 0.5}", "must be below"),
        ("gamma: {low: 0, high: 0.5, log: true}", "above 0"),
        ("gamma: {low: a, high: b}", "give a list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_space(str(path))


@pytest.mark.parametrize("core", [*CORES, "my_module:MyCore"])
@pytest.mark.parametrize("algo", ALGO_SETTINGS)
def test_the_tables_are_read_as_files_are_and_make_settings(algo: str, core: str) -> None:
    space = default_space(algo, core)
    assert parse_space(space_to_mapping(space)) == space
    default = defaults("bandit" if algo != "supervised" else "parity", None, "lstm" if ":" in core else core, algo)
    first = {name: of[0] if isinstance(of, tuple) else of.low for name, of in space.items()}
    settings = to_settings(first, default)
    assert from_mapping({"algo": algo, **settings}).keys() == {"algo"} | settings.keys()
    assert dump_yaml(settings)


def test_minibatches_are_a_fraction_of_the_rollout() -> None:
    default = defaults("bandit", None)
    assert to_settings({"n_minibatches": 4}, default) == {"batch_size": default.n_envs * default.n_steps // 4}
    assert to_settings({"n_minibatches": 2, "n_steps": 16}, default)["batch_size"] == default.n_envs * 8


def test_the_first_trial_has_the_defaults() -> None:
    default = defaults("bandit", None)
    values = default_values(default_space("ppo", "srwm"), default, core_defaults("srwm"))
    assert values.keys() == default_space("ppo", "srwm").keys()
    assert values["learning_rate"] == default.learning_rate
    assert values["n_minibatches"] == 8
    assert (values["core_kwargs.n_heads"], values["core_kwargs.edit_lr_multiplier"]) == (2, 3)
    assert values["core_kwargs.short_conv"] == 0  # of the core itself


def test_the_first_trial_has_the_values_nearest_to_the_defaults() -> None:
    default = replace(defaults("CartPole-v1", None), n_epochs=8, ent_coef=0.0)
    values = default_values(default_space("ppo", "lstm"), default)
    assert (values["n_epochs"], values["ent_coef"]) == (10, 1e-4)
    space = {"gamma": (0.5, "x"), "n_steps": Range(1, 2), "gae_lambda": Range(0.1, 0.2), "lr_decay": ("x", "y")}
    values = default_values(space, replace(default, gamma=0.9, n_steps=7, gae_lambda=0.05))
    assert values == {"gamma": 0.5, "n_steps": 2, "gae_lambda": 0.1}
    assert isinstance(values["n_steps"], int)


def test_a_range_with_one_whole_end_holds_fractions() -> None:
    default = replace(defaults("bandit", None), gae_lambda=0.3, n_epochs=3)
    values = default_values({"gae_lambda": Range(0, 0.9), "n_epochs": Range(1, 8)}, default)
    assert values == {"gae_lambda": 0.3, "n_epochs": 3}
