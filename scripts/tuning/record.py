"""What a search is, in its folder: `tune.json`, from which it is continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.storage.safe_file import write_whole
from srwm_rl.storage.strict_json import convert, parse_json

RECORD, STUDY, BEST_SETTINGS, PAGE = "tune.json", "study.db", "best.yml", "tune.html"
MAX_BYTES = 2**18


@dataclass(frozen=True)
class SearchSettings:
    """What a search is: the same in all processes that take part in it."""

    env: str
    core: str
    algo: Literal["ppo", "impala", "supervised"]
    n_timesteps: int
    seeds: str
    levels: str
    """Levels that score a trial; neither training levels nor those of the final report."""
    fixed: dict[str, Any]
    """Settings that all trials have in common, as in a file of settings."""
    space: dict[str, Any]
    """What to vary, as in a file."""
    prune: bool


@dataclass(frozen=True)
class SearchRecord:
    """The content of `tune.json`."""

    settings: SearchSettings
    study_name: str
    own_storage: bool
    """Whether the trials are remembered in the folder, not in a database given by --storage."""
    trials: int
    command: list[str]

    def write(self, folder: Path) -> None:
        """Write it into a search's folder."""
        write_whole(folder / RECORD, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> SearchRecord:
        """Read that of a search's folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            content = parse_json(read_small(folder / RECORD, MAX_BYTES))
        except (UserError, ValueError) as error:
            raise UserError(f"{folder} is no folder of a search: it has no readable {RECORD} ({error})") from error
        return convert(content, cls, f"{folder / RECORD} is damaged")
