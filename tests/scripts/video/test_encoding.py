"""Video files: complete or absent, with the right speed."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srwm_rl.scripts.video.encoding import write_video


def test_an_interrupted_video_leaves_no_file(tmp_path: Path) -> None:
    def two() -> Any:
        yield np.zeros((64, 64, 3), np.uint8)
        raise KeyboardInterrupt

    for name in ("a.mp4", "a.gif"):
        with pytest.raises(KeyboardInterrupt):
            write_video(tmp_path / name, two(), 5, 15)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_video_that_the_disk_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a disk with room for 2,000 bytes
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_video(tmp_path / name, iter(frames), 5, 15)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_gif_delays_do_not_drift(tmp_path: Path) -> None:
    pictures = (np.full((8, 8, 3), 20 * t, np.uint8) for t in range(10))
    write_video(tmp_path / "a.gif", pictures, 10, 15)
    with Image.open(tmp_path / "a.gif") as gif:
        delays = []
        for t in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(t)
            delays.append(gif.info["duration"])
    assert set(delays) == {60, 70}
    assert sum(delays) == 670
