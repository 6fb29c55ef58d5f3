"""JSON of untrusted files: size and depth are bounded, keys are unique, numbers are finite, types are declared."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

from srwm_rl.errors import UserError

MAX_BYTES = 2**24
MAX_VALUES = 2**20  # 16 MB of text could describe millions of empty lists of 56 bytes each
MAX_DEPTH = 64
MAX_DIGITS = 60  # a generator's state has 39; reading a million digits takes minutes
Declared = TypeVar("Declared")


def convert(value: Any, kind: type[Declared], what: str) -> Declared:
    """Return a value of a file's JSON as a type that msgspec knows; the error message begins with `what`.

    Raises:
        UserError: the value is of another type, or out of range; the message names the entry.
    """
    try:
        return msgspec.convert(value, kind)
    except AttributeError as error:  # msgspec calls `keys` of a numpy array in the place of an object
        raise UserError(f"{what}: an array in the place of an object") from error
    except (msgspec.ValidationError, ValueError) as error:
        reason, _, path = str(error).partition(" - at `$")
        entry = path.strip(".`")
        raise UserError(f"{what}: {entry}{': ' if entry else ''}{reason}") from error


def parse_json(text: bytes, most_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: the text is no JSON, too long or too deep, or has a key twice, NaN, infinity or a number of hundreds
            of digits.
    """
    if len(text) > most_bytes:
        raise ValueError(f"it has {len(text):,} bytes of JSON, more than the {most_bytes:,} that are read")
    if sum(text.count(character) for character in b"[{,") > MAX_VALUES:
        raise ValueError(f"its JSON has more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_int=_integer)
        _check(value, MAX_DEPTH)
    except RecursionError as error:
        raise ValueError("its JSON is too deep") from error
    return value


def _check(value: Any, depth: int) -> None:
    """Check that a value has at most `depth` levels, and that its numbers are finite."""
    if not depth:
        raise ValueError("its JSON is too deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its JSON has the number {value}")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(child, depth - 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its JSON has a key twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"its JSON has a number of {len(digits):,} digits")
    return int(digits)
