"""A record of the levels that a run has played, by game: of bounded size, and exact or marked incomplete."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from srwm_rl.errors import UserError
from srwm_rl.storage.strict_json import convert

MAX_LEVELS = 2**31
MAX_MAPPED = 2**20  # levels of a range that are stored as a bit each: 128 KiB
MAX_OTHERS = 2**16  # all others are stored as numbers: 512 KiB
MAX_GAMES = 256
MAX_LETTERS = 200  # of a game's name

Tree = dict[str, Any]
_Level = Annotated[int, Meta(ge=0, lt=MAX_LEVELS)]
_Bound = Annotated[int, Meta(ge=-1, lt=MAX_LEVELS)]


class _GameTree(Struct, forbid_unknown_fields=True):
    """`_GameLevels.to_tree`."""

    map: np.ndarray
    others: np.ndarray
    complete: bool
    low: _Bound
    high: _Bound


class _RecordTree(Struct, forbid_unknown_fields=True):
    """`SeenLevels.to_tree`."""

    start: _Level
    stop: _Level
    complete: bool
    games: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=MAX_LETTERS)], _GameTree], Meta(max_length=MAX_GAMES)
    ]


class _GameLevels:
    """The levels played of one game, in bounded memory.

    Levels of a range of at most 2**20 are stored as a bit each, the first 65,536 others as numbers.

    Attributes:
        complete: every level that was added is stored.
        low, high: the lowest and highest level that was added, stored or not; -1: none.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.map = np.zeros(stop - start, np.bool_)
        self.others: set[int] = set()
        self.in_order = array("q")  # the others, to be copied fast
        self.complete, self.low, self.high = True, -1, -1

    def add(self, level: int) -> None:
        """Add a level; what is no level's seed only makes the record incomplete."""
        if type(level) is not int or not 0 <= level < MAX_LEVELS:
            self.complete = False
        elif level not in self:
            if 0 <= level - self.start < len(self.map):
                self.map[level - self.start] = True
            elif len(self.others) < MAX_OTHERS:
                self.others.add(level)
                self.in_order.append(level)
            else:
                self.complete = False
            self.low = level if self.low < 0 else min(self.low, level)
            self.high = max(self.high, level)

    def __contains__(self, level: int) -> bool:
        index = level - self.start
        return bool(self.map[index]) if 0 <= index < len(self.map) else level in self.others

    def __len__(self) -> int:
        return int(self.map.sum()) + len(self.others)

    def __iter__(self) -> Iterator[int]:
        yield from (np.flatnonzero(self.map) + self.start).tolist()
        yield from self.in_order

    def include(self, other: _GameLevels) -> None:
        """Add the levels of another record."""
        for level in other:
            self.add(level)
        if not other.complete:  # levels that are not stored lie within its bounds
            self.complete = False
            known = [level for level in (self.low, self.high, other.low, other.high) if level >= 0]
            self.low, self.high = min(known, default=-1), max(known, default=-1)

    def to_tree(self) -> Tree:
        others = np.array(self.in_order, np.int64)
        low, high = self.low, self.high
        return {"map": np.packbits(self.map), "others": others, "complete": self.complete, "low": low, "high": high}


class SeenLevels:
    """The levels that a run has played, by game.

    Args:
        start: first level of the training range.
        stop: its end; levels of a range of more than 2**20 are stored as numbers.
        complete: no level was played before this record began.
    """

    def __init__(self, start: int, stop: int, complete: bool = True) -> None:
        self.start, self.stop = (start, stop) if stop - start <= MAX_MAPPED else (0, 0)
        self.complete = complete
        self.games: dict[str, _GameLevels] = {}

    def add(self, game: str, level: int) -> None:
        """Add a level of a game."""
        if (levels := self._levels_of(game)) is not None:
            levels.add(level)

    def include(self, other: SeenLevels | None) -> None:
        """Add the levels of another record; None: of levels that are not known."""
        self.complete = self.complete and other is not None and other.complete
        for game, theirs in other.games.items() if other is not None else ():
            if (levels := self._levels_of(game)) is not None:
                levels.include(theirs)

    def _levels_of(self, game: str) -> _GameLevels | None:
        """Return a game's levels, none at first; None, and the record is incomplete: there is no room for it."""
        if game not in self.games:
            if len(self.games) == MAX_GAMES or not 0 < len(game) <= MAX_LETTERS:
                self.complete = False
                return None
            self.games[game] = _GameLevels(self.start, self.stop)
        return self.games[game]

    def among(self, game: str, levels: Iterable[int]) -> list[int]:
        """Return those of `levels` that are known to have been played."""
        played = self.games.get(game)
        return [] if played is None else [level for level in levels if level in played]

    def is_complete(self, game: str) -> bool:
        """Return whether every level that was played of a game is known."""
        return self.complete and game in self.games and self.games[game].complete

    def to_tree(self) -> Tree:
        """Return the record as arrays and numbers, unaffected by later additions."""
        games = {name: levels.to_tree() for name, levels in sorted(self.games.items())}
        return {"start": self.start, "stop": self.stop, "complete": self.complete, "games": games}

    @classmethod
    def from_tree(cls, tree: Any, source: str) -> SeenLevels:
        """Rebuild what `to_tree` returned; the tree may come from any file.

        Raises:
            UserError: the tree is damaged; the message names the file.
        """
        what = f"{source} is damaged: its record of the levels played"
        declared = convert(tree, _RecordTree, what)
        if not 0 <= declared.stop - declared.start <= MAX_MAPPED:
            raise UserError(f"{what} has an impossible range")
        record = cls(declared.start, declared.stop, declared.complete)
        for name, game in declared.games.items():
            record.games[name] = _restore_game(game, declared.start, declared.stop, f"{what}, game {name!r:.60}")
        return record


def _restore_game(tree: _GameTree, start: int, stop: int, what: str) -> _GameLevels:
    """Rebuild the record of one game; its entries are checked against each other."""
    if tree.map.dtype != np.uint8 or tree.map.shape != (-(-(stop - start) // 8),):
        raise UserError(f"{what}: map is of another size or type")
    if tree.others.dtype != np.int64 or tree.others.ndim != 1 or len(tree.others) > MAX_OTHERS:
        raise UserError(f"{what}: others is of another size or type")
    game = _GameLevels(start, stop)
    mapped = np.unpackbits(tree.map).astype(np.bool_)
    game.map, game.in_order = mapped[: stop - start], array("q", tree.others.tobytes())
    game.others = set(game.in_order)
    game.complete, game.low, game.high = tree.complete, tree.low, tree.high
    levels = np.union1d(np.flatnonzero(game.map) + start, tree.others).tolist()
    if len(levels) != len(game) or len(game.others) != len(tree.others) or mapped[stop - start :].any():
        raise UserError(f"{what}: a level is listed twice, or is outside the range")
    low, high = (levels[0], levels[-1]) if levels else (-1, -1)
    exact = (tree.low, tree.high) == (low, high)
    beyond = 0 <= tree.low <= low and high <= tree.high  # levels that are not stored may lie outside
    if not (exact if tree.complete or not levels else beyond) or (low < 0 and tree.complete):
        raise UserError(f"{what}: low and high do not fit its levels")
    return game
