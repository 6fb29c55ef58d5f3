"""Settings: round trips through JSON and the command line; wrong ones are refused."""

import json
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest

from srwm_rl import core_names, make_core
from srwm_rl.agents import PPO
from srwm_rl.envs import make_vec_env
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError
from srwm_rl.scripts import defaults_for
from srwm_rl.scripts.cli import parse, peek
from srwm_rl.scripts.config.defaults import EDITING_HEADS, KINDS, PRESETS, defaults, with_defaults
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig, bounds_of, pairs
from srwm_rl.scripts.evaluation.control_experiments import parameter_count

COUNTS = (
    "n_timesteps",
    "n_envs",
    "n_steps",
    "batch_size",
    "n_epochs",
    "save_freq",
    "jobs",
    "sequence_length",
    "bptt",
    "n_threads",
    "n_groups",
    "eval_episodes",
)
COEFFICIENTS = [
    name for name in bounds_of(TrainConfig) if type(getattr(TrainConfig, name)) is not int and name not in COUNTS
]


def read(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "srwm-rl train")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_settings_survive_json() -> None:
    config = defaults("recall", None)
    assert read_settings(json.loads(json.dumps(config.to_json())), "a file") == config


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"n_envz": 3}, "unknown name 'n_envz'"),
        ({"n_envs": "4"}, "n_envs: Expected `int`, got `str`"),
        ({"n_envs": True}, "n_envs: Expected `int`, got `bool`"),
        ({"levels": 5}, "levels: Expected `str`, got `int`"),
        ({"inputs": [1]}, "inputs[0]: Expected `str`, got `int`"),
        ({"n_envs": 0}, "n_envs"),
    ],
)
def test_damaged_settings_are_refused(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings({**TrainConfig().to_json(), **change}, "a file")
    assert "a file: " in str(caught.value)
    assert part in str(caught.value)


def test_settings_that_are_no_dictionary_are_refused() -> None:
    with pytest.raises(UserError):
        read_settings([], "a file")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_counts_are_whole_and_positive(name: str, value: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    message = refused(flag, value)
    assert message.startswith(flag)
    assert value in message


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.5"])
def test_coefficients_are_finite_and_in_range(name: str, value: str) -> None:
    assert f"--{name.replace('_', '-')} must lie in" in refused(f"--{name.replace('_', '-')}", value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gamma", "high"], "--gamma takes a number, not 'high'; see srwm-rl train --help"),
        (["-n", "1e6"], "--n-timesteps takes a whole number, not '1e6'; see srwm-rl train --help"),
        (["--algo", "ppx"], "--algo takes one of 'ppo', 'impala', 'supervised', not 'ppx'; see srwm-rl train --help"),
        (["--env"], "--env needs a value; see srwm-rl train --help"),
        (["--n-evs", "4"], "unknown option '--n-evs'; did you mean '--n-envs'?; see srwm-rl train --help"),
        (["--n-evs=4"], "unknown option '--n-evs'; did you mean '--n-envs'?; see srwm-rl train --help"),
        (["-z"], "unknown option '-z'; see srwm-rl train --help"),
        (["stray"], "unexpected argument 'stray'; see srwm-rl train --help"),
        (
            ["--algo", "impala", "--n-epochs", "7"],
            "--n-epochs is a setting of ppo, not of impala: leave it out, or give --algo ppo; see srwm-rl train --help",
        ),
        (
            ["--rho-clip", "2"],
            "--rho-clip is a setting of impala, not of ppo: leave it out, or give --algo impala; "
            "see srwm-rl train --help",
        ),
        (
            ["--loss-reward-clip", "1"],
            "--loss-reward-clip clips raw rewards: give --no-normalize-reward too, or leave it out; "
            "see srwm-rl train --help",
        ),
        (["--seed", "-1"], "--seed must lie in [0, 2147483647], not -1; see srwm-rl train --help"),
        (["--core-kwargs", "x"], "--core-kwargs takes name:value, not 'x'; see srwm-rl train --help"),
    ],
)
def test_error_messages(argv: list[str], message: str) -> None:
    assert refused(*argv) == message


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "1", "--seed", "2"],
        ["--seed=1", "--seed", "1"],
        ["-n", "5", "--n-timesteps", "6"],
        ["--n-envs", "5", "--n_envs", "6"],
        ["--progress", "--no-progress"],
        ["--core-kwargs", "a:1", "--core-kwargs", "b:2"],  # tyro would drop the first
    ],
)
def test_an_option_given_twice_is_refused(argv: list[str]) -> None:
    assert "is given twice" in refused(*argv)


def test_values_that_look_like_options_are_values() -> None:
    assert read("--levels", "-3:5").levels == "-3:5"
    assert read("--core-kwargs", "a:1", "b:-2", "--n-envs", "3").core_kwargs == ("a:1", "b:-2")
    assert read("--n_envs", "3").n_envs == 3
    assert read("-n", "7", "-f", "x", "--no-progress").n_timesteps == 7


def test_peek_reads_both_spellings() -> None:
    assert peek(["-f", "x", "--env", "maze"], "--env") == "maze"
    assert peek(["--env=maze"], "--env") == "maze"
    assert peek(["--env"], "--env") is None
    assert peek(["--environment", "maze"], "--env") is None


def test_pairs() -> None:
    texts = (
        "hidden_size:64",
        "variant:paper",
        "mlp:[64,64]",
        'cnn:{"channels":[4]}',
        "on:True",
        "off:false",
        "no:None",
    )
    assert pairs(texts, "core_kwargs") == {
        "hidden_size": 64,
        "variant": "paper",
        "mlp": [64, 64],
        "cnn": {"channels": [4]},
        "on": True,
        "off": False,
        "no": None,
    }


@pytest.mark.parametrize("text", ["a", ":1", "a:", ""])
def test_pairs_refuses(text: str) -> None:
    with pytest.raises(UserError, match="--env-kwargs takes name:value"):
        pairs((text,), "env_kwargs")


@pytest.mark.parametrize(
    ("env", "preset", "n_envs"),
    [
        ("coinrun", None, 64),
        ("coinrun,maze,heist", None, 66),
        ("paper6", "procgen-cpu", 66),
        (None, "paper", 48),
        ("coinrun,maze,heist", "demo", 33),
    ],
)
def test_several_games_have_as_many_environments_each(env: str | None, preset: str | None, n_envs: int) -> None:
    assert defaults(env, preset).n_envs == n_envs


@pytest.mark.parametrize(
    ("env", "kind"), [("coinrun,maze", "procgen"), ("bandit", "task"), ("CartPole-v1", "gymnasium")]
)
def test_each_kind_of_environment_has_its_defaults(env: str, kind: str) -> None:
    config = defaults(env, None)
    expected = {**asdict(TrainConfig()), **KINDS[kind], "env": env}
    if kind == "task":
        expected["core_kwargs"] += EDITING_HEADS
    assert asdict(config) == expected


@pytest.mark.parametrize("task", ["recall", "parity", "repeat_previous", "bandit"])
def test_tasks_are_trained_as_their_ten_seeds_were(task: str) -> None:
    config = defaults(task, None)
    names = ("n_envs", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "learning_rate", "ent_coef")
    assert [getattr(config, name) for name in names] == [64, 64, 512, 3, 0.95, 0.3, 5e-3, 0.02]
    assert config.normalize_reward
    assert config.lr_decay == "linear"
    heads = ("hidden_size:32", "n_layers:1", "n_heads:2", "key_init:2", "edit_lr_multiplier:3")
    assert config.core_kwargs == heads


@pytest.mark.parametrize("task", ["hidden_controls", "bandit", "recall", "parity", "repeat_previous"])
def test_other_memories_have_about_as_many_parameters_in_a_task(task: str) -> None:
    """The comparison of the README: `srwm-rl train --env TASK --core CORE`, and the sizes of docs/results."""
    sizes = {}
    for core in ("srwm", "delta", "gru", "lstm"):
        settings = defaults_for(task, core=core, n_envs=1)
        model: Any = PPO("SRWMPolicy", settings.make_env(), **settings.kwargs)
        sizes[core] = parameter_count(model.policy.core)
    if task == "hidden_controls":
        assert sizes == {"srwm": 13_408, "delta": 14_944, "gru": 12_426, "lstm": 12_120}
    assert max(sizes.values()) < 1.35 * min(sizes.values())


def test_other_memories_have_their_own_learning_rates_in_tasks() -> None:
    cases = {("recall", "gru"): 1e-2, ("recall", "lstm"): 5e-3, ("recall", "delta"): 5e-3, ("mdp", "gru"): 3e-3}
    cases |= {("hidden_controls", "gru"): 1e-2, ("hidden_controls", "lstm"): 2e-2, ("CartPole-v1", "gru"): 1e-3}
    assert {case: defaults(case[0], None, case[1]).learning_rate for case in cases} == cases
    assert defaults("recall", None, "gru", "impala").learning_rate == 4e-3
    assert defaults("recall", None, "gru", "supervised").core_kwargs == ("hidden_size:32", "n_layers:1")


def merged(env: str, *argv: str, preset: str | None = None, core: str | None = None) -> TrainConfig:
    default = defaults(env, preset, core)
    return with_defaults(parse(TrainConfig, list(argv), "srwm-rl train", default), default)


HEADS = ("n_heads:2", "key_init:2", "edit_lr_multiplier:3")


@pytest.mark.parametrize(
    ("core", "given", "expected"),
    [
        ("srwm", [], ("hidden_size:32", "n_layers:1", *HEADS)),
        ("srwm", ["short_conv:4"], ("hidden_size:32", "n_layers:1", *HEADS, "short_conv:4")),
        (
            "srwm",
            ["key_init:1", "hidden_size:64"],
            ("hidden_size:64", "n_layers:1", "n_heads:2", "key_init:1", HEADS[2]),
        ),
        ("srwm", ["variant:paper"], ("hidden_size:32", "n_layers:1", "n_heads:2", "variant:paper")),
        ("lstm", ["hidden_size:30"], ("hidden_size:30", "n_layers:1")),
        ("delta", ["n_layers:2"], ("hidden_size:32", "n_layers:2", "n_heads:4")),
        ("mine:Core", ["width:5"], ("width:5",)),
    ],
)
def test_core_kwargs_are_merged_with_a_tasks_defaults(core: str, given: list[str], expected: tuple[str, ...]) -> None:
    assert merged("recall", "--core", core, *["--core-kwargs"] * bool(given), *given, core=core).core_kwargs == expected


def test_a_presets_settings_are_merged_too() -> None:
    assert merged("coinrun", "--core-kwargs", "n_layers:3", preset="paper").core_kwargs == (
        "variant:paper",
        "n_layers:3",
    )
    config = merged(
        "starpilot", "--encoder-kwargs", "features:64", "--env-kwargs", "use_backgrounds:false", preset="demo"
    )
    assert config.encoder_kwargs == ('cnn:{"kind":"nature","channels":[16,32,32]}', "features:64")
    assert config.env_kwargs == ("use_backgrounds:false",)


@pytest.mark.parametrize(("task", "gamma", "rate"), [("recall", 0.99, 4e-3), ("parity", 0.0, 5e-3)])
def test_impala_keeps_its_settings_for_tasks(task: str, gamma: float, rate: float) -> None:
    config = defaults(task, None, algo="impala")
    assert (config.gamma, config.learning_rate, config.ent_coef) == (gamma, rate, 0.01)
    assert config.core_kwargs == ("hidden_size:32", "n_layers:1", "n_heads:4")
    assert not config.normalize_reward


def test_fewshot_is_trained_by_right_answers_unless_another_algorithm_is_chosen() -> None:
    assert defaults("fewshot", None) == defaults("fewshot", None, algo="supervised")
    assert defaults("fewshot", None, algo="ppo").algo == "ppo"
    assert defaults("recall", None).algo == "ppo"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_all_their_settings(preset: str) -> None:
    config = defaults(None, preset)
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value
    assert config.preset == preset


@pytest.mark.parametrize(
    "env", ["srwm_rl/HiddenControls-v0", "srwm_rl:hidden_controls", "srwm_rl:srwm_rl/HiddenControls-v0"]
)
def test_a_tasks_gymnasium_id_has_the_settings_of_its_name(env: str) -> None:
    assert defaults(env, None) == defaults("hidden_controls", None)
    assert read("--env", env).env == "hidden_controls"


@pytest.mark.parametrize("env", ["procgen-starpilot-v0", "srwm_rl:procgen-starpilot-v0"])
def test_a_games_gymnasium_id_has_the_settings_of_its_name(env: str) -> None:
    assert defaults(env, None) == defaults("starpilot", None)


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        defaults(None, "quikstart")


@pytest.mark.parametrize(
    ("task", "longest"), [("associative_recall", 20), ("hidden_controls", 6 * 12), ("mdp", 10 * 10)]
)
def test_a_rollout_of_the_trial_tasks_holds_whole_episodes_in_whole_sequences(task: str, longest: int) -> None:
    config = defaults(task, None)
    assert config.n_steps % longest == config.batch_size % config.n_steps == 0
    assert config.normalize_reward
    assert config.inputs == TASKS[task].memory_inputs


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if "reward" in task.memory_inputs])
def test_a_tasks_rewards_reach_its_agents_unclipped(task: str) -> None:
    """Clipped to 1, most rewards of `mdp` looked alike: agents that are to learn from them could not."""
    config = defaults(task, None)
    env = make_vec_env(task, 16, config.levels, config.seed, **config.env_settings())
    env.action_space.seed(0)
    env.reset()
    for _ in range(20):
        obs, rewards, dones, _ = env.step(np.array([env.action_space.sample() for _ in range(16)]))
        assert isinstance(obs, dict)
        np.testing.assert_array_equal(obs["previous_reward"][:, 0], np.where(dones, 0, rewards).astype(np.float32))


def test_defaults_fit_every_core() -> None:
    assert any(text.startswith("n_heads:") for text in defaults("recall", None, "srwm").core_kwargs)
    for core in core_names():
        kwargs = defaults("recall", None, core).core_kwargs
        assert ("hidden_size:32" in kwargs) == (core not in ("gru", "lstm"))
        make_core(core, 7, **pairs(kwargs, "core_kwargs"))
    assert defaults("recall", None, "mine:Core").core_kwargs == ()


@pytest.mark.parametrize("env", ["coinrun", "recall", "CartPole-v1"])
def test_impala_has_defaults_of_its_own_and_the_papers_numbers(env: str) -> None:
    config = defaults(env, None, algo="impala")
    assert (config.algo, config.optimizer, config.max_grad_norm) == ("impala", "rmsprop", 40)
    assert config.batch_size % config.n_steps == 0
    assert defaults(env, None).max_grad_norm == 0.5


@pytest.mark.parametrize(("preset", "env", "levels"), [("paper", "paper6", 200), ("paper-memory", "dodgeball,", 500)])
def test_the_papers_presets_are_the_published_setting(preset: str, env: str, levels: int) -> None:
    config = defaults(None, preset)
    assert config.env.startswith(env)
    assert config.levels == f"0:{levels}"
    assert (config.n_envs, config.n_steps, config.batch_size) == (48, 50, 32 * 50)
    assert (config.learning_rate, config.lr_decay, config.optimizer, config.rms_prop_eps) == (
        6e-4, "linear", "rmsprop", 0.01,
    )  # fmt: skip
    assert (config.max_grad_norm, config.ent_coef, config.vf_coef, config.gamma) == (40, 0.01, 0.5, 0.99)
    assert (config.loss_reward_clip, config.reward_clip, config.normalize_reward) == (1, 1, False)
    assert config.inputs == ("reward",)
    assert config.core_kwargs == ("variant:paper",)
    assert config.mode == ("easy" if preset == "paper" else "memory")
    assert defaults(None, preset, "lstm").core_kwargs == ()


def test_every_setting_is_in_the_help(call: Any) -> None:
    result = call("train", "--help")
    assert result.code == 0
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in result.out
