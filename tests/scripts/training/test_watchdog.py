"""The watchdog's report of environments that hang."""

from typing import Any

from srwm_rl.envs import GroupedVecEnv, make_vec_env
from srwm_rl.scripts.training.watchdog import Watchdog


def test_every_group_is_named_once(tmp_path: Any) -> None:
    env = GroupedVecEnv([make_vec_env("recall", 2, f"{level}:{level + 1}", 0) for level in (41, 52)])
    watchdog = Watchdog(tmp_path, 0)
    watchdog.locals = {}
    watchdog.model = type("Model", (), {"get_env": lambda self: env})()
    report = watchdog._places()
    assert report.count("the environments are in") == 2
    for level in (41, 52):
        assert f"recall level {level}, recall level {level}" in report
