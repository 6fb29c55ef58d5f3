"""`FlatDictObservation`: observations of nested spaces as one flat Dict."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.agents import PPO
from srwm_rl.envs import FlatDictObservation, make_batch_env, make_vec_env
from srwm_rl.envs.wrappers.flat_observation import needs_flattening
from srwm_rl.errors import UserError

CAMERA = spaces.Box(0, 255, (16, 16, 3), np.uint8)
NESTED = spaces.Dict(
    {
        "arm": spaces.Tuple((spaces.Discrete(3, start=1), spaces.Dict({"camera": CAMERA}))),
        "word": spaces.Text(5),
        "joints": spaces.Box(-1, 1, (2,), np.float32),
    }
)


class SampledObservations(gymnasium.Env):
    """Episodes of five steps with random observations of a space."""

    def __init__(self, observation_space):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.latest, self.clock = self.observation_space.sample(), 0
        return self.latest, {}

    def step(self, action):
        self.latest, self.clock = self.observation_space.sample(), self.clock + 1
        return self.latest, 1.0, self.clock >= 5, False, {}


gymnasium.register("tests/Sampled-v0", entry_point=SampledObservations, disable_env_checker=True)


def test_parts_have_the_path_to_them_as_key_and_text_is_left_out_with_a_warning():
    inner = SampledObservations(NESTED)
    with pytest.warns(UserWarning, match="observation word is text"):
        env = FlatDictObservation(inner)
    assert env.observation_space == spaces.Dict(
        {"arm.0": spaces.Discrete(3, start=1), "arm.1.camera": CAMERA, "joints": NESTED["joints"]}
    )
    obs, _ = env.reset(seed=3)
    assert env.observation_space.contains(obs)
    assert obs["arm.0"] == inner.latest["arm"][0]
    assert np.array_equal(obs["arm.1.camera"], inner.latest["arm"][1]["camera"])
    assert env.observation_space.contains(env.step(0)[0])


@pytest.mark.parametrize(
    ("space", "needed"),
    [
        (spaces.Tuple((spaces.Discrete(2),)), True),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), True),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Text(3)}), True),
        (spaces.Dict({"a": spaces.Discrete(2)}), False),
        (spaces.Discrete(2), False),
    ],
)
def test_only_nested_spaces_and_texts_need_it(space, needed):
    assert needs_flattening(space) == needed


def test_equal_keys_and_observations_of_text_alone_are_refused():
    box = spaces.Discrete(2)
    with pytest.raises(UserError, match="the same key"):
        FlatDictObservation(SampledObservations(spaces.Dict({"a.b": box, "a": spaces.Dict({"b": box})})))
    with pytest.warns(UserWarning, match="is text"), pytest.raises(UserError, match="no part"):
        FlatDictObservation(SampledObservations(spaces.Dict({"a": spaces.Text(3)})))


@pytest.mark.filterwarnings("ignore:observation word is text")
def test_batches_flatten_what_they_need_to():
    env = make_batch_env("tests/Sampled-v0", 2, "0:10", 0, env_kwargs={"observation_space": NESTED})
    assert set(env.reset()) == {"arm.0", "arm.1.camera", "joints"}
    for k in range(6):
        step = env.step(np.array([0, 1]))
        assert step.obs["arm.1.camera"].shape == (2, 16, 16, 3)
        assert (step.final_obs is not None) == (k == 4)


def test_blackjack_is_trained_from_python():
    model = PPO("SRWMPolicy", make_vec_env("Blackjack-v1", 4, "0:100", 0), n_steps=16, batch_size=64, n_epochs=1)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(64)
    changed = [not old.equal(new) for old, new in zip(before, model.policy.parameters(), strict=True)]
    assert all(changed)


def test_a_trainer_refuses_a_tuple_and_names_the_wrapper():
    with pytest.raises(UserError, match="FlatDictObservation"):
        PPO("SRWMPolicy", "Blackjack-v1")
    venv = DummyVecEnv([lambda: FlatDictObservation(gymnasium.make("Blackjack-v1"))])
    model = PPO("SRWMPolicy", venv, n_steps=16, batch_size=16, n_epochs=1)
    model.learn(16)
    action, _ = model.predict(model.env.reset())
    assert action.shape == (1,)
