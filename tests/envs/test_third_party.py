"""Environments of other packages, by the ids that they register; skipped where a package is not installed."""

import numpy as np
import pytest

from srwm_rl.envs import GymnasiumBatch, list_envs, make_batch_env, resolve
from srwm_rl.envs.make import PACKAGES
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import load_wrappers

POPGYM_EASY = (
    "Autoencode", "RepeatPrevious", "RepeatFirst", "CountRecall", "PositionOnlyCartPole", "PositionOnlyPendulum",
    "VelocityOnlyCartpole", "NoisyPositionOnlyCartPole", "NoisyPositionOnlyPendulum", "MultiarmedBandit",
    "HigherLower", "Battleship", "Concentration", "MineSweeper",
)  # fmt: skip


def play(env_id, steps=30, **options):
    """Play level 3 in two environments with equal actions; check that they show the same."""
    env = make_batch_env(env_id, 2, "0:10", seed=0, **options)
    env.action_space.seed(0)
    obs = env.reset(levels=[3, 3])
    for _ in range(steps):
        parts = obs.values() if isinstance(obs, dict) else [obs]
        assert all(np.array_equal(part[0], part[1]) for part in parts)
        step = env.step(np.array([env.action_space.sample()] * 2))
        assert step.rewards[0] == step.rewards[1]
        obs = step.obs
    env.close()
    return obs


@pytest.mark.parametrize("name", POPGYM_EASY)
@pytest.mark.filterwarnings("ignore")
def test_popgym(name):
    pytest.importorskip("popgym")
    obs = play(f"popgym-{name}Easy-v0")
    assert isinstance(obs, dict) == (name == "Autoencode")


@pytest.mark.parametrize("name", ["LabyrinthEscape", "LabyrinthExplore"])
@pytest.mark.filterwarnings("ignore")
def test_popgym_navigation(name):
    pytest.importorskip("popgym")
    pytest.importorskip("mazelib", reason="popgym[navigation] is not installed")
    play(f"popgym-{name}Easy-v0")


def test_minigrid_without_its_mission():
    pytest.importorskip("minigrid")
    with pytest.warns(UserWarning, match="mission is text"):
        obs = play("MiniGrid-MemoryS7-v0")
    assert {key: part.shape for key, part in obs.items()} == {"direction": (2,), "image": (2, 7, 7, 3)}


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
@pytest.mark.filterwarnings("ignore")
def test_atari(env_id):
    pytest.importorskip("ale_py")
    assert play(env_id).shape == (2, 210, 160, 3)


@pytest.mark.parametrize(("env_id", "env_kwargs"), [("ALE/Breakout-v5", {"frameskip": 1}), ("PongNoFrameskip-v4", {})])
@pytest.mark.filterwarnings("ignore")
def test_atari_as_sb3_wraps_it(env_id, env_kwargs):
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    obs = play(env_id, 40, env_kwargs=env_kwargs, wrappers=load_wrappers(True, ()), frame_stack=4)
    assert (obs.shape, obs.dtype) == ((2, 84, 84, 4), np.uint8)
    assert (np.diff(obs.astype(int), axis=-1) != 0).any(), "four frames of one moment"


@pytest.mark.filterwarnings("ignore")
def test_an_atari_episode_has_all_lives_and_the_games_own_rewards():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    env = make_batch_env(
        "ALE/SpaceInvaders-v5", 1, "0:10", 0, env_kwargs={"frameskip": 1}, wrappers=load_wrappers(True, ())
    )
    lives, rewards = set(), set()
    env.reset(levels=[3])
    for _ in range(3000):
        lives.add(env.envs[0].unwrapped.ale.lives())
        step = env.step(np.array([1]))  # fire
        rewards.add(float(step.rewards[0]))
        if step.terminated[0]:
            break
    assert lives == {1, 2, 3}
    assert max(rewards) >= 5, "clipped"


@pytest.mark.filterwarnings("ignore")
def test_box2d():
    pytest.importorskip("Box2D", reason="gymnasium[box2d] is not installed")
    assert play("LunarLander-v3").shape == (2, 8)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "no_such_package", "NoSuch-.+")
    with pytest.raises(UserError, match="pip install no-such-package"):
        resolve("NoSuch-v0")
    assert "no_such_package" not in list_envs()


@pytest.mark.filterwarnings("ignore")
def test_what_is_listed_can_be_chosen():
    listed = list_envs()["gymnasium"]
    assert "Blackjack-v1" in listed
    assert "GymV21Environment-v0" not in listed
    for env_id in listed:
        GymnasiumBatch(env_id, 1).close()
