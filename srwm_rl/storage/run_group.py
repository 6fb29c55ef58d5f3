"""A group of runs that differ only in their seed: `srwm-rl train --seeds` makes it."""

from __future__ import annotations

import json
import os.path
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.storage.run_folder import BEST, CONFIG, GROUP, MAX_CONFIG_BYTES, numbered_folder
from srwm_rl.storage.safe_file import write_whole
from srwm_rl.storage.strict_json import convert, parse_json

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class GroupRecord:
    """The content of `group.json`."""

    seeds: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_SEED)]], Meta(min_length=1, max_length=1000)]
    command: list[str]
    """The arguments of `srwm-rl train` that all runs have in common."""
    threads: Annotated[int, Meta(ge=1, le=1024)]
    """CPU threads of each run, which has the same number when it is resumed."""


@dataclass(frozen=True)
class RunGroup:
    """A folder with one run per seed.

    GROUP/group.json     seeds, common arguments
    GROUP/seed_<k>/      a run folder
    GROUP/seed_<k>.log   what the run printed
    """

    path: Path
    record: GroupRecord

    @classmethod
    def create(cls, base: Path, record: GroupRecord) -> RunGroup:
        """Make the first of the folders `<base>_1`, `<base>_2`, ... that does not exist.

        Raises:
            UserError: the folder cannot be made.
        """
        try:
            path = numbered_folder(base)
            write_whole(path / GROUP, (json.dumps(asdict(record), indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot make a folder {base}_1: {error.strerror}; choose another with -f") from error
        return cls(path, record)

    @classmethod
    def open(cls, path: Path) -> RunGroup:
        """Open an existing group.

        Raises:
            UserError: there is none at `path`, or its file is damaged.
        """
        try:
            content = parse_json(read_small(path / GROUP, MAX_CONFIG_BYTES))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no group of runs: it has no readable {GROUP} ({error})") from error
        return cls(path, convert(content, GroupRecord, f"{path / GROUP} is damaged"))

    def run_path(self, seed: int) -> Path:
        """Return the folder of a seed's run, which need not exist."""
        return self.path / f"seed_{seed}"

    def log_path(self, seed: int) -> Path:
        """Return the file for what a seed's run prints."""
        return self.path / f"seed_{seed}.log"

    def run_paths(self) -> list[Path]:
        """Return the folders of the runs that exist, in the order of the seeds."""
        paths = map(self.run_path, self.record.seeds)
        return [path for path in paths if (path / CONFIG).exists()]


def is_group(path: str | Path) -> bool:
    """Return whether a path is the folder of a group."""
    return (Path(path) / GROUP).is_file()


def expand_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of runs: GROUP becomes its runs, GROUP/best each run's best model, other names stay.

    Raises:
        UserError: a group without runs, or a run twice.
    """
    runs: list[str] = []
    for name in names:
        path = Path(name)
        is_best = path.name == BEST and is_group(path.parent)
        folder = path.parent if is_best else path
        if not is_group(folder):
            runs.append(name)
            continue
        paths = RunGroup.open(folder).run_paths()
        if not paths:
            raise UserError(f"{folder} is a group without runs: srwm-rl train --resume {folder} trains them")
        runs += [str(run / BEST if is_best else run) for run in paths]
    seen = set[str]()
    for run in runs:
        path_of_run = os.path.abspath(run)
        if path_of_run in seen:
            raise UserError(f"{run} is given twice; give each run once")
        seen.add(path_of_run)
    return tuple(runs)
