"""The levels that a run has played, game by game: of bounded size, exact, or honest about what it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from srwm_rl.errors import UserError

MAX_LEVELS = 2**31
MAX_MAPPED = 2**20  # levels of a range that are kept as a bit each: 128 KiB
MAX_OTHERS = 2**16  # all others are kept as numbers: 512 KiB
MAX_GAMES = 256
MAX_LETTERS = 200  # of a game's name

Tree = dict[str, Any]


class GameLevels:
    """The levels played of one game, bounded in memory whatever is played.

    Levels of a range of at most 2**20 are held as a bit each, others as numbers, the first 65,536 different ones.

    Attributes:
        complete: every level that was added is remembered.
        low, high: the lowest and the highest level that was added, remembered or not; -1: none.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.map = np.zeros(stop - start, np.bool_)
        self.others: set[int] = set()
        self.complete, self.low, self.high = True, -1, -1
        self._sorted = np.zeros(0, np.int64)  # the others, up to those that are new since the last `to_tree`
        self._new: list[int] = []
        self._tree: Tree | None = None  # of this content, if there is one already

    def add(self, level: int) -> None:
        """Note that a level was played; of what can be no level's seed, only that there was something."""
        if not _is_level(level):
            self.complete, self._tree = False, None
            return
        place = level - self.start
        if 0 <= place < len(self.map):
            if self.map[place]:
                return
            self.map[place] = True
        elif level in self.others:
            return
        elif len(self.others) < MAX_OTHERS:
            self.others.add(level)
            self._new.append(level)
        else:
            self.complete = False
        self.low = level if self.low < 0 else min(self.low, level)
        self.high = max(self.high, level)
        self._tree = None

    def __contains__(self, level: int) -> bool:
        place = level - self.start
        return bool(self.map[place]) if 0 <= place < len(self.map) else level in self.others

    def __len__(self) -> int:
        """Return the number of different levels that are remembered."""
        return int(self.map.sum()) + len(self.others)

    def to_tree(self) -> Tree:
        """Return the content as arrays and numbers that change no more."""
        if self._tree is None:
            if self._new:  # inserted, not sorted anew: this is done at every update
                new = np.array(sorted(self._new), np.int64)
                self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, new), new)
                self._new = []
            self._tree = {
                "map": np.packbits(self.map),
                "others": self._sorted,
                "complete": self.complete,
                "low": self.low,
                "high": self.high,
            }
        return self._tree


class SeenLevels:
    """Which levels a run has played, by game.

    Args:
        start: first level of the range that is trained on.
        stop: its end; a range of more than 2**20 levels is kept as single numbers.
        complete: nothing was played before this record began.
    """

    def __init__(self, start: int, stop: int, complete: bool = True) -> None:
        self.start, self.stop = (start, stop) if stop - start <= MAX_MAPPED else (0, 0)
        self.complete = complete
        self.games: dict[str, GameLevels] = {}

    def add(self, game: str, level: int) -> None:
        """Note that a level was played."""
        if game not in self.games:
            if len(self.games) == MAX_GAMES or not _is_name(game):
                self.complete = False
                return
            self.games[game] = GameLevels(self.start, self.stop)
        self.games[game].add(level)

    def among(self, game: str, levels: Iterable[int]) -> list[int]:
        """Return those of some levels that were played, as far as is known."""
        played = self.games.get(game)
        return [] if played is None else [level for level in levels if level in played]

    def is_complete(self, game: str) -> bool:
        """Say whether every level that was played of a game is known."""
        return self.complete and game in self.games and self.games[game].complete

    def to_tree(self) -> Tree:
        """Return the record as arrays and numbers; what is played later does not change them."""
        games = {name: each.to_tree() for name, each in sorted(self.games.items())}
        return {"start": self.start, "stop": self.stop, "complete": self.complete, "games": games}

    @classmethod
    def from_tree(cls, tree: Any, source: str) -> SeenLevels:
        """Rebuild what `to_tree` gave; the tree may come from anywhere.

        Raises:
            UserError: it is none; the message names the file.
        """
        if not isinstance(tree, dict) or tree.keys() != {"start", "stop", "complete", "games"}:
            raise _damaged(source)
        start, stop, games = tree["start"], tree["stop"], tree["games"]
        if not (_is_level(start) and _is_level(stop) and 0 <= stop - start <= MAX_MAPPED):
            raise _damaged(source)
        if type(tree["complete"]) is not bool or not isinstance(games, dict) or len(games) > MAX_GAMES:
            raise _damaged(source)
        record = cls(start, stop, tree["complete"])
        for name, each in games.items():
            if not _is_name(name):
                raise _damaged(source)
            record.games[name] = _game(each, start, stop, source)
        return record


def _game(tree: Any, start: int, stop: int, source: str) -> GameLevels:
    """Rebuild one game's part, each entry checked for itself and against the others."""
    if not isinstance(tree, dict) or tree.keys() != {"map", "others", "complete", "low", "high"}:
        raise _damaged(source)
    bits, others, complete, low, high = (tree[name] for name in ("map", "others", "complete", "low", "high"))
    if not _is_list(bits, np.uint8) or len(bits) != -(-(stop - start) // 8):
        raise _damaged(source)
    if not _is_list(others, np.int64) or len(others) > MAX_OTHERS:
        raise _damaged(source)
    game = GameLevels(start, stop)
    mapped = np.unpackbits(bits).astype(np.bool_)
    game.map, game.others, game._sorted = mapped[: stop - start], set(others.tolist()), np.sort(others)
    game.complete, game.low, game.high = complete, low, high
    known = np.union1d(np.flatnonzero(game.map) + start, others).tolist()
    if len(known) != len(game) or len(game.others) != len(others) or mapped[stop - start :].any():
        raise _damaged(source)  # a level is named twice, or one beyond the range
    if type(complete) is not bool:
        raise _damaged(source)
    if not known and not complete and (low, high) == (-1, -1):
        return game
    if not known or not all(map(_is_level, (known[0], known[-1], low, high))):
        raise _damaged(source)
    if (low, high) != (known[0], known[-1]) and (complete or low > known[0] or high < known[-1]):
        raise _damaged(source)
    return game


def _is_list(value: Any, dtype: type) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == dtype


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_LETTERS


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_LEVELS


def _damaged(source: str) -> UserError:
    return UserError(f"{source} is damaged: its record of the levels played cannot be; use another file")
