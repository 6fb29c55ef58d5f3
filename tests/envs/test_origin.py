"""The package that an environment comes from."""

import sys
from importlib.metadata import version
from pathlib import Path

import gymnasium
import pytest

from srwm_rl.envs.origin import versions
from srwm_rl.envs.procgen import simulator
from srwm_rl.envs.procgen.simulator import find_distribution


def test_the_distribution_is_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions("recall") == {}
    assert versions("CartPole-v1") == {"gymnasium": version("gymnasium")}
    distribution = find_distribution()
    for games in ("maze", "coinrun,maze", "paper6"):
        expected = {} if distribution is None else {distribution.name: distribution.version}
        assert versions(games) == expected
    code = "import gymnasium\ngymnasium.register('OfAModule-v0', entry_point=lambda: None)\n"
    (tmp_path / "origin_of_a_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert versions("origin_of_a_module:OfAModule-v0") == {}  # no distribution
    gymnasium.registry.pop("OfAModule-v0")
    sys.modules.pop("origin_of_a_module")


def test_procgen_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "find_spec", lambda name: None)
    assert versions("maze") == {}
