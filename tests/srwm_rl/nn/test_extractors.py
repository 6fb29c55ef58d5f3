"""Encoders of one's own, as SB3's users write them."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from torch import Tensor, nn

from srwm_rl import SRWMPolicy, UserError
from srwm_rl.nn.extractors import ExtractorInputs

FRAMES = spaces.Box(0, 255, (36, 40, 3), np.uint8)
MIXED = spaces.Dict(
    {"frames": FRAMES, "small": spaces.Box(-1, 1, (2, 2)), "choice": spaces.Discrete(3), "bits": spaces.MultiBinary(2)}
)


def policy(space: Any, extractor: type[BaseFeaturesExtractor], **settings: Any) -> SRWMPolicy:
    torch.manual_seed(0)
    core: Any = {"core": "lstm", "core_kwargs": {"hidden_size": 8}}
    return SRWMPolicy(space, spaces.Discrete(2), lambda _: 1e-3, features_extractor_class=extractor, **core, **settings)


@pytest.mark.parametrize("normalize", [True, False])
def test_inputs_are_what_sb3_gives_its_encoders(normalize: bool) -> None:
    MIXED.seed(0)
    samples = [MIXED.sample() for _ in range(5)]
    obs = {key: torch.as_tensor(np.stack([sample[key] for sample in samples])) for key in MIXED.spaces}
    inputs = ExtractorInputs(MIXED, normalize)
    transposed = {**obs, "frames": obs["frames"].permute(0, 3, 1, 2)}
    space: Any = inputs.space
    expected = preprocess_obs(transposed, space, normalize_images=normalize)
    assert space["frames"].shape == (3, 36, 40)
    for key, tensor in inputs(obs, 5).items():
        torch.testing.assert_close(tensor, expected[key])


@pytest.mark.parametrize(
    ("space", "extractor", "width"),
    [(FRAMES, NatureCNN, 24), (MIXED, CombinedExtractor, 24 + 4 + 3 + 2), (MIXED["small"], FlattenExtractor, 4)],
)
def test_sb3s_encoders_act_and_learn(space: Any, extractor: Any, width: int) -> None:
    name = {NatureCNN: "features_dim", CombinedExtractor: "cnn_output_dim"}.get(extractor)
    agent = policy(space, extractor, features_extractor_kwargs={name: 24} if name else None)
    assert agent.features_dim == width
    assert agent.has_images == (extractor is not FlattenExtractor)
    obs = space.sample()
    agent.predict(obs)
    batch = {k: torch.as_tensor(v)[None, None] for k, v in (obs if isinstance(obs, dict) else {"": obs}).items()}
    result = agent.evaluate_sequence(
        batch if isinstance(obs, dict) else batch[""],
        torch.zeros(1, 1, dtype=torch.long),
        agent.initial_state(1),
        torch.ones(1, 1),
    )
    (result.values.sum() + result.log_probs.sum()).backward()
    assert all(weight.grad is not None for weight in agent.features_extractor.parameters())


class Modes(BaseFeaturesExtractor):
    """Records whether it is in training mode; batch norm and dropout."""

    def __init__(self, observation_space: spaces.Space[Any], width: int = 5) -> None:
        super().__init__(observation_space, width)
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5))

    def forward(self, observations: Tensor) -> Tensor:
        result: Tensor = self.net(observations.flatten(1))
        return result


def test_batch_norm_and_dropout_run_in_evaluation_mode_when_acting() -> None:
    agent = policy(MIXED["small"], Modes)
    norm = agent.features_extractor.net[1]  # type: ignore[index, union-attr]
    before = norm.running_mean.clone()
    obs = np.ones((6, 2, 2), np.float32)
    first, second = (agent.predict(obs, deterministic=True)[1] for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first[0], second[0])
    assert torch.equal(norm.running_mean, before)
    agent.set_training_mode(True)
    agent.encode(torch.as_tensor(obs), 6)
    assert not torch.equal(norm.running_mean, before)


def test_the_settings_of_a_policy_with_an_own_encoder_survive_its_zip(tmp_path: Any) -> None:
    agent = policy(MIXED["small"], Modes, features_extractor_kwargs={"width": 7})
    agent.save(tmp_path / "policy.pt")
    loaded = SRWMPolicy.load(tmp_path / "policy.pt")
    obs = np.ones((2, 2), np.float32)
    _, expected = agent.predict(obs, deterministic=True)
    _, state = loaded.predict(obs, deterministic=True)
    np.testing.assert_array_equal(state[0], expected[0])  # type: ignore[index]
    with pytest.raises(UserError, match=r"model\.save"):
        agent.settings()


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match="NatureCNN: "):
        policy(MIXED["small"], NatureCNN)
    with pytest.raises(UserError, match="give yours features_extractor_kwargs"):
        policy(MIXED["small"], FlattenExtractor, encoder_kwargs={"mlp": [3]})


@pytest.mark.parametrize(
    ("extractor", "settings", "words"),
    [("NatureCNN", {}, "is not a callable"), (FlattenExtractor, {"width": 3}, "unexpected keyword argument 'width'")],
)
def test_what_is_no_encoder_is_one_line(extractor: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        policy(MIXED["small"], extractor, features_extractor_kwargs=settings)
