"""What PPO and IMPALA accept as an environment and a policy, or refuse at construction in one line."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize

from srwm_rl import SRWMPolicy, UserError
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.environments import warn_of_unused_masks
from srwm_rl.envs import VecMemoryInputs
from tests.agents.probe import Probe

TINY: dict[str, Any] = {"core_kwargs": {"hidden_size": 8, "n_layers": 1, "n_heads": 2}}
PIXELS = spaces.Box(0, 255, (16, 16, 3), np.uint8)
FLOATS = spaces.Box(0, 1, (16, 16, 3), np.float32)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def make(algo: type[Any], env: Any, policy: str = "SRWMPolicy", policy_kwargs: Any = None, **settings: Any) -> Any:
    return algo(policy, env, n_steps=8, policy_kwargs={**TINY, **(policy_kwargs or {})}, seed=0, **settings)


def venv(**settings: Any) -> VecEnv:
    return DummyVecEnv([lambda: Probe(**settings)] * 2)


@pytest.mark.filterwarnings("ignore:.*render_mode")  # SB3 asks every environment for one
@pytest.mark.parametrize("env", ["procgen-coinrun-v0", "srwm_rl:procgen-coinrun-v0", "srwm_rl/Recall-v0"])
def test_our_ids_are_made_without_pictures(env: str) -> None:
    assert make(PPO, env).get_env().render_mode is None


@pytest.mark.parametrize("algo", [PPO, IMPALA])
@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (spaces.Discrete(3, start=1), None),
        (spaces.MultiDiscrete([3, 2], start=[1, 5]), None),
        (spaces.MultiDiscrete([[3, 2], [2, 4]]), None),
        (spaces.Box(0, 1, ()), None),
        (spaces.Dict({"cam.rgb": PIXELS, "keys": PIXELS, "training": PIXELS, "": PIXELS, "a%2Eb": PIXELS}), None),
        (spaces.Dict({"episode_step": spaces.Discrete(5), "previous_action": PIXELS}), None),
        (spaces.Dict({"previous_reward": spaces.Discrete(5), "episode_step": VECTOR}), None),
        (None, spaces.Discrete(3)),
        (None, spaces.MultiDiscrete([2, 3])),
        (None, spaces.MultiBinary(3)),
        (None, spaces.Box(-1, 1, (2,), np.float32)),
        (None, spaces.Box(-1, 1, (2, 3))),
        (None, spaces.Box(-1, 1, ())),
        (None, spaces.Box(-5, 5, (2,), np.int32)),
        (None, spaces.Box(-1, 1, (2,), np.float64)),
        (None, spaces.Box(-1, 1, (2,), np.float16)),
        (None, spaces.MultiDiscrete([[3, 2], [2, 2]])),
    ],
)
def test_every_space_is_learned_and_predicted_in(algo: type[Any], observation_space: Any, action_space: Any) -> None:
    model = make(algo, venv(observation_space=observation_space, action_space=action_space))
    model.learn(32)
    env = model.get_env()
    action, _ = model.predict(env.observation_space.sample())
    assert np.shape(action) == env.action_space.shape
    starts = np.ones(env.num_envs, bool)
    actions, state = model.predict(env.reset(), None, starts)
    more, _ = model.predict(env.reset(), state, ~starts, deterministic=True)
    assert all(env.action_space.contains(action) for action in (*actions, *more))


@pytest.mark.parametrize(
    ("action_space", "words"),
    [
        (spaces.Discrete(3, start=1), "count from 0"),
        (spaces.MultiDiscrete([3, 2], start=[0, 1]), "count from 0"),
        (spaces.MultiBinary((2, 2)), "flatten"),
        (spaces.Box(-np.inf, np.inf, (2,)), "need finite bounds"),
        (spaces.Box(0, np.inf, (2,)), "need finite bounds"),
        (spaces.Box(-1, 1, (0,)), "no action"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "of type Dict are not supported"),
        (spaces.Tuple((spaces.Discrete(2),)), "of type Tuple are not supported"),
    ],
)
@pytest.mark.parametrize("algo", [PPO, IMPALA])
def test_other_actions_are_refused(algo: type[Any], action_space: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(algo, Probe(None, action_space))


@pytest.mark.parametrize(
    ("observation_space", "words"),
    [
        (spaces.Box(-1, 1, (0,)), "observation 'observation' is empty"),
        (spaces.Dict({"a": VECTOR, "b": spaces.Box(-1, 1, (3, 0))}), "observation 'b' is empty"),
        (spaces.Tuple((VECTOR,)), "FlatDictObservation"),
        (spaces.Sequence(VECTOR), "Sequence space; wrap"),
        (spaces.OneOf([VECTOR]), "OneOf space; wrap"),
        (spaces.Graph(VECTOR, None), "Graph"),
    ],
)
@pytest.mark.parametrize("algo", [PPO, IMPALA])
def test_other_observations_are_refused(algo: type[Any], observation_space: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(algo, Probe(observation_space))


def test_an_empty_dict_is_refused() -> None:
    env = Probe()
    env.observation_space = spaces.Dict({})
    with pytest.raises(UserError, match="an empty Dict"):
        make(PPO, env)


@pytest.mark.parametrize("action_space", [spaces.Box(-5, 5, (2,), np.int32), spaces.Box(-1, 1, (2, 3), np.float16)])
def test_with_a_learning_rate_of_0_the_divergence_is_0(action_space: Any) -> None:
    model = make(PPO, Probe(None, action_space), learning_rate=0.0)
    model.learn(8)
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert model.rollout_buffer.actions.dtype in (np.float32, torch.float32)


def test_returns_are_those_of_a_monitor_within() -> None:
    env = gymnasium.wrappers.TransformReward(Monitor(gymnasium.make("CartPole-v1")), lambda reward: 0.01 * reward)
    model = make(PPO, env).learn(256)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert returns == [episode["l"] for episode in model.ep_info_buffer]
    assert min(returns) > 1


@pytest.mark.parametrize("mask", [spaces.MultiBinary(2), spaces.Box(0, 1, (2,))])
def test_a_dict_with_a_mask_is_named_by_its_kind_or_as_a_dict(mask: Any) -> None:
    space = spaces.Dict({"observation": VECTOR, "action_mask": mask})
    for name in ("MultiInputPolicy", "MlpPolicy"):
        assert make(PPO, Probe(space), name).policy.masked
    with pytest.raises(UserError, match="CnnPolicy needs images"):
        make(PPO, Probe(space), "CnnPolicy")


def test_a_named_policy_is_never_replaced() -> None:
    for env, name, words in (
        (Probe(FLOATS), "CnnPolicy", "normalize_images"),
        (VecNormalize(venv(observation_space=PIXELS)), "CnnPolicy", "normalize_images"),
        (Probe(VECTOR), "CnnPolicy", "name MlpPolicy"),
        (Probe(PIXELS), "MlpPolicy", "name CnnPolicy"),
        (Probe(VECTOR), "MultiInputPolicy", "MlpPolicy or CnnPolicy"),
        (Probe(spaces.Dict({"a": VECTOR})), "MlpPolicy", "MultiInputPolicy"),
        (Probe(spaces.Dict({"a": PIXELS})), "CnnPolicy", "MultiInputPolicy"),
    ):
        with pytest.raises(UserError, match=words):
            make(PPO, env, name)
    for space, name in ((PIXELS, "CnnPolicy"), (VECTOR, "MlpPolicy"), (spaces.Dict({"a": PIXELS}), "MultiInputPolicy")):
        assert isinstance(make(IMPALA, Probe(space), name).policy, SRWMPolicy)


@pytest.mark.parametrize("env", ["floats", "normalised"])
def test_float_images_work_as_in_sb3(env: str) -> None:
    inner = Probe(FLOATS) if env == "floats" else VecNormalize(venv(observation_space=PIXELS))
    model = make(PPO, inner, "CnnPolicy", {"normalize_images": False})
    model.learn(8)
    assert list(model.policy.features_extractor.images) == ["observation"]
    assert model.policy.features_extractor.images["observation"].scale == 1.0
    again = make(PPO, inner, policy_kwargs={"encoder_kwargs": {"normalize_images": False}})
    assert again.policy.has_images
    assert not again.policy.normalize_images


def test_float_frames_without_a_name_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="flattened to 768 numbers"):
        make(PPO, Probe(FLOATS))


def test_memory_inputs_go_outside_other_wrappers() -> None:
    with pytest.raises(UserError, match="other order"):
        make(PPO, VecFrameStack(VecMemoryInputs(venv()), 4))
    with pytest.raises(UserError, match="other order"):
        make(PPO, VecNormalize(VecMemoryInputs(venv())))
    with pytest.raises(UserError, match="other order"):
        make(PPO, venv()).set_env(VecNormalize(VecMemoryInputs(venv())))
    for env in (
        VecMemoryInputs(VecFrameStack(venv(), 4)),
        VecMemoryInputs(VecNormalize(venv())),
        VecNormalize(VecMemoryInputs(venv()), norm_obs_keys=["observation"]),
        VecNormalize(VecMemoryInputs(venv()), norm_obs=False),
        VecFrameStack(VecMemoryInputs(venv(), ("action", "reward")), 4),
    ):
        make(PPO, env).learn(16)


@pytest.mark.parametrize("algo", [PPO, IMPALA])
def test_gymnasium_vectors_and_unknown_settings_are_one_line(algo: type[Any]) -> None:
    with pytest.raises(UserError, match="no VecEnv of SB3"):
        make(algo, gymnasium.make_vec("CartPole-v1", num_envs=2))
    with pytest.raises(UserError, match="no state-dependent exploration"):
        make(algo, Probe(), use_sde=True)
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        make(algo, Probe(), learning_rat=1e-3)
    with pytest.raises(UserError, match="did you mean 'core'"):
        make(algo, Probe(), policy_kwargs={"corr": "lstm"})
    with pytest.raises(UserError, match="share encoder and core"):
        make(algo, Probe(), policy_kwargs={"share_features_extractor": False})
    with pytest.raises(UserError, match='core="lstm"'):
        make(algo, Probe(), policy_kwargs={"lstm_hidden_size": 32})
    with pytest.raises(UserError, match="policy_kwargs have no 'use_sde'"):
        make(algo, Probe(), policy_kwargs={"use_sde": True})
    for env, words in ((None, "env=None: give an id"), (3, "not 3"), (Probe, r"give an instance, Probe\(\)")):
        with pytest.raises(UserError, match=words):
            make(algo, env)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="call it outside"):
        make(algo, Probe()).learn(16)
    make(algo, Probe(), use_sde=False, sde_sample_freq=-1, rollout_buffer_class=None)


def test_a_vec_env_without_reset_infos_is_not_asked_for_masks() -> None:
    env = venv()
    del env.reset_infos
    warn_of_unused_masks(env)


@pytest.mark.parametrize(
    ("highest", "settings", "words"),
    [(10, {}, "OneHotImage"), (1, {}, "add --encoder-kwargs"), (255, {}, None), (10, {"scale": 0.1}, None)],
)
@pytest.mark.parametrize("in_dict", [True, False])
def test_symbols_in_the_place_of_pixels_are_warned_of(
    highest: int, settings: Any, words: str | None, in_dict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    image = spaces.Box(0, 255, (7, 7, 3), np.uint8)

    class Symbols(Probe):
        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            small = (obs["image"] if in_dict else obs) % (highest + 1)
            return {**obs, "image": small} if in_dict else small, info

    env = Symbols(spaces.Dict(image=image, vector=VECTOR) if in_dict else image)
    make(PPO, env, policy_kwargs={"encoder_kwargs": {"cnn": {"channels": [4], **settings}}}).learn(8)
    assert (f"no number above {highest}," in caplog.text) == (words is not None)
    assert (words or "") in caplog.text


def test_stock_ppo_says_that_it_keeps_no_memory() -> None:
    model = stable_baselines3.PPO(SRWMPolicy, Probe(), n_steps=8, batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="keeps no memory"):
        model.learn(8)


def test_coefficients_that_sb3_refuses_are_refused() -> None:
    for settings in ({"clip_range_vf": -0.1}, {"clip_range_vf": 0}, {"clip_range": 0.0}):
        with pytest.raises(UserError, match="above 0"):
            make(PPO, Probe(), **settings)
    for settings in ({"n_steps": 1}, {"n_steps": 1, "batch_size": 1}):
        with pytest.raises(UserError, match="normalize_advantage=False"):
            PPO("SRWMPolicy", Probe(), policy_kwargs=TINY, **settings)  # type: ignore[arg-type]
    PPO("SRWMPolicy", Probe(), n_steps=1, batch_size=1, normalize_advantage=False, policy_kwargs=TINY).learn(2)


def test_sb3s_widths_are_those_of_our_cnn() -> None:
    for name in ("features_dim", "cnn_output_dim"):
        model = make(PPO, Probe(PIXELS), policy_kwargs={"features_extractor_kwargs": {name: 24}})
        assert model.policy.features_dim == 24
        with pytest.raises(UserError, match=rf"{name} is the width of a CNN.*'mlp': \[24\]"):
            make(PPO, Probe(), policy_kwargs={"features_extractor_kwargs": {name: 24}})
