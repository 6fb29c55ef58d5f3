"""Level ranges, and the hash that levels are made of."""

import numpy as np
import pytest

from srwm_rl.envs.levels import MAX_LEVEL, LevelRange, check_levels, hash_integers, hash_uniform
from srwm_rl.errors import UserError


def test_parse_inverts_str():
    for text in ("0:200", "1000:1001", "all"):
        assert str(LevelRange.parse(text)) == text
    assert LevelRange.parse(" 5 : 9 ") == LevelRange(5, 9)
    assert LevelRange.parse(LevelRange(1, 2)) == LevelRange(1, 2)
    assert LevelRange.parse("all") == LevelRange(0, MAX_LEVEL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "5:",
        ":5",
        "a:b",
        "3:3",
        "9:3",
        "-1:5",
        "0:-1",
        "0:2147483648",
        "1:2:3",
        "1.5:3",
        "٣:٩",
        "--1:2",
        None,
        7,
    ],
)
def test_invalid_ranges_are_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        LevelRange.parse(text)
    assert "\n" not in str(error.value)


def test_a_range_contains_its_levels():
    levels = LevelRange(3, 6)
    assert list(levels) == [3, 4, 5]
    assert len(levels) == 3
    assert np.int64(5) in levels
    assert 6 not in levels
    assert 2 not in levels


def test_overlap_is_the_number_of_common_levels():
    assert LevelRange(0, 200).overlap(LevelRange(1000, 1200)) == 0
    assert LevelRange(0, 200).overlap(LevelRange(150, 400)) == 50
    assert LevelRange(150, 400).overlap(LevelRange(0, 200)) == 50
    assert LevelRange(0, 10).overlap(LevelRange(2, 4)) == 2


@pytest.mark.parametrize("levels", [[], [1.5], [-1], [MAX_LEVEL], [[1]], LevelRange(0, MAX_LEVEL), ["1"]])
def test_invalid_level_lists_are_refused(levels):
    with pytest.raises(UserError):
        check_levels(levels)


def test_hash_is_uniform_and_depends_on_every_key_and_their_order():
    x = hash_uniform(np.arange(20000), 7)
    assert abs(x.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.04
    assert hash_integers(1, 2) != hash_integers(2, 1)
    assert hash_integers(1, 2) != hash_integers(1, 3)
    assert hash_integers(1, np.array([2, 3]))[0] == hash_integers(1, 2)[0]


@pytest.mark.parametrize(
    ("text", "n"), [("0:200", 100), ("0:199", 100), ("0:1999", 1000), ("5:2505", 1000), ("0:200", 150)]
)
def test_levels_are_spread_over_the_whole_range(text: str, n: int) -> None:
    levels, chosen = LevelRange.parse(text), LevelRange.parse(text).spread(n)
    assert len(set(chosen)) == n
    gaps = np.diff([*chosen, levels.stop])
    assert chosen[0] == levels.start
    assert gaps.min() >= len(levels) // n
    assert gaps.max() <= -(-len(levels) // n)


def test_of_a_short_range_all_levels_are_chosen() -> None:
    assert LevelRange.parse("3:6").spread(100) == [3, 4, 5]
