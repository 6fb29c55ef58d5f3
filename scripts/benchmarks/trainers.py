"""The trainers that `srwm-rl bench train` compares: ours, and sb3-contrib's with the same encoder and width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.nn.encoders import Encoder
from srwm_rl.scripts.benchmarks.measure import BenchOptions
from srwm_rl.scripts.config.defaults import defaults, with_defaults
from srwm_rl.scripts.config.settings import Count, Precision, TrainConfig
from srwm_rl.scripts.evaluation.control_experiments import matched_width, parameter_count
from srwm_rl.scripts.training.build import groups_of_new_run, make_env, make_model
from srwm_rl.scripts.training.cnn_kernels import choose_kernels, use_kernels


@dataclass(frozen=True)
class TrainBench(BenchOptions):
    """Time training: `srwm-rl bench train`."""

    env: str = "bigfish"
    """A ProcGen game, a task, any Gymnasium id."""
    core: str = "srwm"
    """The agent's memory."""
    core_kwargs: tuple[str, ...] | None = None
    """Its settings as name:value, such as hidden_size:128; others keep the environment's default."""
    algo: Literal["ppo", "impala"] = "ppo"
    """The trainer; impala acts and learns in turn, unless --overlapping."""
    overlapping: bool = False
    """Let impala learn while its actors play, as `srwm-rl train` does; only both together are timed."""
    precision: Precision = "auto"
    """Of the CNN."""
    n_envs: Count = 64
    """Environments that step together."""
    n_steps: Count = 64
    """Steps per environment and update."""
    batch_size: Count = 512
    """Steps per minibatch."""
    n_epochs: Count = 3
    """Passes over each rollout (ppo)."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment, as name:value, such as a longer task."""
    against: Literal["sb3-contrib", "feedforward", "lstm", "gru", "reference", "autograd", "plain-cnn"] | None = None
    """Time another trainer in alternation: sb3_contrib.RecurrentPPO with the same encoder, an LSTM as wide as our core,
    and the same environments, epochs and batch; or our PPO without a memory (feedforward, as wide), or with an LSTM or
    GRU of as many parameters; or ours with the recurrence step by step in plain PyTorch; or ours with PPO's gradient by
    autograd instead of C, or with the CNN operation by operation (plain-cnn)."""
    device: str = "auto"
    """auto, cpu, cuda."""


def train_config(config: TrainBench) -> TrainConfig:
    """Return the settings of our trainer."""
    train = defaults(config.env, None, config.core, config.algo)
    shared = {name: value for name, value in vars(config).items() if value is not None and hasattr(TrainConfig, name)}
    if config.algo == "impala":
        shared |= {"n_epochs": TrainConfig.n_epochs, "synchronous": not config.overlapping}
    train = with_defaults(replace(train, **shared), train)
    return replace(train, n_groups=groups_of_new_run(train))


def make_ours(config: TrainBench) -> RecurrentAlgorithm:
    """Return our trainer."""
    train = train_config(config)
    model = make_model(train, make_env(train))
    use_kernels(choose_kernels(train, model), model)
    return model


def make_other_core(config: TrainBench, ours: RecurrentAlgorithm, core: str) -> RecurrentAlgorithm:
    """Return our trainer with another core of as many layers as ours has, and as many parameters.

    "feedforward", which has no memory, is as wide as ours instead.
    """
    memory = ours.policy.core
    n_layers, width = max(memory.state_layers, 1), memory.output_size
    if core != "feedforward":
        width = matched_width(core, memory.input_size, n_layers, parameter_count(memory))
    return make_ours(replace(config, core=core, core_kwargs=(f"hidden_size:{width}", f"n_layers:{n_layers}")))


class PlainFeatures(BaseFeaturesExtractor):
    """The IMPALA CNN as SB3 users write it: float32, channels first; SB3 has already scaled the pixels."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=256)
        network = ImpalaCNN(observation_space.shape, True, scale=1.0)
        self.network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, observations: Tensor) -> Tensor:
        """Map `[N, C, h, w]` to `[N, features]`."""
        stages, head = self.network.stages, self.network.head
        return torch.relu(head(torch.relu(stages(observations)).flatten(1)))


def make_sb3_contrib(config: TrainBench, ours: RecurrentAlgorithm) -> RecurrentPPO:
    """Return RecurrentPPO as its users set it up, with environments of its own, and the encoder and width of ours.

    Raises:
        UserError: our trainer is not PPO.
    """
    if config.algo != "ppo":
        raise UserError("--against sb3-contrib compares PPO with PPO; leave out --algo")
    train, images = train_config(config), bool(ours.policy.features_extractor.images)
    # Without images the encoder is the same, and gets the memory inputs.
    env = make_env(replace(train, n_groups=1, inputs=() if images else train.inputs))
    kind = "MultiInput" if isinstance(env.observation_space, spaces.Dict) else "Cnn" if images else "Mlp"
    return RecurrentPPO(
        f"{kind}LstmPolicy",
        env,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        policy_kwargs={
            "lstm_hidden_size": ours.policy.core.output_size,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": [],
            "features_extractor_class": PlainFeatures if images else Encoder,
            "features_extractor_kwargs": {} if images else ours.policy.encoder_kwargs,
        },
        seed=0,
        device=config.device,
    )
