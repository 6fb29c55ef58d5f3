"""Encoders: observation keys, settings, descriptions."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.nn.cnns import NatureCNN
from srwm_rl.nn.encoders import Encoder, StepEmbedding, flatten_obs_space


def test_wrong_settings_of_a_cnn_are_named() -> None:
    frames = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    for cnn, message in (
        ({"kind": "natur"}, "no kind 'natur'; did you mean 'nature'"),
        ({"kind": ["nature"]}, "no kind"),
        ("nature", "takes settings, such as .* in quotes, not 'nature'"),
        ({"kind": "nature", "channels": [8]}, "channels must be three widths, not 1"),
        ({"kind": "nature", "patch": 4}, "has no setting 'patch'"),
        ({"kind": "patch", "patch": 0}, "the encoder's cnn patch must be"),
    ):
        with pytest.raises(UserError, match=message):
            Encoder(frames, cnn=cnn)
    with pytest.raises(UserError, match="not 35 x 64"):
        NatureCNN((35, 64, 3), False)


def test_every_key_counts_and_the_step_becomes_sines() -> None:
    space = spaces.Dict(
        observation=spaces.Box(0, 255, (16, 16, 3), np.uint8),
        vector=spaces.Box(-1, 1, (4,), np.float32),
        previous_action=spaces.Box(0, 1, (5,), np.float32),
        previous_reward=spaces.Box(-1, 1, (1,), np.float32),
        episode_step=spaces.Box(0, np.inf, (1,), np.float32),
    )
    torch.manual_seed(0)
    encoder = Encoder(space, mlp=(8,), cnn={"channels": (4,), "features": 10}, step_periods=3)
    assert encoder.features_dim == 10 + 8 + 5 + 1 + 6
    batch = {key: torch.as_tensor(np.stack([box.sample() for _ in range(2)])) for key, box in space.spaces.items()}
    batch["episode_step"] = torch.tensor([[1.0], [2.0]])
    features = encoder(batch)
    assert features.shape == (2, encoder.features_dim)
    for key in space.spaces:
        changed = {**batch, key: batch[key] + 1}
        assert not torch.allclose(encoder(changed), features), key


def test_step_embedding_tells_early_and_late_steps_apart() -> None:
    embedded = StepEmbedding(6, 256.0)(torch.arange(200.0)[:, None])
    distance = torch.cdist(embedded, embedded) + torch.eye(200)
    assert distance.min() > 0.05


def test_unsupported_spaces_are_named() -> None:
    with pytest.raises(UserError, match=r"'t' is a Text space"):
        flatten_obs_space(spaces.Dict(t=spaces.Text(3)))


def test_describe_names_the_layers() -> None:
    frames = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    assert Encoder(frames).describe() == "IMPALA CNN 16/32/32-256 in float32"
    large = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert Encoder(large, cnn={"kind": "nature"}).describe() == "Nature CNN 32/64/64-256 in float32"
    assert Encoder(large, cnn={"kind": "patch"}).describe() == "Patch CNN 32/32/32-256 in float32"
    space = spaces.Dict(v=spaces.Box(-1, 1, (4,)), episode_step=spaces.Box(0, np.inf, (1,)))
    assert Encoder(space, mlp=(8, 4)).describe() == "MLP 8/4 + episode_step"
    assert Encoder(spaces.Discrete(3), mlp=()).describe() == "vectors as they are"
