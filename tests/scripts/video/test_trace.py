"""Traces; how they are read back is tested with `srwm-rl replay`."""

from srwm_rl.scripts.video.trace import About


def test_levels_are_described_by_their_split() -> None:
    about = About("run", "srwm", "maze", "0:200", "1000:1200", 64, False)
    assert [about.describe_level(level) for level in (0, 199, 200, 1000, 1200)] == [
        "training level 0",
        "training level 199",
        "unseen level 200",
        "held-out level 1000",
        "unseen level 1200",
    ]
