"""Sections of a page: which runs stand in one, as seeds of the same settings."""

from dataclasses import replace
from typing import Any

import pytest

from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.reports.sections import settings_key


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 7}, True),
        ({"supervise": True}, True),
        ({"hang_seconds": 9}, True),
        ({"track": "wandb"}, True),
        ({"video_freq": 100}, True),
        ({"profile": True}, True),
        ({"config": "settings.yml"}, True),
        ({"learning_rate": 0.5}, False),
        ({"n_timesteps": 5}, False),
        ({"init_from": "zoo:recall"}, False),
    ],
)
def test_runs_that_differ_in_what_does_not_change_the_agent_are_one(change: dict[str, Any], same: bool) -> None:
    trained = defaults("recall", None)
    assert (settings_key(replace(trained, **change)) == settings_key(trained)) == same
