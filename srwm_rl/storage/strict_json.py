"""JSON from files that nobody has to trust: of bounded size and depth, each key once, numbers that are numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

MAX_BYTES = 2**24
MAX_VALUES = 2**20  # a text of 16 MB could describe millions of empty lists, of 56 bytes each
MAX_DEPTH = 64
MAX_DIGITS = 60  # a generator's state has 39; to read a million digits takes minutes


def parse_json(text: bytes, most_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is no JSON, or one that no program of ours writes: too long, too deep, with a key given twice,
            NaN or infinity, or a number of hundreds of digits.
    """
    if len(text) > most_bytes:
        raise ValueError(f"it has {len(text):,} bytes of JSON, more than the {most_bytes:,} that are read")
    if sum(text.count(each) for each in b"[{,") > MAX_VALUES:
        raise ValueError(f"its JSON has more than {MAX_VALUES:,} values")
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_number
        )
    except RecursionError as error:
        raise ValueError("its JSON is too deep") from error
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [each for node in level if isinstance(node, dict | list) for each in _children(node)]
        if not level:
            return
    raise ValueError("its JSON is too deep")


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its JSON has a key twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"its JSON has a number of {len(digits):,} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"its JSON has the number {text[:20]}")
    return value
