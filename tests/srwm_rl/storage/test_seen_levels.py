"""The record of the levels played: exact, of bounded size, marked where incomplete, checked when it is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import UserError
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file
from srwm_rl.storage.seen_levels import MAX_MAPPED, MAX_OTHERS, SeenLevels

ALL = (0, 2**31 - 1)


def through_a_file(record: SeenLevels, path: Path) -> SeenLevels:
    arrays, tree = pack(record.to_tree())
    write_file(path, arrays, {"tree": tree})
    arrays, meta = read_file(path)
    return SeenLevels.from_tree(unpack(arrays, meta["tree"]), "file")


@pytest.mark.parametrize("levels", [(0, 200), (17, 1017), (0, MAX_MAPPED), (5, 5 + MAX_MAPPED + 1), ALL])
def test_the_levels_played_are_recorded_exactly(levels: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    record = SeenLevels(*levels)
    played = {
        game: {int(level) for level in rng.integers(*levels, 150)} | {min(levels[1] + 3, 2**31 - 1)}
        for game in ("a", "b/c-v0")
    }
    for game, seeds in played.items():
        for level in [*seeds, *seeds]:
            record.add(game, level)
    for same in (record, through_a_file(record, tmp_path / "record")):
        for game, seeds in played.items():
            assert same.is_complete(game)
            assert len(same.games[game]) == len(seeds)
            assert set(same.among(game, [*seeds, *(level + 1 for level in seeds)])) >= seeds
            assert set(same.among(game, range(levels[0], levels[0] + 5000))) == {
                x for x in seeds if x < levels[0] + 5000
            }
            assert (same.games[game].low, same.games[game].high) == (min(seeds), max(seeds))
        assert not same.is_complete("never played")
        assert same.among("never played", range(200)) == []


def test_a_restored_record_continues_as_an_uninterrupted_one(tmp_path: Path) -> None:
    levels = np.random.default_rng(1).integers(0, 500, 300).tolist()
    whole, first = SeenLevels(0, 300), SeenLevels(0, 300)
    for level in levels:
        whole.add("a", level)
    for level in levels[:150]:
        first.add("a", level)
    second = through_a_file(first, tmp_path / "record")
    for level in levels[150:]:
        second.add("a", level)
    (expected, tree), (arrays, restored_tree) = pack(whole.to_tree()), pack(second.to_tree())
    assert tree == restored_tree
    assert expected.keys() == arrays.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_captured_tree_does_not_change_with_the_record() -> None:
    record = SeenLevels(0, 20)
    record.add("a", 3)
    arrays, tree = pack(record.to_tree())
    before = {name: array.copy() for name, array in arrays.items()}
    for level in (4, 5000):
        record.add("a", level)
    assert tree == pack(record.to_tree())[1] | tree
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])
    assert record.among("a", [3, 4, 5, 5000]) == [3, 4, 5000]


def test_a_record_is_bounded_and_marked_incomplete_beyond_its_size(tmp_path: Path) -> None:
    record = SeenLevels(*ALL)
    for level in range(0, 3 * MAX_OTHERS, 3):
        record.add("a", level)
    assert record.is_complete("a")
    for level in (1, 2_000_000_000):
        record.add("a", level)
    for same in (record, through_a_file(record, tmp_path / "record")):
        assert not same.is_complete("a")
        assert len(same.games["a"]) == MAX_OTHERS
        assert (same.games["a"].low, same.games["a"].high) == (0, 2_000_000_000)
        assert same.among("a", [0, 1, 3]) == [0, 3]
    assert (tmp_path / "record").stat().st_size < 600_000
    full = SeenLevels(0, MAX_MAPPED)
    full.add("a", 1)
    through_a_file(full, tmp_path / "full")
    assert (tmp_path / "full").stat().st_size < 150_000


def test_levels_it_cannot_hold_mark_the_record_incomplete(tmp_path: Path) -> None:
    for name, level in (("a", -1), ("a", 2**31), ("a", 1.5), ("", 3), ("x" * 300, 3)):
        record = SeenLevels(0, 10)
        for seed in (1, 2):
            record.add("b", seed)
        record.add(name, level)  # type: ignore[arg-type]
        same = through_a_file(record, tmp_path / "record")
        assert same.among("b", range(10)) == [1, 2]
        assert not same.is_complete(name)
    for i in range(300):
        record.add(f"game {i}", 3)
    assert not through_a_file(record, tmp_path / "record").is_complete("b")


def test_a_record_started_after_the_first_step_is_never_complete(tmp_path: Path) -> None:
    record = SeenLevels(0, 10, complete=False)
    record.add("a", 1)
    assert not record.is_complete("a")
    assert not through_a_file(record, tmp_path / "record").is_complete("a")


def game(**changes: Any) -> Any:
    bits = np.packbits(np.arange(10) % 2 == 1)  # 1, 3, 5, 7, 9
    whole = {"map": bits, "others": np.array([30, 40]), "complete": True, "low": 1, "high": 40}
    return {"start": 0, "stop": 10, "complete": True, "games": {"a": {**whole, **changes}}}


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {},
        {**game(), "more": 1},
        {**game(), "start": -1},
        {**game(), "start": True},
        {**game(), "stop": 30},
        {**game(), "stop": MAX_MAPPED + 1},
        {**game(), "complete": 1},
        {**game(), "games": {"a": None}},
        {**game(), "games": {"": game()["games"]["a"]}},
        {**game(), "games": {f"game {i}": game()["games"]["a"] for i in range(300)}},
        game(map=None),
        game(map=np.zeros(2, np.float32)),
        game(map=np.zeros(3, np.uint8)),
        game(map=np.full(2, 255, np.uint8)),
        game(others=np.array([40, 40])),
        game(others=np.array([5, 40])),
        game(others=np.array([-1, 40])),
        game(others=np.array([30, 2**31]), high=2**31),
        game(others=np.array([30.0, 40.0])),
        game(others=np.array([[30, 40]])),
        game(others=np.arange(10, 11 + MAX_OTHERS), high=10 + MAX_OTHERS),
        game(low=0),
        game(high=41),
        game(low=True),
        game(complete=False, low=2),
        game(complete=False, high=39),
        game(complete=None),
        game(map=np.zeros(2, np.uint8), others=np.zeros(0, np.int64), low=-1, high=-1),
    ],
)
def test_inconsistent_records_are_refused(tree: Any) -> None:
    assert SeenLevels.from_tree(game(), "that file").among("a", range(50)) == [1, 3, 5, 7, 9, 30, 40]
    assert not SeenLevels.from_tree(game(complete=False, low=0, high=50), "that file").is_complete("a")
    with pytest.raises(UserError, match="that file is damaged: its record of the levels played"):
        SeenLevels.from_tree(tree, "that file")


def test_a_record_includes_another_one() -> None:
    ours, theirs = SeenLevels(0, 10), SeenLevels(100, 110)
    for level in (3, 5, 105):
        ours.add("a", level)
    for level in (5, 104, 105, 999):
        theirs.add("a", level)
    theirs.add("b", 7)
    ours.include(theirs)
    assert ours.among("a", range(2000)) == [3, 5, 104, 105, 999]
    assert (len(ours.games["a"]), ours.games["a"].low, ours.games["a"].high) == (5, 3, 999)
    assert ours.among("b", range(2000)) == [7]
    assert ours.is_complete("a")
    assert ours.is_complete("b")
    assert theirs.among("a", range(100)) == [5]  # unchanged


def test_a_record_that_includes_an_incomplete_or_unknown_one_is_incomplete(tmp_path: Path) -> None:
    ours, theirs = SeenLevels(0, 10), SeenLevels(0, 10)
    ours.add("a", 3)
    for level in range(100, 101 + MAX_OTHERS):
        theirs.add("a", level)
    assert not theirs.is_complete("a")
    ours.include(theirs)
    ours.add("b", 1)
    assert (ours.games["a"].low, ours.games["a"].high) == (3, 100 + MAX_OTHERS)
    same = through_a_file(ours, tmp_path / "record")
    assert not same.is_complete("a")
    assert same.is_complete("b")
    ours.include(None)
    assert not ours.is_complete("b")
