"""Numbers and intervals as text."""

import pytest

from srwm_rl.scripts.evaluation.table import Number, text


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
