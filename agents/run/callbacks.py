"""Callbacks of the command line: progress bar, checkpoints, record of the levels played, training score."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm.auto import tqdm

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.distributed import SINGLE, ProcessGroup

# Time that capturing states may take: a share of the run's time, and at its start so many seconds.
SHARE, GRACE = 0.05, 10.0


class RolloutCallback(BaseCallback):
    """A callback that acts between rollouts, not at every step."""

    model: RecurrentAlgorithm

    def _on_step(self) -> bool:
        return True


class ProgressBar(BaseCallback):
    """A progress bar with steps, mean return of the last episodes, steps per second and the time left."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total

    def _on_training_start(self) -> None:
        self.bar = tqdm(total=self.total, initial=self.num_timesteps, unit="step", unit_scale=True, smoothing=0.05)
        if not self.bar.fp.isatty():
            self.bar.mininterval = 10.0  # seconds between lines of a log file

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)  # other processes' steps count too
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or ()
        if episodes:
            self.bar.set_postfix({"return": f"{np.mean([e['r'] for e in episodes]):.3g}"}, refresh=False)

    def _on_training_end(self) -> None:
        self.bar.close()

    def close(self) -> None:
        """Close the bar, also when training was interrupted."""
        if hasattr(self, "bar"):
            self.bar.close()


class Checkpoints(RolloutCallback):
    """Capture the run's state between updates and save it at intervals.

    The latest state is kept in memory, so that a run interrupted anywhere can be saved at once and resumed exactly. It
    is the state before the present update or, where updates are so fast that capturing each would cost more than
    `SHARE`, an older one: from about 20 times as long ago as capturing takes.

    Args:
        capture: returns the state tree of the model as it is now.
        save: writes a state tree.
        every_steps: environment steps between saves.
        every_seconds: save also when so much time has passed.
        processes: those that capture together; each of them must have such a callback.
        clock: returns the time in seconds; replaced in tests.
    """

    def __init__(
        self,
        capture: Callable[[], dict[str, Any]],
        save: Callable[[dict[str, Any]], None],
        every_steps: int,
        every_seconds: float = 600.0,
        processes: ProcessGroup = SINGLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.capture, self.save = capture, save
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.processes, self.clock = processes, clock
        self.latest: dict[str, Any] | None = None

    def _on_training_start(self) -> None:
        self.started = self.saved_time = self.clock()
        self.saved_at, self.spent = self.num_timesteps, 0.0

    def _on_rollout_start(self) -> None:
        now = self.clock()
        due = self.num_timesteps - self.saved_at >= self.every_steps or now - self.saved_time >= self.every_seconds
        affordable = self.spent <= GRACE + SHARE * (now - self.started)
        if not self.processes.all_gather(due or affordable)[0]:  # clocks differ: process 0 decides for all
            return
        start = self.clock()  # not `now`: waiting for the slowest process is no cost of capturing
        self.latest = self.capture()
        self.spent += self.clock() - start
        if due:
            self.save_latest()

    def save_latest(self) -> None:
        """Save the state that was captured last."""
        if self.latest is not None:
            self.save(self.latest)
            self.saved_at, self.saved_time = self.num_timesteps, self.clock()


class LevelRecorder(BaseCallback):
    """Record every level that the training environments begin; steps that end no episode cost nothing.

    Of several processes, process 0 records the levels of all, at the end of each rollout.
    """

    model: RecurrentAlgorithm

    def __init__(self, add: Callable[[str, int], None]) -> None:
        super().__init__()
        self.add = add
        self.pending: set[tuple[str, int]] = set()  # of several processes, since the last rollout

    def _record(self, game: str, level: int) -> None:
        if self.model.processes.size == 1:
            self.add(game, level)
        else:
            self.pending.add((game, level))

    def _on_rollout_end(self) -> None:
        if self.model.processes.size > 1:
            for part in self.model.processes.gather(sorted(self.pending)):
                for game, level in part:
                    self.add(game, level)
            self.pending.clear()

    def _on_training_start(self) -> None:
        try:
            games = self.training_env.get_attr("game_names")
            levels = self.training_env.env_method("level_seed")
        except AttributeError:  # environments without levels
            return
        # Environments that are simulated together return the same lists, once for each of them.
        for game, level in {pair for group in zip(games, levels, strict=True) for pair in zip(*group, strict=True)}:
            self._record(game, int(level))

    def _on_step(self) -> bool:
        for i in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][i]
            # The level that ended, too: an environment may have changed it after it reported its beginning.
            for name in ("prev_level_seed", "level_seed"):
                if name in info and "game" in info:
                    self._record(info["game"], int(info[name]))
        return True


class TrainingReturn(RolloutCallback):
    """Score the acting weights by the mean return of the last training episodes (`rollout/ep_rew_mean`).

    `on_score` is called with it at the end of each rollout, before the update, once as many episodes have ended as the
    mean is taken over.
    """

    def __init__(self, on_score: Callable[[float], None]) -> None:
        super().__init__()
        self.on_score = on_score

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or ()
        if len(episodes) >= self.model._stats_window_size:
            self.on_score(float(np.mean([episode["r"] for episode in episodes])))
