"""Pickles as data: plain containers come back equal, objects become placeholders, and nothing is ever called."""

import collections
import contextlib
import datetime
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srwm_rl import UserError
from srwm_rl.official.data_unpickler import Named, PersistentId, read_pickle

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.lists(inner, min_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.binary(), inner)
    ),
)


@given(TREES, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back_equal(tree: Any, protocol: int) -> None:
    if protocol == 2 and "bytes" in _types(tree):
        protocol = 3  # protocol 2 has no bytes: it calls a function that makes them
    assert read_pickle(pickle.dumps(tree, protocol)) == tree


def _types(tree: Any) -> set[str]:
    children = list(tree) if isinstance(tree, list | tuple) else []
    children += [child for pair in tree.items() for child in pair] if isinstance(tree, dict) else []
    return {type(tree).__name__}.union(*map(_types, children))


def test_an_object_that_holds_itself_is_read() -> None:
    loop: list[Any] = []
    loop.append(loop)
    content = read_pickle(pickle.dumps(loop))
    assert content[0] is content


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_objects_become_placeholders(protocol: int) -> None:
    content = [
        datetime.date(2022, 2, 1),
        {1, 2},
        frozenset((3,)),
        len,
        Path("x"),
        UserError("x"),
        9,
    ]
    items = read_pickle(pickle.dumps(content, protocol))
    assert items[6] == 9
    assert items[3].name == ("builtins.len" if protocol > 2 else "__builtin__.len")
    assert {type(item) for item in items} == {Named, int}


def test_an_ordered_dict_is_a_dict() -> None:
    assert read_pickle(pickle.dumps(collections.OrderedDict(a=1), 2)) == {"a": 1}


def test_a_call_keeps_its_name_and_arguments() -> None:
    date, delta = read_pickle(pickle.dumps([datetime.date(2022, 2, 1), datetime.timedelta(3)], 2))
    assert (date.name, delta.name) == ("datetime.date", "datetime.timedelta")
    assert delta.arguments == (3, 0, 0)


def test_persistent_ids_are_kept() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("id", 5) if isinstance(value, range) else None

    blob = io.BytesIO()
    Pickler(blob, 2).dump([range(3), "x"])
    persistent, text = read_pickle(blob.getvalue())
    assert isinstance(persistent, PersistentId)
    assert (persistent.value, text) == (("id", 5), "x")


class Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_runs_nothing(protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    calls = [(os.system, f"touch {victim}"), (exec, f"open({str(victim)!r}, 'w')"), (os.mkdir, str(victim))]
    content = [Hostile(*call) for call in calls]
    try:
        assert all(isinstance(item, Named) for item in read_pickle(pickle.dumps(content, protocol)))
    except UserError:
        assert protocol < 2  # the oldest have operations that no checkpoint needs
    assert not victim.exists()
    pickle.loads(pickle.dumps(content[2], protocol))  # Python's own unpickler makes the call
    assert victim.exists()


@pytest.mark.parametrize(
    "text",
    [b"cos\nsystem\n(S'touch {}'\ntR.", b"(S'touch {}'\nios\nsystem\n.", b"(cos\nsystem\nS'touch {}'\no."],
)
def test_old_call_opcodes_run_nothing(text: bytes, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    assert isinstance(read_pickle(text.replace(b"{}", str(victim).encode())), Named)
    assert not victim.exists()


SHARED = b"\x80\x02)" + b"2\x86" * 200  # a pair of a pair of a pair, each twice the same: 2**200 leaves


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b".",
        b"\x80\x02N",
        b"\x80\x02t.",
        b"\x80\x02h\x07.",
        b"\x80\x02]N\x86R.",
        b"\x80\x02NNs.",
        b"\x80\x02}(Nu.",
        b"\x80\x02}]Ns.",
        b"\x80\x02NNa.",
        b"\x80\x02\x8bNN.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"Pid\n.",
        b"\x80\x02}" + SHARED[2:] + b"Ns.",  # as a key, whose hash visits every leaf
        pickle.dumps("x" * 2**22),
        b"\x00\xff" * 50,
    ],
)
def test_unreadable_pickles_raise_one_error(data: bytes) -> None:
    with pytest.raises(UserError) as error:
        read_pickle(data)
    assert "\n" not in str(error.value)


def test_shared_data_is_read_without_expansion() -> None:
    pair = read_pickle(SHARED + b".")
    for _ in range(200):
        assert pair[0] is pair[1]
        pair = pair[0]
    depth = 100_000
    assert isinstance(read_pickle(b"\x80\x02)" + b"\x85" * depth + b"."), tuple)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(UserError):
        read_pickle(b"\x80\x02" + data)
