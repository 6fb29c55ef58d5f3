"""Level ranges, level sampling and the hash that levels are made of."""

import numpy as np
import pytest

from srwm_rl.envs.hashing import hash_integers, hash_uniform
from srwm_rl.envs.levels import MAX_LEVEL, LevelRange, LevelSampler, check_levels
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


def test_sampled_levels_are_uniform_within_the_range():
    sampler = LevelSampler(LevelRange(10, 15), 1000, seed=3)
    levels = np.concatenate([sampler.draw(np.ones(1000, np.bool_)) for _ in range(20)])
    counts = np.bincount(levels, minlength=15)
    assert counts[:10].sum() == 0
    assert len(counts) == 15
    assert np.all(np.abs(counts[10:] / len(levels) - 0.2) < 0.02)  # 7 standard errors


def test_sampling_for_one_environment_does_not_advance_the_others():
    sampler, masked = (LevelSampler(LevelRange(0, 10**6), 3, 1) for _ in range(2))
    all_envs = np.ones(3, np.bool_)
    masked.draw(np.array([False, True, False]))
    first, second = sampler.draw(all_envs), sampler.draw(all_envs)
    assert masked.draw(all_envs).tolist() == [first[0], second[1], first[2]]


def test_hash_is_uniform_and_depends_on_every_key_and_their_order():
    x = hash_uniform(np.arange(20000), 7)
    assert abs(x.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.04
    assert hash_integers(1, 2) != hash_integers(2, 1)
    assert hash_integers(1, 2) != hash_integers(1, 3)
    assert hash_integers(1, np.array([2, 3]))[0] == hash_integers(1, 2)[0]
