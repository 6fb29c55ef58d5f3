"""The plan of a training, as `--dry-run` prints it."""

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("argv", "updates"),
    [
        (("-n", "4096", "--n-epochs", "1"), "1 of 64 environments x 64 steps, 1 epoch of 8 minibatches"),
        (("-n", "8000", "--n-epochs", "2"), "2 of 64 environments x 64 steps, 2 epochs of 8 minibatches"),
        (
            ("-n", "4096", "--algo", "impala"),
            "16 of 16 unrolls, while the actors play on; 64 environments x 16 steps at",
        ),
        (("-n", "4096", "--algo", "supervised"), "1 of 64 environments x 64 steps, by right answers"),
    ],
)
def test_it_says_what_an_update_is(call: Any, argv: tuple[str, ...], updates: str) -> None:
    plan = call("train", "--env", "recall", *argv, "--dry-run").out
    assert f"  updates   {updates}" in plan
    assert "  network   MLP 64" in plan
