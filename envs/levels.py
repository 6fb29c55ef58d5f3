"""Ranges of level seeds, and random numbers as a function of integers: what a level fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srwm_rl.errors import UserError

MAX_LEVEL = 2**31 - 1
"""One more than the largest level seed: ProcGen keeps level seeds in a signed 32-bit integer."""

MAX_LISTED = 1_000_000
"""Levels that may be played one by one."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# NumPy's own integers: to make them anew for every call takes as long as the arithmetic.
_SEED, _STEP, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95), np.uint64(1)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST, _TO_53_BITS = np.uint64(31), np.uint64(11)


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

    def spread(self, n: int) -> list[int]:
        """Return `n` levels spread evenly over the range, or all of a shorter one, in ascending order."""
        length, n = len(self), min(n, len(self))
        return [self.start + i * length // n for i in range(n)]

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


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit integers, in place, by SplitMix64's finaliser (https://prng.di.unimi.it/splitmix64.c)."""
    for shift, factor in _MIX:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST
    return x


def hash_integers(*keys: int | IntArray) -> npt.NDArray[np.uint64]:
    """Hash the broadcast `keys` (non-negative integers or int64 arrays) to uniform 64-bit integers.

    The order of the keys counts: `hash_integers(1, 2)` is unrelated to `hash_integers(2, 1)`.
    """
    state = np.full((1,), _SEED)
    for key in keys:
        # One dimension at least: numpy warns of the wanted wrap-around when it multiplies scalars.
        state = _mix(state + np.atleast_1d(key).astype(np.uint64) * _STEP + _ONE)
    return state


def hash_uniform(*keys: int | IntArray) -> npt.NDArray[np.float64]:
    """Hash the broadcast `keys` to numbers uniform in [0, 1)."""
    return (hash_integers(*keys) >> _TO_53_BITS).astype(np.float64) * 2.0**-53
