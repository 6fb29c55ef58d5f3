"""A run folder: its settings, its models and its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from srwm_rl.errors import UserError
from srwm_rl.files import TEMPORARY

CONFIG, CHECKPOINTS, TENSORBOARD = "config.json", "checkpoints", "tensorboard"
KEEP = 3


class Run:
    """One training run on the disk.

        RUN/config.json                        settings, versions
        RUN/checkpoints/model-<steps>.safetensors       weights to evaluate, watch and share
        RUN/checkpoints/checkpoint-<steps>.safetensors  everything it takes to go on
        RUN/tensorboard/

    Attributes:
        path: the folder.
        config: what `config.json` holds.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, base: Path, config: dict[str, Any]) -> Run:
        """Make the first free of the folders `<base>_1`, `<base>_2`, ...; one that exists is never reused.

        Raises:
            UserError: the folder cannot be made.
        """
        number = 1
        while True:
            path = base.with_name(f"{base.name}_{number}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise UserError(
                    f"cannot make the run folder {path}: {error.strerror}; choose another with -f"
                ) from error
        (path / CHECKPOINTS).mkdir()
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run folder.

        Raises:
            UserError: there is none at `path`.
        """
        if not path.exists():
            raise UserError(
                f"there is no run at {path}; give a folder that srwm-rl train made, such as logs/ppo_srwm/coinrun_1"
            )
        try:
            config = json.loads((path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is no run folder: it has no readable {CONFIG}; give one that srwm-rl train made"
            ) from error
        if not isinstance(config, dict) or "train" not in config:
            raise UserError(f"{path / CONFIG} was not written by srwm-rl train; give a run folder that was")
        return cls(path, config)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainers out of the folder; the lock of a process that is killed is free at once.

        Raises:
            UserError: another process trains this run; its process id is named.
        """
        with (self.path / ".lock").open("a+") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    file.seek(0)
                    raise UserError(
                        f"{self.path} is being trained by process {file.read().strip()}; stop that first"
                    ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def file(self, kind: str, steps: int) -> Path:
        """Return where the `kind` ("model" or "checkpoint") of that age lies."""
        return self.path / CHECKPOINTS / f"{kind}-{steps:012d}.safetensors"

    def files(self, kind: str) -> list[Path]:
        """Return the files of a kind, oldest first."""
        return sorted((self.path / CHECKPOINTS).glob(f"{kind}-*.safetensors"))

    def models(self) -> list[Path]:
        """Return the model files, newest first.

        Raises:
            UserError: the run has none yet.
        """
        models = self.files("model")[::-1]
        if not models:
            raise UserError(f"{self.path} has no model: it was stopped before its first checkpoint; start a new run")
        return models

    def sweep(self) -> None:
        """Delete all but the newest files of each kind, and what a killed save left behind."""
        old = [each for kind in ("model", "checkpoint") for each in self.files(kind)[:-KEEP]]
        for path in [*old, *(self.path / CHECKPOINTS).glob(f"{TEMPORARY}*")]:
            path.unlink(missing_ok=True)
