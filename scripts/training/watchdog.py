"""Detect a training loop that hangs."""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from threading import Event, Thread

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.training.supervise import HUNG, STATUS


class Watchdog(BaseCallback):
    """A callback that notes the time of every step, and a thread that checks it.

    After `seconds` without a step, the thread prints a warning once, with what every environment reports of itself.
    Under --supervise it also prints the stack of every thread and ends the process, which the supervisor restarts.
    """

    def __init__(self, run: Path, seconds: int) -> None:
        super().__init__()
        self.run, self.seconds = run, seconds
        self.status = Path(os.environ[STATUS]) if STATUS in os.environ else None
        self._stopped = Event()

    def _on_training_start(self) -> None:
        self._last_beat = time.monotonic()
        if self.status is not None:
            self.status.write_text(str(self.run.resolve()))
        if self.seconds:
            Thread(target=self._watch, name="srwm-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Note that the run makes progress."""
        self._last_beat = time.monotonic()
        if self.status is not None:
            os.utime(self.status)

    def _on_step(self) -> bool:
        self.heartbeat()
        return True

    def _on_rollout_end(self) -> None:
        self.heartbeat()

    def _on_training_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread, also after an interrupted training."""
        self._stopped.set()

    def _watch(self) -> None:
        reported = 0.0
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            elapsed = time.monotonic() - self._last_beat
            if elapsed < self.seconds or self._last_beat == reported:
                continue
            reported = self._last_beat
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
