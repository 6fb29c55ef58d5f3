"""Conv-4 and ResNet-12: sizes, layouts, precision and what they refuse."""

import pytest
import torch
from gymnasium import spaces
from torch.nn import functional

from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import Encoder
from srwm_rl.nn.few_shot_cnns import Conv4, ResNet12

FRAMES = torch.randint(0, 256, (6, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def conv4_by_hand(network: Conv4, frames: torch.Tensor) -> torch.Tensor:
    x = frames.permute(0, 3, 1, 2) / 255
    for block in network.blocks:
        conv, norm = block[0], block[1]
        x = functional.conv2d(x, conv.weight, conv.bias, conv.stride, padding=1)
        x = functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        x = functional.max_pool2d(x, 2) if conv.stride == (1, 1) else x
        x = torch.relu(x)
    return x.flatten(1)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv4_computes_what_it_says(stride: int) -> None:
    network = Conv4((28, 28, 1), False, (8, 8, 8, 6), first_stride=stride)
    features = network(FRAMES)
    assert features.shape == (6, network.n_features) == (6, 6)
    torch.testing.assert_close(features, conv4_by_hand(network, FRAMES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (Conv4, (28, 28, 1), 64),
        (lambda *args: Conv4(*args, (32,) * 4), (84, 84, 3), 800),
        (lambda *args: Conv4(*args, (32,) * 4), (32, 32, 3), 128),
        (ResNet12, (84, 84, 3), 256),
        (lambda *args: Conv4(*args, first_stride=2), (33, 29, 3), 2 * 1 * 64),
    ],
)
def test_the_published_widths(network, shape, expected) -> None:
    frames = torch.zeros(2, *shape, dtype=torch.uint8)
    module = network(shape, False)
    assert module(frames).shape == (2, expected)
    assert module.n_features == expected


@pytest.mark.parametrize("kind", [Conv4, ResNet12])
def test_both_layouts_and_precisions(kind) -> None:
    last, first = kind((28, 28, 1), False), kind((1, 28, 28), True)
    half = kind((28, 28, 1), False, precision="bfloat16")
    first.load_state_dict(last.state_dict())
    half.load_state_dict(last.state_dict())
    expected = last(FRAMES)
    torch.testing.assert_close(first(FRAMES.permute(0, 3, 1, 2).contiguous()), expected, atol=1e-5, rtol=1e-4)
    features = half(FRAMES)
    assert features.dtype == torch.float32
    assert functional.cosine_similarity(features, expected).min() > 0.98
    features.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in half.parameters())


def test_evaluation_does_not_depend_on_the_batch() -> None:
    network = ResNet12((28, 28, 1), False, (4, 4, 4, 8), dropout=0.5)
    network(FRAMES)
    network.eval()
    torch.testing.assert_close(network(FRAMES)[:1], network(FRAMES[:1]), atol=1e-5, rtol=1e-4)


def test_as_part_of_an_encoder_with_scaled_labels() -> None:
    space = spaces.Dict(image=spaces.Box(0, 255, (28, 28, 1), "uint8"), label=spaces.Box(0, 1, (5,)))
    cnn = {"kind": "conv4", "channels": [4, 4, 4, 4], "first_stride": 2}
    encoder = Encoder(space, mlp=(), cnn=cnn, vector_scale=3.0)
    label = torch.eye(5)[:3]
    features = encoder({"image": FRAMES[:3], "label": label})
    assert encoder.describe() == "Conv-4 4/4/4/4 in float32 + vectors as they are"
    assert features.shape == (3, encoder.features_dim) == (3, 9)
    assert torch.equal(features[:, 4:], 3 * label)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"precision": "half"}, "precision must be one of"),
        ({"first_stride": 3}, "first_stride must be 1 or 2"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(UserError, match=message):
        Conv4((28, 28, 1), False, **settings)
    with pytest.raises(UserError, match="at least 16 pixels a side, not 8 x 28"):
        Conv4((8, 28, 1), False)
