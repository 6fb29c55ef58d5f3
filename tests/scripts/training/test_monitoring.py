"""Videos while training: written when due, without an effect on the weights, and never at the cost of the run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_videos_are_written_at_multiples_and_change_nothing(
    algo: str, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    av = pytest.importorskip("av")
    tiny = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    for folder, more in (("filmed", ["--video-freq", 128]), ("plain", [])):
        assert call("train", *tiny, "-n", 256, *more, "-f", tmp_path / folder).code == 0
    filmed, plain = (tmp_path / folder / f"{algo}_srwm" / "recall_1" for folder in ("filmed", "plain"))
    films = sorted((filmed / "videos").iterdir())
    assert [film.name for film in films] == ["000000000128.mp4", "000000000256.mp4"]
    with av.open(str(films[0])) as video:
        assert len(list(video.decode(video=0))) > 3
    ours, theirs = (read_file(Run.open(run).files("model")[-1])[0] for run in (filmed, plain))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_videos_beside_a_learner(call: Any, impala_argv: list[str], tmp_path: Path) -> None:
    assert call("train", *impala_argv, "-n", 640, "--video-freq", 320, "-f", tmp_path).code == 0
    assert len(list((tmp_path / "impala_srwm" / "recall_1" / "videos").iterdir())) == 2


MODULE = """
import resource

import gymnasium
import numpy as np

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

class Drawn(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fault, render_mode=None):
        self.fault, self.render_mode = fault, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.render_mode is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
        return np.ones(2, np.float32), 1.0, self.t == 7, False, {}

    def render(self):
        if self.fault == "raises":
            raise RuntimeError("no display")
        if self.fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return None if self.fault == "none" else np.zeros((64, 64, 3), np.uint8)

gymnasium.register("Drawn-v0", entry_point=Drawn)
"""


@pytest.mark.parametrize("fault", ["raises", "none", "full"])
def test_a_picture_that_cannot_be_made_costs_nothing_else(fault: str, recall_argv: list[str], tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "drawn.py").write_text(MODULE)
    argv = ["drawn:Drawn-v0" if word == "recall" else word for word in recall_argv]
    command = [sys.executable, "-m", "srwm_rl", "train", *argv, "--env-kwargs", f"fault:{fault}", "-n", "640"]
    done = subprocess.run(
        [*command, "--video-freq", "256", "-f", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=600,
    )
    assert done.returncode == 0, done
    assert "done: 640 steps" in done.stdout
    films = [file.name for file in (tmp_path / "logs" / "ppo_srwm" / "drawn+Drawn-v0_1" / "videos").iterdir()]
    if fault == "full":
        assert done.stderr.count("no video at ") == 1
        assert "srwm-rl: no video at 256 steps (File too large); training continues" in done.stderr
        assert films == []
    else:  # its observations are drawn
        assert "Drawn-v0 cannot render itself" in done.stderr
        assert ("RuntimeError: no display" if fault == "raises" else "pictures of shape ()") in done.stderr
        assert sorted(films) == ["000000000256.mp4", "000000000512.mp4"]
