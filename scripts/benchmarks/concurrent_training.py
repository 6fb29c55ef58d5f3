"""The speed of IMPALA while actors and learner work at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from srwm_rl.agents import IMPALA
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks.measure import long_enough

MAX_STEPS = 10**9  # the callback stops earlier


class ConcurrentTimer(BaseCallback):
    """Counts steps and seconds between the ends of two rollouts, and stops training after a while.

    Timing starts with the first rollout after an update: copying the policy, capturing graphs and playing before the
    first batch are over then. From there on actors and learner are equally fast, since few batches can wait.
    """

    model: IMPALA

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seconds = 0, 0.0
        self.first: tuple[int, float] | None = None  # steps and time at which timing started

    def _on_training_start(self) -> None:
        self.updates = self.model._n_updates

    def _on_rollout_end(self) -> None:
        # Without waiting for the device: the actors wait in each step, the learner in each update.
        now = time.perf_counter()
        if self.first is not None:
            self.steps, self.seconds = self.num_timesteps - self.first[0], now - self.first[1]
        elif self.model._n_updates > self.updates:
            self.first = self.num_timesteps, now

    def _on_step(self) -> bool:
        return not (self.steps and long_enough(self.seconds))


def concurrent_training(model: IMPALA, backend: str = "auto") -> Callable[[], float]:
    """Return a function that trains for a while and returns the steps per second."""
    model.set_logger(Logger(None, []))

    def train() -> float:
        timer = ConcurrentTimer()
        with prefer(backend):
            model.learn(MAX_STEPS, timer, reset_num_timesteps=False)
        return timer.steps / timer.seconds

    return train
