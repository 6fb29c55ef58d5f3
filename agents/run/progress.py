"""How far a training run is, and how long it still takes: measured over whole updates, playing and learning."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from srwm_rl.agents.base import RecurrentAlgorithm

LOG_SECONDS = 10.0  # between lines of a log file


class Pace:
    """Seconds that a step takes, by whole updates: a rollout and the learning after it.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None  # time and steps at which the present rollout began
        self._played: tuple[float, int] | None = None  # at which it ended
        self._first: tuple[float, int] | None = None  # duration and steps of the first update, which warms up
        self._others = (0.0, 0)
        self.n_learned = self.n_to_learn = 0  # minibatches of the present update

    def begin(self, steps: int) -> None:
        """Note that a rollout begins."""
        now = self._clock()
        if self._began is not None and steps > self._began[1]:
            update = now - self._began[0], steps - self._began[1]
            if self._first is None:
                self._first = update
            else:
                self._others = self._others[0] + update[0], self._others[1] + update[1]
        self._began, self._played = (now, steps), None
        self.n_learned = self.n_to_learn = 0

    def end_rollout(self, steps: int, n_to_learn: int) -> None:
        """Note that a rollout ended, of which `n_to_learn` minibatches are learned."""
        self._played, self.n_to_learn = (self._clock(), steps), n_to_learn

    def learn(self) -> None:
        """Note that a minibatch is learned."""
        self.n_learned += 1

    @property
    def is_known(self) -> bool:
        """Whether a whole update was measured."""
        return self._first is not None

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per environment step; before the first update ends it is estimated from its minibatches.

        None: nothing was learned yet.
        """
        if self._first is not None:
            seconds, steps = self._others if self._others[1] else self._first
            return seconds / steps
        if self._began is None or self._played is None or not self.n_learned or not self.n_to_learn:
            return None
        playing = self._played[0] - self._began[0]
        learning = (self._clock() - self._played[0]) * self.n_to_learn / self.n_learned
        return (playing + learning) / (self._played[1] - self._began[1])

    def seconds_left(self, total: int) -> float | None:
        """Return the seconds until `total` steps; None: not known yet."""
        per_step = self.seconds_per_step
        if per_step is None or self._began is None:
            return None
        return max(0.0, (total - self._began[1]) * per_step - (self._clock() - self._began[0]))


class _Stderr:
    """`sys.stderr` for a progress bar: what cannot be written, as on a full disk, is left out."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _Bar(tqdm):  # type: ignore[misc]
    """A bar whose speed and time left are those of a `Pace`."""

    pace: Pace | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `bar_format` may name."""
        per_step = self.pace and self.pace.seconds_per_step
        left = self.pace and self.pace.seconds_left(self.total)
        return {
            **super().format_dict,
            "left": "?" if left is None else self.format_interval(left),
            "speed": f"{self.format_sizeof(1 / per_step) if per_step else '?'}step/s",
        }


class ProgressBar(BaseCallback):
    """A progress bar with steps, mean return of the last episodes, minibatches learned, speed and the time left.

    Speed and time left are those of whole updates.

    Args:
        shown: draw it; else only `on_pace` is called.
        on_pace: called after the first update, with the seconds that an update takes and the seconds left.
    """

    model: RecurrentAlgorithm

    def __init__(self, shown: bool = True, on_pace: Callable[[float, float], None] = lambda *_: None) -> None:
        super().__init__()
        self.shown, self.on_pace = shown, on_pace
        self.pace = Pace()
        self.bar: _Bar | None = None
        self._drawn = 0.0
        self._listeners: list[Callable[[], None]] = []

    def _on_training_start(self) -> None:
        self.total, initial = self.model.planned_steps(self.model._total_timesteps), self.num_timesteps
        if self.shown:
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {speed}{postfix}]"
            settings: Any = {"unit_scale": True, "miniters": 1, "file": _Stderr(), "bar_format": form}
            self.bar = _Bar(total=self.total, initial=initial, **settings)
            self.bar.pace = self.pace
            if not self.bar.fp.isatty():
                self.bar.mininterval = LOG_SECONDS
        self._listeners = self.model.engine.listeners
        self._listeners.append(self._on_gradient)

    def _on_rollout_start(self) -> None:
        was_known = self.pace.is_known
        self.pace.begin(self.num_timesteps)
        per_step, left = self.pace.seconds_per_step, self.pace.seconds_left(self.total)
        if self.pace.is_known and not was_known and per_step is not None and left is not None:
            if self.bar is not None and self.bar.fp.isatty():
                self.bar.clear()
            self.on_pace(per_step * self.model.n_steps * self.model.n_envs * self.model.processes.size, left)
        self.note()

    def _on_step(self) -> bool:
        if self.bar is not None:
            self.bar.update(self.num_timesteps - self.bar.n)  # other processes' steps count too
        return True

    def _on_rollout_end(self) -> None:
        self.pace.end_rollout(self.num_timesteps, self.model.minibatches_per_update)
        self.note()

    def _on_gradient(self) -> None:
        self.pace.learn()
        self.note()

    def note(self, doing: str = "") -> None:
        """Draw the bar again, with what is being done, unless it was drawn just now."""
        now = monotonic()
        if self.bar is None or now - self._drawn < self.bar.mininterval:
            return
        self._drawn = now
        if self.pace.n_to_learn and not doing:
            doing = f"learning {self.pace.n_learned}/{self.pace.n_to_learn}"
        episodes = self.model.ep_info_buffer
        mean = f"return={np.mean([episode['r'] for episode in episodes]):.3g}" if episodes else ""
        self.bar.set_postfix_str(", ".join(filter(None, (mean, doing))))

    def close(self) -> None:
        """Close the bar, also when training was interrupted."""
        with suppress(ValueError):
            self._listeners.remove(self._on_gradient)
        if self.bar is not None:
            self.note()
            self.bar.close()

    def _on_training_end(self) -> None:
        self._drawn = 0.0
        self.close()
