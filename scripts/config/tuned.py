"""Settings that a search found for an environment and a core; they come with the package, `srwm_rl/presets/*.yml`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import srwm_rl
from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError, named
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.cli import foreign_wrappers
from srwm_rl.scripts.config.config_file import MAX_BYTES, convert_texts, from_mapping, parse_yaml
from srwm_rl.scripts.config.settings import TrainConfig

FOLDER = Path(srwm_rl.__file__).parent / "presets"
TUNED, NONE = "tuned", "none"  # values of --preset
# Settings that make another environment than the one that the search trained in.
OF_ENVIRONMENT = ("env_kwargs", "wrapper", "atari", "frame_stack", "attempts", "shuffle_actions", "mode")
NOT_TUNED = ("env", "core", "preset", "seed", "log_folder")  # settings that such a file does not hold


@dataclass(frozen=True)
class FoundBy:
    """How settings were found."""

    command: str
    """The command of the search."""
    trials: int
    """Trials of the search, as many for every core."""
    seeds: str
    """Training seeds of each trial, which are not reported."""
    date: str


@dataclass(frozen=True)
class Tuned:
    """Settings for an environment and a core, by their names in `TrainConfig`, and how they were found."""

    settings: dict[str, Any]
    found_by: FoundBy


def read_tuned(path: Path) -> dict[str, Tuned]:
    """Return the settings of a file by core.

    Raises:
        UserError: the file cannot be read, names an unknown setting, has a value of another type, or does not say how
            its settings were found.
    """
    with named(str(path)):
        content = parse_yaml(read_small(path, MAX_BYTES))
        if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
            raise UserError("it has no sections of settings; write one per core, such as `srwm:`")
        return {core: _read_section(core, section) for core, section in content.items()}


def _read_section(core: str, section: dict[str, Any]) -> Tuned:
    with named(core):
        settings = from_mapping({name: value for name, value in section.items() if name != "found_by"})
        wrong = settings.keys() & {*NOT_TUNED, *OF_ENVIRONMENT}
        if not foreign_wrappers(settings.get("wrapper", ())):
            wrong -= {"wrapper"}
        if wrong:
            raise UserError(f"such a file does not hold {', '.join(sorted(wrong))}")
        with named("found_by"):
            return Tuned(settings, convert_texts(section.get("found_by"), FoundBy))


def tuned_for(env: str, core: str) -> Tuned | None:
    """Return the tuned settings of an environment and a core; None: there are none.

    Raises:
        UserError: an unknown environment, or as `read_tuned`.
    """
    path = FOLDER / f"{','.join(resolve(env).names).replace('/', '+')}.yml"
    return read_tuned(path).get(core) if path.is_file() else None


def default_preset(env: str | None, core: str | None, algo: str | None, others: Collection[str] = ()) -> str | None:
    """Return the preset of a training for which none is chosen: `TUNED` where there are such settings, or None.

    `others` are the names of further settings that are chosen: some make another environment.

    Raises:
        UserError: as `tuned_for`.
    """
    if {*others} & {*OF_ENVIRONMENT}:
        return None
    tuned = tuned_for(env or TrainConfig.env, core or TrainConfig.core)
    if tuned is None or algo not in (None, tuned.settings.get("algo", TrainConfig.algo)):
        return None
    return TUNED
