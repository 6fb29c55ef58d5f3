"""Videos while training: written when due, without an effect on the weights."""

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
