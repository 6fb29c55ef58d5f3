"""The watchdog of a training run: a thread that notices when no step ends, in time that the process was awake."""

from __future__ import annotations

import faulthandler
import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.training.supervise import HUNG, STATUS, AwakeTimer


class Watchdog(BaseCallback):
    """A callback that notes every step and every gradient, and a thread that checks that there are some.

    After `seconds` without any, the thread prints a warning once, with what every environment reports of itself.
    Under --supervise it also prints the stack of every thread and ends the process, which the supervisor restarts.
    """

    model: RecurrentAlgorithm

    def __init__(self, run: Path, seconds: int) -> None:
        super().__init__()
        self.run, self.seconds = run, seconds
        self.status = Path(os.environ[STATUS]) if STATUS in os.environ else None
        self._beats = 0
        self._stopped = Event()

    def _on_training_start(self) -> None:
        self._write_status()
        self.model.engine.listeners.append(self.heartbeat)  # an update can take longer than a rollout
        if self.seconds:
            Thread(target=self._watch, name="srwm-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Note that the run makes progress."""
        self._beats += 1
        if self.status is not None:
            try:
                os.utime(self.status)
            except OSError:  # deleted, as old files of a temporary folder are
                self._write_status()

    def _write_status(self) -> None:
        if self.status is not None:
            with suppress(OSError):
                self.status.parent.mkdir(parents=True, exist_ok=True)
                self.status.write_bytes(os.fsencode(self.run.resolve()))

    def _on_step(self) -> bool:
        self.heartbeat()
        return True

    def close(self) -> None:
        """Stop the thread, also after an interrupted training."""
        self._stopped.set()

    _on_training_end = close

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 4)
        timer, seen, reported = AwakeTimer(2 * interval), self._beats, -1
        while not self._stopped.wait(interval):
            elapsed = timer.tick()
            if self._beats != seen:
                seen = self._beats
                timer.restart()
            elif elapsed >= self.seconds and reported != seen:
                reported = seen
                warn(f"no step has ended for {elapsed:.0f} seconds{self._places()}")
                if self.status is not None:
                    faulthandler.dump_traceback(file=2)  # sys.stderr may be redirected
                    os._exit(HUNG)

    def _places(self) -> str:
        try:
            places = self.training_env.env_method("places")
        except Exception:  # any environment, in any state: the warning must be printed
            return ""
        # Each group of environments repeats its report for every environment.
        return "".join(f"; {place}" for place in dict.fromkeys(places) if place)
