"""A memory of your own: one class and a name. `python examples/own_core.py`.

`Decay` keeps exponentially decaying sums of its inputs at trainable speeds. `check_core` tests what trainers rely on;
after registration the name works wherever a core's name does. On the command line, without registration:
`srwm-rl train --env recall --core own_core:Decay` from this folder.
"""

import sys

import torch
from torch import Tensor, nn

from srwm_rl import Core, check_core, register_core
from srwm_rl.agents import PPO


@register_core("decay")
class Decay(Core):
    """`m_t = a m_{t-1} + (1 - a) tanh(W x_t)`, one trainable `a` in (0, 1) per unit."""

    def __init__(self, input_size: int, hidden_size: int = 64) -> None:
        super().__init__(input_size, hidden_size, state_layers=1, state_size=hidden_size)
        self.project = nn.Linear(input_size, hidden_size)
        self.logits = nn.Parameter(torch.linspace(-2, 4, hidden_size))  # from fast to slow

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll: x `[T, B, I]`, state `[1, B, S]`, episode_starts `[T, B]`."""
        decay, memory, outputs = self.logits.sigmoid(), state[0], []
        for features, start in zip(self.project(x).tanh(), episode_starts, strict=True):
            memory = memory.masked_fill(start[:, None] != 0, 0)  # reset before the step
            memory = decay * memory + (1 - decay) * features
            outputs.append(memory)
        return torch.stack(outputs), memory[None]


def main(total_steps: int) -> PPO:
    """Check the core, train it on CartPole and return the model."""
    check_core(Decay(8))
    model = PPO("SRWMPolicy", "CartPole-v1", policy_kwargs={"core": "decay", "core_kwargs": {"hidden_size": 32}})
    model.learn(total_steps)
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
