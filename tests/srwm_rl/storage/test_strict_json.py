"""Untrusted JSON: what our programs do not write is refused, and quickly."""

import json
from typing import Any

import numpy as np
import pytest

from srwm_rl import UserError
from srwm_rl.storage.strict_json import convert, parse_json


@pytest.mark.parametrize("value", [None, [], {}, 2**127, -1.5e-9, "\xe9\n", {"a": [{"b": [True, False]}]}])
def test_json_values_are_returned(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"\xff\xfe", "decode"),
        (b"\0" * 8, "Expecting value"),  # json would read it in another encoding
        (b"NaN", "the number nan"),
        (b"[-Infinity]", "the number -inf"),
        (b"1e999", "the number inf"),
        (b"1" * 61, "61 digits"),
        (b'{"a": 1, "a": 1}', "a key twice"),
        (b"[" * 65 + b"]" * 65, "too deep"),
        (b"[" * 200_000 + b"]" * 200_000, "too deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "too deep"),
        (b"[" + b"[]," * 2**20 + b"[]]", "values"),
        (b'"' + b"x" * 2**24 + b'"', "bytes of JSON"),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_json_that_our_programs_do_not_write_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_moderate_nesting_is_read() -> None:
    assert parse_json(b"[" * 60 + b"]" * 60)


@pytest.mark.parametrize("value", [None, 1, "x", [], {"a": "x"}, {"a": {}}, {1: 1}, np.zeros(3), {"a": np.zeros(0)}])
def test_a_value_of_another_type_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(UserError, match=r"^the file: ") as error:
        convert(value, dict[str, int], "the file")
    assert "\n" not in str(error.value)
