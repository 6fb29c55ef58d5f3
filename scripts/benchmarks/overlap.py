"""IMPALA's actors and its learner, timed while both are at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks.measure import long_enough

if TYPE_CHECKING:
    from srwm_rl.agents import IMPALA

FOR_EVER = 10**9  # steps; the callback ends it


class BothAtWork(BaseCallback):
    """Count steps and seconds from one rollout's end to another's, and stop the training after a while.

    The first one is that by which the learner has made an update: then what a run does but once is over, such as to
    copy the policy, to capture graphs, and to play while there is nothing to learn from. How fast the actors play is
    from then on how fast the learner learns, for the batches that may wait are few.

    Attributes:
        steps, seconds: what was counted so far.
    """

    model: IMPALA

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seconds = 0, 0.0
        self.began: tuple[int, float] | None = None  # at how many steps, and when

    def _on_training_start(self) -> None:
        self.updates = self.model._n_updates

    def _on_rollout_end(self) -> None:
        # The device need not be waited for: the actors have done so in each step, and the learner in each update.
        now = time.perf_counter()
        if self.began is not None:
            self.steps, self.seconds = self.num_timesteps - self.began[0], now - self.began[1]
        elif self.model._n_updates > self.updates:
            self.began = self.num_timesteps, now

    def _on_step(self) -> bool:
        return not (self.steps and long_enough(self.seconds))


def learning_beside(model: IMPALA, backend: str = "auto") -> Callable[[], float]:
    """Return what trains for a while, and tells the steps per second of playing and learning at once."""
    model.set_logger(Logger(None, []))

    def learn() -> float:
        clock = BothAtWork()
        with prefer(backend):
            model.learn(FOR_EVER, clock, reset_num_timesteps=False)
        return clock.steps / clock.seconds

    return learn
