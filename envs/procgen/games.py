"""ProcGen's games, modes and options, and their checks: its C++ ends the whole process on a wrong value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError, check_settings, did_you_mean

GAMES = (
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
    "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
)  # fmt: skip

ACTIONS = (
    "left-down", "left", "left-up", "down", "nothing", "up", "right-down", "right", "right-up",
    "D", "A", "W", "S", "Q", "E",
)  # fmt: skip
"""The 15 actions by number: nine movements, and six keys whose meaning depends on the game; D fires where one can."""

KEY_GAMES = {"bossfight": 1, "caveflyer": 1, "dodgeball": 1, "fruitbot": 1, "plunder": 1, "ninja": 6, "starpilot": 6}
"""Games in which keys do something -> how many, from the first (D): `special_action` in procgen/src/games/*.cpp."""

IDLE_MOVES = {
    **dict.fromkeys(("climber", "jumper", "ninja"), (3,)),
    **dict.fromkeys(("fruitbot", "plunder"), (3, 5)),
}
"""Movements that do nothing in a game, straight down or up: `set_action_xy` in procgen/src/games/*.cpp."""

PROCGEN_IDS = {f"procgen-{game}-v0": game for game in GAMES}
"""The games' Gymnasium ids, the same as in the original package."""

GAME_SETS: dict[str, tuple[str, ...]] = {
    "paper6": ("bigfish", "fruitbot", "maze", "leaper", "plunder", "starpilot"),
    "all16": GAMES,
}
"""Lists of games with a name; `paper6` is the multi-task set of the SRWM paper."""

EXPLORATION_LEVELS = {
    "coinrun": 1949448038,
    "caveflyer": 1259048185,
    "leaper": 1318677581,
    "jumper": 1434825276,
    "maze": 158988835,
    "heist": 876640971,
    "climber": 1561126160,
    "ninja": 1123500215,
}
"""The one level that exploration mode plays (https://github.com/openai/procgen/blob/master/procgen/env.py)."""

MODE_GAMES: dict[str, tuple[str, ...]] = {
    "easy": GAMES,
    "hard": GAMES,
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": tuple(sorted(EXPLORATION_LEVELS)),
}
"""Which games each mode knows (https://github.com/openai/procgen/blob/master/procgen/src/game.cpp, parse_options)."""

MODE_NUMBERS = {"easy": 0, "hard": 1, "extreme": 2, "memory": 10, "exploration": 1}
"""`DistributionMode` as a saved state holds it; exploration is one hard level."""

OPTIONS: dict[str, bool] = {
    "center_agent": True,
    "use_backgrounds": True,
    "use_monochrome_assets": False,
    "restrict_themes": False,
    "use_generated_assets": False,
    "paint_vel_info": False,
    "use_sequential_levels": False,
}
"""ProcGen's switches and their defaults."""

SETTINGS = ("n_threads", "timeout_as_truncation", "render_mode")
"""What else `ProcgenBatch` takes beyond games, levels, mode and seed."""

CALLED_HERE = {
    **dict.fromkeys(("num_levels", "start_level"), "levels, such as '0:200'"),
    "distribution_mode": "mode",
    "rand_seed": "seed",
}
"""Arguments of the original package -> what they are called here."""


def idle_actions(game: str) -> tuple[int, ...]:
    """Return the actions that do nothing in a game: 4, some movements, and keys that the game does not use."""
    return (*sorted({4, *IDLE_MOVES.get(game, ())}), *range(9 + KEY_GAMES.get(game, 0), len(ACTIONS)))


def timeout(game: str, mode: str) -> int:
    """Return the steps after which ProcGen ends an episode, as its saved states hold them."""
    if (game, mode) == ("jumper", "memory"):
        return 2000
    return {"bigfish": 6000, "bossfight": 4000, "plunder": 4000, "leaper": 500, "maze": 500}.get(game, 1000)


def parse_games(games: str | Sequence[str]) -> tuple[str, ...]:
    """Read a game, a comma-separated list, a game set's name or a list of games.

    Raises:
        UserError: If a name is not known, twice there, or there is none.
    """
    names = [part.strip() for part in games.split(",")] if isinstance(games, str) else list(games)
    if len(names) == 1 and names[0] in GAME_SETS:
        return GAME_SETS[names[0]]
    for name in names:
        if name not in GAMES:
            raise UserError(f"there is no ProcGen game {name!r}{did_you_mean(str(name), [*GAMES, *GAME_SETS])}")
    if len(set(names)) != len(names) or not names:
        raise UserError(f"ProcGen games {games!r}: name each game once, and at least one")
    return tuple(names)


def level_range(games: Sequence[str], mode: str, levels: str | LevelRange) -> LevelRange:
    """Return the range to play: exploration mode has one level of its own, others take what is asked for.

    Raises:
        UserError: If a game has no such mode, or exploration mode is asked for other levels or several games.
    """
    asked = LevelRange.parse(levels)
    if mode not in MODE_GAMES:
        raise UserError(f"there is no ProcGen mode {mode!r}{did_you_mean(str(mode), MODE_GAMES)}")
    for game in games:
        if game not in MODE_GAMES[mode]:
            raise UserError(f"{game} has no {mode} mode; games with one: {', '.join(MODE_GAMES[mode])}")
    if mode != "exploration":
        return asked
    if len(games) > 1:
        raise UserError("exploration mode plays one level of one game; give a single game")
    level = EXPLORATION_LEVELS[games[0]]
    if asked != LevelRange(level, level + 1) and str(asked) != "all":
        raise UserError(f"exploration mode of {games[0]} plays level {level} only; give levels 'all'")
    return LevelRange(level, level + 1)


def check_options(options: dict[str, bool]) -> dict[str, bool]:
    """Return ProcGen's switches with `options` over the defaults.

    Raises:
        UserError: If a name is not known or a value is not a boolean.
    """
    check_names("ProcGen", options, OPTIONS)
    for name, value in options.items():
        check_switch(name, value)
    return {**OPTIONS, **options}


def check_names(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `UserError` for a name that is not known, with ours for one of the original package, or the nearest."""
    for name in names:
        if name in CALLED_HERE:
            raise UserError(f"{owner} has no setting {name!r}: here it is {CALLED_HERE[name]}")
    check_settings(owner, names, known)


def check_switch(name: str, value: Any) -> bool:
    """Return `value` if it is a boolean, else raise a `UserError` that names it."""
    if not isinstance(value, bool):
        raise UserError(f"ProcGen option {name} must be True or False, not {value!r}")
    return value
