"""`SRWMPolicy` as SB3 users call it."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import SRWMPolicy, UserError, core_names

FRAMES = spaces.Box(0, 255, (16, 16, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
TINY = {"hidden_size": 16, "n_layers": 2}


def policy(
    observation_space: Any = VECTOR, action_space: Any = None, core: str = "srwm", **settings: Any
) -> SRWMPolicy:
    torch.manual_seed(0)
    action_space = action_space or spaces.Discrete(3)
    return SRWMPolicy(observation_space, action_space, lambda _: 1e-3, core=core, core_kwargs=TINY, **settings)


def observations(space: Any, batch: int, seed: int = 0) -> Any:
    space.seed(seed)
    return np.stack([space.sample() for _ in range(batch)])


@pytest.mark.parametrize("core", core_names())
def test_predict_carries_the_state_and_resets_it_where_an_episode_starts(core: str) -> None:
    agent = policy(core=core)
    first, second = observations(VECTOR, 4), observations(VECTOR, 4, seed=1)
    actions, state = agent.predict(first, deterministic=True)
    assert actions.shape == (4,)
    assert isinstance(state, tuple)
    assert len(state) == 1
    _, carried = agent.predict(second, state, np.zeros(4, bool), deterministic=True)
    _, mixed = agent.predict(second, state, np.array([True, False, False, False]), deterministic=True)
    _, fresh = agent.predict(second, None, np.ones(4, bool), deterministic=True)
    assert carried is not None
    assert mixed is not None
    assert fresh is not None
    np.testing.assert_allclose(mixed[0][:, 0], fresh[0][:, 0], atol=1e-6)
    np.testing.assert_allclose(mixed[0][:, 1:], carried[0][:, 1:], atol=1e-6)
    if agent.core.state_size and agent.core.carries_over:
        assert np.abs(carried[0] - fresh[0]).max() > 1e-6


def test_predict_takes_a_single_observation() -> None:
    action, state = policy().predict(observations(VECTOR, 1)[0])
    assert np.shape(action) == ()
    assert state is not None
    assert state[0].shape[1] == 1


def test_stochastic_actions_vary_and_deterministic_ones_do_not() -> None:
    agent, obs = policy(), np.zeros((64, 3), np.float32)
    assert len(set(agent.predict(obs)[0].tolist())) > 1
    assert len(set(agent.predict(obs, deterministic=True)[0].tolist())) == 1


def test_box_actions_are_clipped_to_their_bounds() -> None:
    box = spaces.Box(-0.01, 0.01, (2,), np.float32)
    actions, _ = policy(action_space=box).predict(observations(VECTOR, 8))
    assert np.abs(actions).max() <= 0.01 + 1e-9


def test_a_state_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(UserError, match=r"core 'srwm' needs a state of shape \(2, 4, \d+\), not \(1, 4, 7\)"):
        policy().predict(observations(VECTOR, 4), (np.zeros((1, 4, 7), np.float32),))
    for state in ((), 0, np.zeros((2, 4, 7)), (np.zeros((2, 4, 7)),) * 2):
        with pytest.raises(UserError, match="None at the start, then the tuple that predict returned"):
            policy().predict(observations(VECTOR, 4), state)  # type: ignore[arg-type]


def test_missing_memory_inputs_name_the_wrapper() -> None:
    space = spaces.Dict(observation=VECTOR, previous_reward=spaces.Box(-1, 1, (1,), np.float32))
    with pytest.raises(UserError, match=r"previous_reward.*VecMemoryInputs"):
        policy(space).predict(observations(VECTOR, 4))


def test_act_gives_one_value_and_one_log_probability_per_environment() -> None:
    agent = policy()
    obs = torch.as_tensor(observations(VECTOR, 5))
    step = agent.act(obs, agent.initial_state(5), torch.ones(5))
    assert step.values.shape == step.log_probs.shape == (5,)
    assert (step.log_probs <= 0).all()
    assert step.core_state.shape == agent.initial_state(5).shape


def test_settings_build_the_same_architecture_again() -> None:
    agent = policy(FRAMES, net_arch=[8], activation_fn="relu", encoder_kwargs={"cnn": {"channels": [4, 8]}})
    again = SRWMPolicy(FRAMES, spaces.Discrete(3), lambda _: 1e-3, **agent.settings())
    shapes = [{name: parameter.shape for name, parameter in p.named_parameters()} for p in (agent, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"core_kwargs": {"input_size": 3}}, "input_size is no setting"),
        ({"encoder_kwargs": {"mpl": [3]}}, "did you mean 'mlp'"),
        ({"encoder_kwargs": {"mlp": 7}}, "encoder's mlp must be"),
        ({"encoder_kwargs": {"mlp": ["a"]}}, "encoder's mlp must be"),
        ({"encoder_kwargs": {"mlp": [0]}}, "encoder's mlp must be"),
        ({"encoder_kwargs": {"cnn": {"channels": [-1]}}}, "encoder's cnn channels must be"),
        ({"encoder_kwargs": {"cnn": {"channels": []}}}, "encoder's cnn channels must be"),
        ({"encoder_kwargs": {"cnn": {"chanels": [4]}}}, "did you mean 'channels'"),
        ({"encoder_kwargs": {"cnn": {"features": 0}}}, "encoder's cnn features must be"),
        ({"activation_fn": "swish"}, "activation_fn must be one of"),
        ({"use_sde": True}, "use_sde=True: SRWMPolicy has no state-dependent exploration"),
        ({"net_arhc": [8]}, "no setting 'net_arhc'; did you mean 'net_arch'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        SRWMPolicy(VECTOR, spaces.Discrete(2), lambda _: 1e-3, **settings)
    assert "\n" not in str(error.value)
