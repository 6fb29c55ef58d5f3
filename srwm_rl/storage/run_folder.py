"""A run folder: its settings, its models and its checkpoints."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.storage.remote import fetch, is_address
from srwm_rl.storage.safe_file import TEMPORARY, write_whole
from srwm_rl.storage.strict_json import parse_json
from srwm_rl.zoo import PREFIX, zoo_file

CONFIG, CHECKPOINTS, TENSORBOARD, METRICS = "config.json", "checkpoints", "tensorboard", "metrics.jsonl"
BEST = "best"  # RUN/best is accepted for the run's best model wherever a run or a model file is
LOCK = ".lock"
GROUP = "group.json"  # in the folder of a group of runs
KEEP = 3
MAX_CONFIG_BYTES = 2**20


@dataclass(eq=False)
class Run:
    """A training run's folder.

    RUN/config.json                        settings, versions
    RUN/checkpoints/model-<steps>.safetensors       weights to evaluate, watch and share
    RUN/checkpoints/best-<steps>.safetensors        the weights with the best score, measured at that step
    RUN/checkpoints/checkpoint-<steps>.safetensors  the whole state, to resume from
    RUN/tensorboard/
    """

    path: Path
    config: dict[str, Any]  # the content of `config.json`
    _lock: TextIO | None = field(default=None, init=False, repr=False)

    @classmethod
    def create(cls, base: Path, config: dict[str, Any], path: Path | None = None) -> Run:
        """Make the first of the folders `<base>_1`, `<base>_2`, ... that does not exist, or the folder `path`.

        What a run without a checkpoint left at `path` is deleted.

        Raises:
            UserError: the folder cannot be made, or there is a run with checkpoints at `path`.
        """
        try:
            if path is None:
                path = numbered_folder(base)
            else:
                _empty(path)
                path.mkdir(parents=True)
            (path / CHECKPOINTS).mkdir()
            run = cls(path, config)
            run.write_config()
        except OSError as error:
            folder = path or base
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; choose another with -f") from error
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run folder.

        Raises:
            UserError: there is none at `path`.
        """
        if path.name.startswith(PREFIX) and not path.exists():
            name = path.name.removeprefix(PREFIX)
            raise UserError(f"{path} is a bundled agent, which has no run folder; srwm-rl zoo {name} prints its card")
        if not path.exists():
            raise UserError(
                f"there is no run at {path}; give a folder that srwm-rl train made, such as logs/ppo_srwm/coinrun_1"
            )
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"cannot read {path}: it is no regular file, and no run folder")
        if (path / GROUP).is_file():
            raise UserError(f"{path} is a group of runs; name one of them, such as {path}/seed_0")
        try:
            config = parse_json(read_small(path / CONFIG, MAX_CONFIG_BYTES))
            if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
                raise ValueError("it holds no settings of a run")
        except ValueError as error:
            raise UserError(
                f"{path} is no run folder: it has no readable {CONFIG} ({error}); give one that srwm-rl train made"
            ) from error
        return cls(path, config)

    def write_config(self) -> None:
        """Write `config.json` atomically.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(self.path / CONFIG, (json.dumps(self.config, indent=2) + "\n").encode())

    def restore(self) -> bool:
        """Make the folder again if it, or a part of it, was moved or deleted while the run is trained.

        Returns:
            Whether it was.

        Raises:
            OSError: it cannot be made, or another run has taken its place.
        """
        if (self.path / CHECKPOINTS).is_dir() and (self.path / CONFIG).exists() and self.is_locked():
            return False
        if (self.path / CONFIG).exists():
            with suppress(UserError):  # unreadable: it is written again
                if Run.open(self.path).config != json.loads(json.dumps(self.config)):
                    raise OSError(errno.EEXIST, "another run is in this folder now", str(self.path))
        (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if not self.is_locked():
            self._take_lock()
        self.write_config()
        return True

    def check_own(self) -> None:
        """Check that the folder holds no links, through which a run would write and delete files elsewhere.

        Raises:
            UserError: a link, a pipe or a device is in the folder; the message names it.
        """
        folders = [self.path, self.path / CHECKPOINTS, self.path / TENSORBOARD]
        for path in (child for folder in folders if folder.is_dir() for child in sorted(folder.iterdir())):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise UserError(
                    f"{path} is a link, or no regular file: a run is written in its own folder only; "
                    "put the file itself there, or start a new run"
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other trainers; the lock of a killed process is released at once.

        Raises:
            UserError: another process trains this run (the message has its id), or a link is in the folder.
        """
        self.check_own()
        try:
            self._take_lock()
        except BlockingIOError as error:
            raise UserError(f"{self.path} {error.strerror}; stop that first") from error
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def is_locked(self) -> bool:
        """Return whether this process has locked the folder, which was not moved or replaced since."""
        if self._lock is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK, follow_symlinks=False))
        except OSError:
            return False

    def _take_lock(self) -> None:
        """Lock the folder.

        Raises:
            BlockingIOError: another process has locked it.
            OSError: the file for it cannot be made.
        """
        file = (self.path / LOCK).open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                reason = f"is being trained by process {file.read(20).strip()}"
            raise BlockingIOError(errno.EAGAIN, reason, str(self.path)) from error
        except OSError:  # a file system without locks
            pass
        with suppress(OSError):  # a full disk
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        if self._lock is not None:
            self._lock.close()
        self._lock = file

    def delete_if_empty(self) -> None:
        """Delete the folder of a new run that ended before its first update; call it while it is locked."""
        metrics = self.path / METRICS
        if self.is_locked() and not self.files("checkpoint") and not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(self.path, ignore_errors=True)

    def file(self, kind: str, steps: int) -> Path:
        """Return the path of the file of a `kind` ("model", "best" or "checkpoint") at that step."""
        return self.path / CHECKPOINTS / f"{kind}-{steps:012d}.safetensors"

    def files(self, kind: str) -> list[Path]:
        """Return the files of a kind, oldest first."""
        paths = (self.path / CHECKPOINTS).glob(f"{kind}-*.safetensors")
        return sorted((path for path in paths if re.fullmatch(rf"{kind}-[0-9]{{12,15}}", path.stem)), key=steps_of)

    def models(self, best: bool = False) -> list[Path]:
        """Return the model files, newest first, or the best ones, best first: each later one had a better score.

        Raises:
            UserError: the run has none yet.
        """
        if models := self.files(BEST if best else "model")[::-1]:
            return models
        if best:
            raise UserError(
                f"{self.path} has no best model yet: it is written with the checkpoint after the first evaluation "
                f"(--eval-freq) or the first 100 episodes; until then use {self.path}, its newest model"
            )
        raise UserError(f"{self.path} has no model: it was stopped before its first checkpoint; start a new run")

    def forget_best(self, after: int) -> None:
        """Delete the best models scored at later steps than `after`, from which training resumes."""
        for path in self.files(BEST):
            if steps_of(path) > after:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete all but the newest files of each kind, and temporary files of killed processes.

        As many best models are kept, so that each kept checkpoint has its own.

        Raises:
            UserError: the folder of checkpoints is a link; its files may belong to another run.
        """
        if (self.path / CHECKPOINTS).is_symlink():
            raise UserError(
                f"{self.path / CHECKPOINTS} is a link: nothing is deleted there; put the folder itself there"
            )
        old = [path for kind in ("model", BEST, "checkpoint") for path in self.files(kind)[:-KEEP]]
        for path in [*old, *(self.path / CHECKPOINTS).glob(f"{TEMPORARY}*")]:
            path.unlink(missing_ok=True)


def numbered_folder(base: Path) -> Path:
    """Make the first of the folders `<base>_1`, `<base>_2`, ... that does not exist, and return it."""
    for number in itertools.count(1):
        path = base.with_name(f"{base.name}_{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


def _empty(path: Path) -> None:
    """Delete the folder of a run that was killed before its first checkpoint."""
    if not (path / CONFIG).exists():
        return
    if Run.open(path).files("checkpoint"):
        raise UserError(f"{path} has checkpoints; resume it with srwm-rl train --resume {path}")
    shutil.rmtree(path)


def steps_of(file: Path) -> int:
    """Return the steps in the name of one of a run's files."""
    return int(file.stem.rpartition("-")[2])


def run_folder(path: str | Path) -> Path:
    """Return the run folder of a path RUN or RUN/best."""
    path = Path(path)
    is_best = path.name == BEST and not path.exists() and (path.parent / CONFIG).exists()
    return path.parent if is_best else path


def model_files(path: str | Path) -> list[Path]:
    """Return the models that a path (a file, RUN or RUN/best, zoo:NAME, an address) names.

    The first is the preferred one, the others are to be used if it is damaged.

    Raises:
        UserError: there is no such run, or it has no such model.
    """
    if is_address(path):
        return [fetch(str(path))]
    if str(path).startswith(PREFIX):
        return [zoo_file(str(path))]
    path = Path(path)
    if path.is_file():
        return [path]
    folder = run_folder(path)
    return Run.open(folder).models(best=folder != path)


def title_of(path: str | Path) -> str:
    """Return a short name for what a path names: `coinrun_1`, `coinrun_1-best`, `coinrun_1-seed_0`, or a file's own."""
    if is_address(path) or str(path).startswith(PREFIX):
        return re.split("[/:]", str(path).partition("#")[0])[-1].removesuffix(".safetensors")
    path = Path(path)
    if path.is_file():
        return path.resolve().stem
    folder = run_folder(path)
    suffix, folder = "" if folder == path else f"-{BEST}", folder.resolve()
    group = f"{folder.parent.name}-" if (folder.parent / GROUP).is_file() else ""
    return f"{group}{folder.name}{suffix}"
