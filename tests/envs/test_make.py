"""Environments by name: resolution, settings, errors, and what importing the package loads."""

import subprocess
import sys

import numpy as np
import pytest

from srwm_rl import envs
from srwm_rl.envs import LevelRange, make_batch_env, make_levels_env, make_vec_env, resolve
from srwm_rl.envs.procgen.simulator import find_distribution
from srwm_rl.errors import UserError


@pytest.mark.parametrize(
    ("env", "kind", "names"),
    [
        ("coinrun", "procgen", ("coinrun",)),
        ("coinrun, maze", "procgen", ("coinrun", "maze")),
        ("paper6", "procgen", ("bigfish", "fruitbot", "maze", "leaper", "plunder", "starpilot")),
        ("procgen-coinrun-v0", "procgen", ("coinrun",)),
        ("srwm_rl:procgen-coinrun-v0", "procgen", ("coinrun",)),
        ("recall", "task", ("recall",)),
        ("srwm_rl/Bandit-v0", "task", ("bandit",)),
        ("CartPole-v1", "gymnasium", ("CartPole-v1",)),
        ("gymnasium:CartPole-v1", "gymnasium", ("gymnasium:CartPole-v1",)),
    ],
)
def test_names_are_resolved(env, kind, names):
    assert (resolve(env).kind, resolve(env).names) == (kind, names)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("coinrum", "'coinrun'"),
        ("coinrun,mase", "'maze'"),
        ("recal", "'recall'"),
        ("CartPol-v1", "'CartPole-v1'"),
        ("procgen-coinrunn-v0", "'procgen-coinrun-v0'"),
        ("paper7", "'paper6'"),
        ("no_such_module_x:Env-v0", "no_such_module_x"),
        ("", "name of an environment"),
        (None, "name of an environment"),
        ("ééé\nzzz", "no environment"),
        ("all16,coinrun", "all16"),
    ],
)
def test_unknown_names_are_refused_in_one_line_with_the_closest_known_name(env, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(env)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_missing_procgen_is_reported_when_an_environment_is_made(monkeypatch):
    monkeypatch.setattr("srwm_rl.envs.procgen.simulator.find_spec", lambda name: None)
    assert resolve("coinrun").kind == "procgen"  # --help and --env-list need no ProcGen
    listed = envs.list_envs()
    assert listed["procgen"] == listed["game sets"] == []
    assert "recall" in listed["task"]
    with pytest.raises(UserError, match="ProcGen is not installed; run: pip install 'procgen"):
        envs.make_vec_env("coinrun", 1, "0:10", seed=0)


def test_every_listed_name_resolves():
    names = envs.list_envs()
    has_procgen = find_distribution() is not None
    assert len(names["procgen"]) == 16 * has_procgen
    assert names["game sets"] == ["paper6", "all16"][: 2 * has_procgen]
    for kind in ("procgen", "game sets", "task"):
        assert all(resolve(name) for name in names[kind])
    assert resolve(names["gymnasium"][0]).kind == "gymnasium"
    assert "CartPole-v1" in names["gymnasium"]


def test_settings_are_passed_to_the_batch():
    env = make_batch_env("maze,heist", 4, "5:9", 3, "memory", {"use_backgrounds": False, "n_threads": 1})
    assert (env.game_names, env.mode, str(env.levels), env.seed) == (["maze", "heist"] * 2, "memory", "5:9", 3)
    assert env.options["use_backgrounds"] is False
    assert make_batch_env("recall", 2, "0:9", 0, env_kwargs={"delay": 3}).delay == 3
    cartpole = make_batch_env("CartPole-v1", 1, "0:9", 0, env_kwargs={"max_episode_steps": 2})
    cartpole.reset()
    cartpole.step(np.array([0]))
    assert cartpole.step(np.array([0])).truncated[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_envs": 0},
        {"n_envs": -2},
        {"env": "paper6", "n_envs": 4},
        {"levels": "9:2"},
        {"seed": -1},
        {"mode": "extreme"},
        {"env": "recall", "mode": "hard"},
        {"env_kwargs": {"use_background": True}},
        {"env": "recall", "env_kwargs": {"delays": 3}},
        {"env": "recall", "env_kwargs": {"seed": 3}},
        {"env": "CartPole-v1", "env_kwargs": {"wheels": 3}},
    ],
)
def test_invalid_arguments_are_refused(kwargs):
    with pytest.raises(UserError) as error:
        make_vec_env(**{"env": "coinrun", "n_envs": 2, "levels": "0:9", "seed": 0, **kwargs})
    assert "\n" not in str(error.value)


def test_vec_env_has_the_requested_memory_inputs():
    env = make_vec_env("coinrun", 2, "0:9", 0, inputs=("reward",), reward_clip=2.0)
    assert set(env.observation_space.spaces) == {"observation", "previous_reward"}
    assert env.observation_space["previous_reward"].high[0] == 2
    assert make_vec_env("coinrun", 2, "0:9", 0, inputs=()).observation_space.shape == (64, 64, 3)


@pytest.mark.parametrize("inputs", [(), ("action", "step")])
def test_levels_env_plays_every_level_and_counts_the_remaining_episodes(inputs):
    env = make_levels_env("recall", 3, "100:104", 2, 0, inputs=inputs)
    env.reset()
    assert env.remaining == 8
    levels = []
    while env.remaining:
        *_, infos = env.step(np.zeros(3, int))
        levels += [info["level"] for info in infos if "episode" in info]
    assert sorted(levels) == sorted(list(range(100, 104)) * 2)
    two_levels = make_levels_env("recall", 2, [3, 9], 1, 0)
    assert two_levels.remaining == make_levels_env("recall", 2, LevelRange(3, 5), 1, 0).remaining == 2


def test_normalizer_returns_the_bounds_of_games_that_have_them():
    assert envs.normalizer("coinrun,maze", "hard") == {"coinrun": (5, 10), "maze": (4, 10)}
    assert envs.normalizer("maze", "memory") == {}
    assert envs.normalizer("recall", env_kwargs={"n_symbols": 5}) == {"recall": (0.2, 1.0)}
    assert envs.normalizer("bandit")["bandit"][1] == pytest.approx(6.66, abs=1e-3)
    assert envs.normalizer("CartPole-v1") == {}
    assert envs.normalizer("recall", attempts=2) == {"recall": (0.5, 2.0)}
    assert envs.normalizer("bandit", attempts=2) == {}  # the second attempt has the luck of the first


def test_every_public_name_can_be_imported():
    assert all(getattr(envs, name) is not None for name in envs.__all__)
    assert set(envs.__all__) == set(dir(envs))
    with pytest.raises(AttributeError):
        _ = envs.nonsense


def run_python(code):
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout.split()


def test_importing_envs_loads_no_torch_and_no_other_folder_of_ours():
    print_modules = "; import sys; print(*sys.modules)"
    for use in (
        "e.LevelRange, e.resolve('recall'), e.register_envs(), e.TASKS",
        "e.make_batch_env('recall', 2, '0:9', 0)",
    ):
        loaded = run_python(f"import srwm_rl.envs as e; {use}{print_modules}")
        assert not {"torch", "stable_baselines3", "procgen", "gym"} & set(loaded)
    loaded = run_python(f"import srwm_rl.envs as e; [getattr(e, n) for n in e.__all__]{print_modules}")
    ours = {name.split(".")[1] for name in loaded if name.startswith("srwm_rl.")}
    assert ours <= {"envs", "errors", "image_layout", "lazy"}
