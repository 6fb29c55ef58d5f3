"""Held-out levels whose first frame equals that of a training level."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from srwm_rl.envs.procgen.batch import ProcgenBatch


def first_frames(game: str, mode: str, levels: Sequence[int], **options: Any) -> list[bytes]:
    """Return a digest of the first frame of each level of a ProcGen game, in order; `options` are ProcGen's switches.

    Raises:
        UserError: an argument is wrong or ProcGen is not installed.
    """
    n_envs = min(64, len(levels))
    digests: list[bytes] = []
    with closing(ProcgenBatch(game, n_envs, "all", mode, **options)) as env:
        for start in range(0, len(levels), n_envs):
            some = levels[start : start + n_envs]
            frames = np.asarray(env.reset(levels=np.resize(some, n_envs)))  # repeated to one per environment
            digests += [hashlib.sha256(frame.tobytes()).digest() for frame in frames[: len(some)]]
    return digests


def same_first_frame(game: str, mode: str, train: Sequence[int], held_out: Sequence[int], **options: Any) -> list[int]:
    """Return the held-out levels whose first frame is, pixel for pixel, that of a training level."""
    seen = set(first_frames(game, mode, train, **options))
    digests = first_frames(game, mode, held_out, **options)
    return [level for level, digest in zip(held_out, digests, strict=True) if digest in seen]
