"""The encoder and the policy settings that make sb3-contrib's RecurrentPPO comparable with ours."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from srwm_rl.nn.encoders import Encoder, ImpalaCNN
from srwm_rl.nn.policy import SRWMPolicy


class PlainFeatures(BaseFeaturesExtractor):
    """The IMPALA CNN as SB3 users write it: float32, channels first; SB3 has already scaled the pixels."""

    def __init__(
        self, observation_space: spaces.Box, widths: tuple[int, ...] = (16, 32, 32), features: int = 256
    ) -> None:
        super().__init__(observation_space, features)
        network = ImpalaCNN(observation_space.shape, True, widths, features, scale=1.0)
        self.network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, observations: Tensor) -> Tensor:
        """Map `[N, C, h, w]` to `[N, features]`."""
        x = observations
        for stage in self.network.stages:
            x = stage(x)
        return torch.relu(self.network.head(torch.relu(x).flatten(1)))


def policy_kwargs(ours: SRWMPolicy) -> dict[str, Any]:
    """Return settings of `CnnLstmPolicy` or `MlpLstmPolicy` with the encoder and width of our policy."""
    lstm = {"lstm_hidden_size": ours.core.output_size, "shared_lstm": True, "enable_critic_lstm": False, "net_arch": []}
    network = next(iter(ours.features_extractor.images.values()), None)
    if network is None:
        return {**lstm, "features_extractor_class": Encoder, "features_extractor_kwargs": ours.encoder_kwargs}
    assert isinstance(network, ImpalaCNN)
    widths = tuple(stage.out_channels for stage in network.stages if isinstance(stage, nn.Conv2d))
    settings = {"widths": widths, "features": network.head.out_features}
    return {**lstm, "features_extractor_class": PlainFeatures, "features_extractor_kwargs": settings}
