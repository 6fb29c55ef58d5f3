"""What the command line hangs on a training loop: a progress bar, checkpoints, a record of the levels, a score."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm.auto import tqdm

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.distributed import SINGLE, ProcessGroup


class ProgressBar(BaseCallback):
    """A live line with steps, mean return of the last episodes, steps per second and the time left."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total

    def _on_training_start(self) -> None:
        # On a terminal the line is live; in a log file one line every ten seconds is enough.
        self.bar = tqdm(total=self.total, initial=self.num_timesteps, unit="step", unit_scale=True, smoothing=0.05)
        if not self.bar.fp.isatty():
            self.bar.mininterval = 10.0

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
        """End the line, also when training was interrupted."""
        if hasattr(self, "bar"):
            self.bar.close()


# Of a run's time so much may go into taking states that nobody may ever need: a share, and at its start some seconds.
SHARE, GRACE = 0.05, 10.0


class Checkpoints(BaseCallback):
    """Take the run's state between updates and save it every so often.

    The latest state is kept in memory, so that a run interrupted anywhere can still be saved at once, and goes on later
    as if nothing had happened since. It is the state before the present update; in the long run, where updates are so
    fast that to take it each time would cost much (`SHARE`), of some 20 times as long ago as it took.

    Args:
        capture: returns the state tree of the model as it is now.
        save: writes a state tree.
        every_steps: save when at least so many environment steps have passed.
        every_seconds: or so much time.
        processes: those that capture together; all of them must have such a callback.
        clock: tells the time in seconds; another one is for tests.
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
        # Clocks and the time it takes differ: all do what process 0 does.
        affordable = self.spent <= GRACE + SHARE * (now - self.started)
        if not self.processes.all_gather(due or affordable)[0]:
            return
        began = self.clock()  # to wait for the slowest process takes as long where nothing is taken
        self.latest = self.capture()
        self.spent += self.clock() - began
        if due:
            self.save_latest()

    def _on_step(self) -> bool:
        return True

    def save_latest(self) -> None:
        """Save the state that was taken last."""
        if self.latest is not None:
            self.save(self.latest)
            self.saved_at, self.saved_time = self.num_timesteps, self.clock()


class LevelRecorder(BaseCallback):
    """Note every level that the training environments begin; nothing is done in a step that ends no episode.

    Of several processes, the first notes at the end of each rollout what the others' environments began.

    Args:
        add: called with a game and a level, again and again with the same.
    """

    model: RecurrentAlgorithm

    def __init__(self, add: Callable[[str, int], None]) -> None:
        super().__init__()
        self.add = add
        self.begun: set[tuple[str, int]] = set()  # here and since the last rollout, where there are several processes

    def _note(self, game: str, level: int) -> None:
        if self.model.processes.size == 1:
            self.add(game, level)
        else:
            self.begun.add((game, level))

    def _on_rollout_end(self) -> None:
        if self.model.processes.size > 1:
            for part in self.model.processes.gather(sorted(self.begun)):
                for game, level in part:
                    self.add(game, level)
            self.begun.clear()

    def _on_training_start(self) -> None:
        try:
            games = self.training_env.get_attr("game_names")
            levels = self.training_env.env_method("level_seed")
        except AttributeError:  # environments that know no levels
            return
        # Environments that are simulated together answer together, once for each of them.
        for game, level in {pair for group in zip(games, levels, strict=True) for pair in zip(*group, strict=True)}:
            self._note(game, int(level))

    def _on_step(self) -> bool:
        for i in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][i]
            # The one that ended, too: an environment may have moved on by itself since it said what it began.
            for name in ("prev_level_seed", "level_seed"):
                if name in info and "game" in info:
                    self._note(info["game"], int(info[name]))
        return True


class TrainingReturn(BaseCallback):
    """Score the weights that act by the mean return of the last training episodes (`rollout/ep_rew_mean`).

    Once per rollout, as soon as there are as many episodes as the mean is taken over.

    Args:
        on_score: called with it at the end of a rollout, before the update.
    """

    def __init__(self, on_score: Callable[[float], None]) -> None:
        super().__init__()
        self.on_score = on_score

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or ()
        if len(episodes) >= self.model._stats_window_size:
            self.on_score(float(np.mean([each["r"] for each in episodes])))
