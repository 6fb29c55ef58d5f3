"""Notice that no step ends any more, and say where the environments are."""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.scripts.cli import warn

HUNG = 75  # exit code: try again (EX_TEMPFAIL of sysexits.h)
STATUS = "SRWM_RL_STATUS"  # environment variable: the file through which the supervisor watches


class Watchdog(BaseCallback):
    """A callback that beats at every step, and a thread that listens.

    When nothing was heard for `seconds`, it says so once, with the place of every environment that can tell it and
    every thread's stack; under a supervisor it then ends the process, which starts again from the last checkpoint.

    Args:
        run: the run's folder.
        seconds: of silence; 0: never mind.
    """

    def __init__(self, run: Path, seconds: int) -> None:
        super().__init__()
        self.run, self.seconds = run, seconds
        self.status = Path(os.environ[STATUS]) if STATUS in os.environ else None
        self._over = Event()

    def _on_training_start(self) -> None:
        self._beat = time.monotonic()
        if self.status is not None:
            self.status.write_text(str(self.run.resolve()))
        if self.seconds:
            Thread(target=self._listen, name="srwm-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Say that something has been done."""
        self._beat = time.monotonic()
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
        """Stop listening, also when training was interrupted."""
        self._over.set()

    def _listen(self) -> None:
        told = 0.0
        while not self._over.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._beat
            if silent < self.seconds or self._beat == told:
                continue
            told = self._beat
            warn(f"no step has ended for {silent:.0f} seconds{self._places()}")
            if self.status is not None:
                faulthandler.dump_traceback(file=2)  # the real one, whatever sys.stderr is now
                os._exit(HUNG)

    def _places(self) -> str:
        try:
            places: list[Any] = self.training_env.env_method("places")
        except Exception:  # whatever environments these are, the warning must get out
            return ""
        # Groups of environments answer each for itself, once per environment.
        return "".join(f"; {place}" for place in dict.fromkeys(places) if place)
