"""Checks of ProcGen's saved states: its C++ reader would end the process on a wrong one.

Layout: `Game::serialize` in https://github.com/openai/procgen/blob/master/procgen/src/game.cpp, little-endian 32-bit
integers, strings with their length before them, and an end mark.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import blake2b

from srwm_rl.errors import UserError

_END = struct.pack("<I", 0xCAFECAFE)
_INTEGERS_BEFORE_LEVELS = 13  # 9 options (the 8th is the mode), 3 of coinrun_old, and grid_step
_MODE_INDEX = 7


def digest(states: Iterable[bytes]) -> str:
    """Return a checksum of states and their order, against damage, not against malice."""
    total = blake2b(digest_size=16)
    for state in states:
        total.update(len(state).to_bytes(8, "little") + state)
    return total.hexdigest()


def check_state(data: bytes, game: str, mode_number: int, levels: tuple[int, int]) -> None:
    """Raise a UserError unless `data` looks like a saved state of this game, mode and level range (start, stop)."""
    if len(data) < 8 or data[-4:] != _END:
        raise UserError(f"the saved state of {game} is damaged or cut off; use an undamaged checkpoint")
    version, length = struct.unpack_from("<ii", data)
    head = 8 + length + 4 * (_INTEGERS_BEFORE_LEVELS + 2)
    if version != 0 or not 0 < length < 32 or len(data) < head:
        raise UserError(f"the saved state of {game} is damaged or of another ProcGen version")
    numbers = struct.unpack_from(f"<{_INTEGERS_BEFORE_LEVELS + 2}i", data, 8 + length)
    header = (data[8 : 8 + length].decode("ascii", "replace"), numbers[_MODE_INDEX], *numbers[-2:])
    if header != (game, mode_number, *levels):
        raise UserError(
            f"the saved state is of {header[0]} (mode {header[1]}, levels {header[2]}:{header[3]}), "
            f"but {game} (mode {mode_number}, levels {levels[0]}:{levels[1]}) is needed"
        )
