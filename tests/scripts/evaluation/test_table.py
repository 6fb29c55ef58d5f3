"""Numbers and intervals as text."""

import pytest

from srwm_rl.scripts.evaluation.table import Number, attempt_rows, text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.5, "0.50"),
        ({"mean": 0.5, "low": 0.25, "high": 1.0}, "0.50 [0.25, 1.00]"),
        ({"mean": 0.5, "low": None, "high": 1.0}, "0.50 [?, 1.00]"),
        ({"mean": 0.5, "low": None, "high": None}, "0.50"),  # of a single seed or level
    ],
)
def test_an_interval_is_shown_if_it_is_known(value: Number, expected: str) -> None:
    assert text(value) == expected


@pytest.mark.parametrize(
    ("n", "shown"),
    [(6, [1, 2, 3, 4, 5, 6]), (7, [1, 2, 3, 4, 5, 7]), (8, [1, 2, 3, 4, 5, 8]), (20, [1, 2, 3, 4, 11, 20])],
)
def test_of_many_attempts_the_first_a_middle_one_and_the_last_are_shown(n: int, shown: list[int]) -> None:
    interval = {"mean": 1.0, "low": None, "high": None}
    row = {"split": "held-out", "game": "recall", "levels": 9, "return": [interval] * n}
    head, *_ = attempt_rows({"return_by_attempt": [row]})
    assert head[3:] == [f"attempt {k} of {n}" for k in shown]
