"""Wrappers by name: imported, applied from the inside out, and refused in one line."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from srwm_rl.envs import NamedWrapper, make_batch_env, make_vec_env
from srwm_rl.errors import UserError

MODULE = """
import gymnasium

class Add(gymnasium.RewardWrapper):
    def __init__(self, env, amount=1.0):
        super().__init__(env)
        self.amount = amount

    def reward(self, reward):
        return reward + self.amount

class Fails(gymnasium.Wrapper):
    def __init__(self, env):
        raise RuntimeError("no\\nwheels")

def nothing(env):
    return None

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module into the current folder and return its name."""
    (tmp_path / "own_wrappers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_wrappers", raising=False)
    return "own_wrappers"


def test_wrappers_are_applied_from_the_inside_out(module: str) -> None:
    scale = NamedWrapper("gymnasium.wrappers:TransformReward", {"func": lambda reward: 10 * reward})
    add = NamedWrapper(f"{module}:Add", {"amount": 2.0})
    for wrappers, reward in (((scale, add), 12.0), ((add, scale), 30.0), ((), 1.0)):
        env = make_batch_env("CartPole-v1", 2, "0:9", 0, wrappers=wrappers)
        env.reset()
        assert env.step(np.zeros(2, int)).rewards.tolist() == [reward] * 2


def test_a_wrapper_may_change_the_spaces() -> None:
    wrappers = (NamedWrapper("gymnasium.wrappers:FlattenObservation", {}),)
    env = make_vec_env("Blackjack-v1", 2, "0:9", 0, inputs=(), wrappers=wrappers)
    assert env.observation_space.shape == (45,)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_wrappers:Ad", "own_wrappers has no class 'Ad'; did you mean 'Add'?"),
        ("own_wrappers:number", "has no class 'number'"),
        ("own_wrapers:Add", "there is no module 'own_wrapers'"),
        ("own_wrappers:Fails", "'own_wrappers:Fails' cannot wrap CartPole-v1: RuntimeError: no wheels"),
        ("own_wrappers:nothing", "returns a NoneType, no gymnasium.Env"),
    ],
)
def test_what_cannot_wrap_is_refused_in_one_line(module: str, target: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        NamedWrapper(target, {})(gymnasium.make("CartPole-v1"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrappers_without_a_name_are_refused_in_the_same_way() -> None:
    for wrapper, message in (
        (lambda env: None, "returns a NoneType, no gymnasium.Env"),
        (lambda env: 1 / 0, "cannot wrap CartPole-v1: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UserError, match=f"wrapper '.*<lambda>' {message}"):
            make_batch_env("CartPole-v1", 1, "0:9", 0, wrappers=(wrapper,))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["coinrun", "recall"])
def test_batches_of_their_own_cannot_be_wrapped(name: str) -> None:
    with pytest.raises(UserError, match="wrappers are for Gymnasium environments"):
        make_batch_env(name, 1, "0:9", 0, wrappers=(NamedWrapper("gymnasium.wrappers:FlattenObservation", {}),))
