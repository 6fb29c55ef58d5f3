"""`srwm-rl replay`: play a trace again, and compare every step with it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.scripts.config.settings import Wrappers, check_wrappers

Arg = tyro.conf.arg


@dataclass(frozen=True)
class ReplayConfig:
    """Play a trace again in a new environment, and compare every observation and reward."""

    trace: tyro.conf.Positional[str]
    """A .npz file that srwm-rl watch --trace wrote."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """Draw the film again: .mp4 (H.264) or .gif."""
    env: str | None = None
    """The environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    wrapper: tyro.conf.UseAppendAction[Wrappers] = ()
    """The wrappers that it was recorded with, as in srwm-rl train."""
    any_version: bool = False
    """Play it even if the environment is of another version."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        check_wrappers(self.wrapper)


def main(argv: list[str]) -> int:
    """Run the command; return 0, or 1 if a step differs from the recorded one."""
    config = parse(ReplayConfig, argv, "srwm-rl replay")
    from srwm_rl.scripts.video.encoding import check_video
    from srwm_rl.scripts.video.record import check_origin, render, replay
    from srwm_rl.scripts.video.trace import load_trace

    output = None if config.output is None else Path(config.output)
    if output is not None:
        check_video(output)
        check_writable(output, "-o")
    trace = load_trace(Path(config.trace))
    check_origin(trace, config.trace, config.env, config.any_version, config.wrapper)
    difference, album = replay(trace, render=output is not None)
    with closing(album):
        if output is not None and difference is None:
            render(trace, album, output, config.progress)
    what = f"{trace.scene.env}, level {trace.scene.level}, {len(trace.arrays['rewards'])} steps"
    if difference is None:
        print(f"{what}: every observation and reward as recorded (sha256 {trace.digest[:16]})")
        return 0
    print(f"{what}: NOT as recorded: {difference}{'; no video was made' if output is not None else ''}")
    return 1
