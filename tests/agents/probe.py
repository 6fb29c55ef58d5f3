"""A tiny environment of any space, and one minibatch's gradient, for the trainers' tests."""

from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.collecting.rollout_buffer import normalize_advantages
from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.losses.impala_loss import IMPALALossSums
from srwm_rl.agents.losses.ppo_loss import PPOLossSums


class Probe(gymnasium.Env[Any, Any]):
    """Random observations of any space; episodes of `length` steps, cut short (truncated) or ended (terminated)."""

    def __init__(
        self, observation_space: Any = None, action_space: Any = None, length: int = 5, cut: bool = False
    ) -> None:
        # A copy: groups step in threads, and one space for all would be one random generator for all.
        self.observation_space = deepcopy(observation_space or spaces.Box(-1, 1, (3,), np.float32))
        self.action_space = action_space or spaces.Discrete(2)
        self.length, self.cut, self.t = length, cut, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        over = self.t == self.length
        return self.observation_space.sample(), float(self.t), over and not self.cut, over and self.cut, {}


def gradient_of(model: PPO, sequences: np.ndarray) -> tuple[PPOLossSums, Tensor]:
    """Leave the gradient of one minibatch of the model's rollout in its weights; return its loss sums and its norm."""
    buffer = model.rollout_buffer
    (stats,) = model._advantage_stats([buffer.advantages_of(sequences)]) if model.normalize_advantage else [None]
    parts = buffer.gather(sequences, model.sequences_at_once(buffer.sequence_length))
    batches = [normalize_advantages(part, stats) for part in parts]
    n_steps = len(sequences) * buffer.sequence_length * model.processes.size
    sums = PPOLossSums(*model.engine.backward(batches, float(n_steps), 0.2, None))
    return sums, model._all_reduce(sums)


def unroll_gradient(model: IMPALA, batch: Unrolls) -> tuple[IMPALALossSums, Tensor]:
    """Leave the gradient of a batch of unrolls in the model's weights; return its loss sums and its norm."""
    sums = IMPALALossSums(*model.engine.backward(model._parts(batch)))
    return sums, model._all_reduce(sums)
