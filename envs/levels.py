"""Ranges of level seeds, and the sampler of the next level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.hashing import hash_integers
from srwm_rl.errors import UserError

MAX_LEVEL = 2**31 - 1
"""One more than the largest level seed: ProcGen keeps level seeds in a signed 32-bit integer."""

MAX_LISTED = 1_000_000
"""Levels that may be played one by one."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LevelRange:
    """The level seeds `start`, ..., `stop - 1` that an environment may play.

    Raises:
        UserError: If the range is empty, reversed, negative or reaches beyond 2**31 - 1.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0:
            raise UserError(f"levels {self.start}:{self.stop}: a level cannot be negative; start at 0 or above")
        if self.stop > MAX_LEVEL:
            raise UserError(f"levels {self.start}:{self.stop}: levels end at {MAX_LEVEL} (2**31 - 1); use a lower stop")
        if self.stop <= self.start:
            raise UserError(f"levels {self.start}:{self.stop} hold no level; the stop must be above the start")

    @classmethod
    def parse(cls, text: str | LevelRange) -> LevelRange:
        """Read `"start:stop"` (stop exclusive) or `"all"`; a `LevelRange` is returned as it is.

        Raises:
            UserError: If the text is neither, or the range is not valid.
        """
        if isinstance(text, LevelRange):
            return text
        if not isinstance(text, str):
            raise UserError(f"levels must be text such as '0:200' or 'all', not {text!r}")
        if text.strip() == "all":
            return cls(0, MAX_LEVEL)
        start, colon, stop = (part.strip() for part in text.partition(":"))
        # isdecimal also accepts other scripts' digits; the sign is left to __post_init__, which explains it better.
        if not colon or not all(part.removeprefix("-").isdecimal() and part.isascii() for part in (start, stop)):
            raise UserError(f"levels {text!r} are not of the form 'start:stop' (stop exclusive, as '0:200') or 'all'")
        return cls(int(start), int(stop))

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, level: object) -> bool:
        return isinstance(level, (int, np.integer)) and self.start <= int(level) < self.stop

    def __str__(self) -> str:
        return "all" if (self.start, self.stop) == (0, MAX_LEVEL) else f"{self.start}:{self.stop}"

    def overlap(self, other: LevelRange) -> int:
        """Count the levels that both ranges hold."""
        return max(0, min(self.stop, other.stop) - max(self.start, other.start))


def check_levels(levels: Sequence[int] | IntArray | LevelRange, n: int | None = None) -> IntArray:
    """Return `levels` as `[n]` int64 once each of them is a level seed that exists.

    Raises:
        UserError: If they are not whole numbers in 0 .. 2**31 - 2, or not `n` of them (any number above 0 if None).
    """
    if isinstance(levels, LevelRange) and len(levels) > MAX_LISTED:
        raise UserError(f"levels {levels} are too many to list; give at most {MAX_LISTED}, as '0:200'")
    array = np.arange(levels.start, levels.stop) if isinstance(levels, LevelRange) else np.asarray(levels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(f"levels must be a non-empty list of whole numbers, not {levels!r}")
    if n is not None and len(array) != n:
        raise UserError(f"{len(array)} levels were given for {n} environments; give one level per environment")
    if array.min() < 0 or array.max() >= MAX_LEVEL:
        raise UserError(f"levels must lie in 0 .. {MAX_LEVEL - 1}; these reach from {array.min()} to {array.max()}")
    return array.astype(np.int64)


class LevelSampler:
    """Choose each environment's next level: a pinned one, or the next of its own random sequence.

    The k-th level of environment i is a hash of (seed, i, k), so that resetting one environment never shifts what
    the others play, and the state is three small arrays.
    """

    def __init__(self, levels: LevelRange, n_envs: int, seed: int) -> None:
        self.levels = levels
        self.n_envs = n_envs
        self.seed = seed
        self.counts: IntArray = np.zeros(n_envs, np.int64)
        self.pins: IntArray = np.full(n_envs, -1, np.int64)

    def pin(self, mask: BoolArray, levels: IntArray | None) -> None:
        """Fix the levels `[n]` of the masked environments, or free them (None)."""
        self.pins[mask] = -1 if levels is None else levels[mask]

    def draw(self, mask: BoolArray) -> IntArray:
        """Return the next level `[mask.sum()]` of each masked environment."""
        indices = np.flatnonzero(mask)
        drawn = hash_integers(self.seed, indices, self.counts[indices]) % np.uint64(len(self.levels))
        pins = self.pins[indices]
        self.counts[indices] += pins < 0
        return np.where(pins < 0, drawn.astype(np.int64) + self.levels.start, pins)
