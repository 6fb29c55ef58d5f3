"""An encoder of your own before the memory: `python examples/own_encoder.py`.

`Fourier` gives the core sines and cosines of each number of the observation, at trainable frequencies. Any subclass of
SB3's `BaseFeaturesExtractor` works, SB3's own too; images come channels-first and multiplied by 1/255, a Dict
observation as a dict. A model with a class of your own is saved by `model.save` and loaded by `PPO.load`.
"""

import sys
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from srwm_rl.agents import PPO


class Fourier(BaseFeaturesExtractor):
    """`[sin(f x), cos(f x)]` for every input x and each of its frequencies f; `[N, k]` to `[N, 2 * k * n]`."""

    def __init__(self, observation_space: spaces.Box, n_frequencies: int = 4) -> None:
        n_inputs = spaces.flatdim(observation_space)
        super().__init__(observation_space, features_dim=2 * n_inputs * n_frequencies)
        self.frequencies = nn.Parameter(torch.logspace(-0.5, 1.0, n_frequencies).repeat(n_inputs, 1))

    def forward(self, observations: Tensor) -> Tensor:
        """Map observations `[N, *shape]` to features `[N, features_dim]`."""
        angles = observations.flatten(1)[:, :, None] * self.frequencies  # [N, k, n]
        return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)


def main(total_steps: int) -> PPO:
    """Train on CartPole and return the model."""
    encoder: dict[str, Any] = {
        "features_extractor_class": Fourier,
        "features_extractor_kwargs": {"n_frequencies": 4},
    }
    settings = {**encoder, "core_kwargs": {"hidden_size": 32, "n_layers": 1}}
    env = make_vec_env("CartPole-v1", n_envs=8)
    model = PPO("MlpPolicy", env, n_steps=128, n_epochs=8, learning_rate=1e-3, policy_kwargs=settings, verbose=1)
    return model.learn(total_steps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
