"""Random numbers as a function of integers: the same integers give the same number, in any order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = int | npt.NDArray[np.int64]


# NumPy's own integers: to make them anew for every call takes as long as the arithmetic.
_SEED, _STEP, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95), np.uint64(1)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST, _TO_53_BITS = np.uint64(31), np.uint64(11)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit integers, in place, by SplitMix64's finaliser (https://prng.di.unimi.it/splitmix64.c)."""
    for shift, factor in _MIX:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST
    return x


def hash_integers(*keys: Integers) -> npt.NDArray[np.uint64]:
    """Hash the broadcast `keys` (non-negative integers or int64 arrays) to uniform 64-bit integers.

    The order of the keys counts: `hash_integers(1, 2)` is unrelated to `hash_integers(2, 1)`.
    """
    state = np.full((1,), _SEED)
    for key in keys:
        # One dimension at least: numpy warns of the wanted wrap-around when it multiplies scalars.
        state = _mix(state + np.atleast_1d(key).astype(np.uint64) * _STEP + _ONE)
    return state


def hash_uniform(*keys: Integers) -> npt.NDArray[np.float64]:
    """Hash the broadcast `keys` to numbers uniform in [0, 1)."""
    return (hash_integers(*keys) >> _TO_53_BITS).astype(np.float64) * 2.0**-53
