"""ProcGen's packages behind one interface: the same levels, states and rewards, in eleven games the same frames."""

import json
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from srwm_rl.envs.procgen import simulator
from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.envs.procgen.games import GAMES
from srwm_rl.envs.procgen.simulator import find_distribution, installed_distribution, why_missing
from srwm_rl.errors import UserError

# Digests of 100 steps with procgen-mirror 0.10.7; `python tests/envs/procgen/test_simulator.py` prints those of here.
RECORDED = Path(__file__).with_name("recorded_steps.json")
DRAWN_DIFFERENTLY = {"bossfight", "caveflyer", "coinrun", "jumper", "ninja"}  # by procgen-gym 0.1.1
PLAYED = [*GAMES, "coinrun,maze,bigfish"]


def digest(*arrays: Any) -> str:
    data = b"".join(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes() for array in arrays)
    return sha256(data).hexdigest()[:16]


def digests(games: str) -> dict[str, str]:
    """Return digests of what a batch gives in 100 steps, after a reset to levels, and after a partial reset."""
    env, actions = ProcgenBatch(games, 6, "0:50", seed=3), np.random.default_rng(0).integers(0, 15, (100, 6))
    first = env.reset()
    steps = [env.step(row) for row in actions]
    result = {
        "levels": digest(*(step.info["level_seed"] for step in steps)),
        "rewards": digest(*(step.rewards for step in steps), *(step.terminated for step in steps)),
        "states": digest(*env.get_state()["states"]),
        "frames": digest(first, *(step.obs for step in steps)),
    }
    env.reset(levels=np.arange(100, 106))
    result["chosen levels"] = digest(env.level_seed(), *env.get_state()["states"])
    env.reset(mask=np.arange(6) % 3 == 0)
    result["partial reset"] = digest(*env.get_state()["states"])
    env.close()
    return result


@pytest.mark.skipif(find_distribution() is None, reason="ProcGen is not installed")
@pytest.mark.parametrize("games", PLAYED)
def test_every_package_plays_as_procgen_mirror_does(games: str) -> None:
    recorded, here = json.loads(RECORDED.read_text())[games], digests(games)
    if installed_distribution().module == "procgen_gym" and set(games.split(",")) & DRAWN_DIFFERENTLY:
        assert here.pop("frames") != recorded.pop("frames"), "no longer drawn differently"
    assert here == recorded


@pytest.mark.skipif(find_distribution() is None, reason="ProcGen is not installed")
def test_a_state_of_the_other_package_is_continued_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    env, actions = ProcgenBatch("maze", 2, "0:50", seed=3), np.full((20, 2), 7)
    env.reset()
    state = env.get_state()
    steps = [env.step(row).rewards for row in actions]
    other = "procgen_gym" if env.distribution.module == "procgen" else "procgen"
    for saved in ({**state, "library": other}, state):
        env.set_state(saved)
        assert all(np.array_equal(env.step(row).rewards, rewards) for row, rewards in zip(actions, steps, strict=True))
    assert caplog.text.count("not exactly the same run") == 1
    assert f"with the package {other} and go on with {env.distribution}" in caplog.text
    earlier = {key: value for key, value in state.items() if key != "library"}
    caplog.clear()
    env.set_state(earlier)  # of a version that knew one package
    assert ("not exactly" in caplog.text) == (env.distribution.module == "procgen_gym")
    with pytest.raises(UserError, match="no package of ProcGen"):
        env.set_state({**state, "library": "other"})
    env.close()


def test_the_distribution_of_this_python_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "find_spec", lambda name: None)
    assert find_distribution() is None
    with pytest.raises(UserError):
        installed_distribution()
    name = {10: "procgen", 11: "procgen-mirror", 12: "procgen-mirror", 13: "procgen-gym"}.get(sys.version_info[1])
    if name is not None and sys.platform == "linux":
        assert re.search(rf"; run: pip install '{name}[<>=]", why_missing())
    texts = [text for text in simulator.metadata.requires("srwm-rl") or () if Requirement(text).name != name]
    monkeypatch.setattr(simulator.metadata, "requires", lambda package: texts)
    assert "no wheels for this Python" in why_missing()


if __name__ == "__main__":
    print(json.dumps({games: digests(games) for games in PLAYED}, indent=1))
