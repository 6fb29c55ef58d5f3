"""`srwm-rl replay`: play a trace again, and say whether everything happens as it did."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.scripts.config.foreign_settings import allow_env, check_environment
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.video.scene import Album
from srwm_rl.scripts.video.trace import Trace, load_trace

Arg = tyro.conf.arg
PROG = "srwm-rl replay"


@dataclass(frozen=True)
class ReplayConfig:
    """Play a trace again in a fresh environment, and compare every observation and reward."""

    trace: tyro.conf.Positional[str]
    """A .npz file that srwm-rl watch --trace wrote."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """Draw the film again: .mp4 (H.264) or .gif."""
    env: str | None = None
    """The environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    any_version: bool = False
    """Play it even if the environment is of another version."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 1
    """2: tracebacks on errors."""


def main(argv: list[str]) -> int:
    """Run the command; return 0, or 1 if something happened otherwise than recorded."""
    from srwm_rl.scripts.commands.watch import film
    from srwm_rl.scripts.video.encoding import check_video

    config = parse(ReplayConfig, argv, PROG)
    if config.output is not None:
        check_video(Path(config.output))
        check_writable(Path(config.output), "-o")
    trace = load_trace(Path(config.trace))
    check_origin(trace, config)
    difference, album = replay(trace, with_pictures=config.output is not None)
    with closing(album):
        if config.output is not None and difference is None:
            film(trace, album, Path(config.output), config.progress)
    scene = trace.scene
    what = f"{scene.env}, level {scene.level}, {len(trace.arrays['rewards'])} steps"
    if difference is None:
        print(f"{what}: every observation and reward as recorded (sha256 {trace.digest[:16]})")
        return 0
    print(f"{what}: NOT as recorded: {difference}{'; no video was made' if config.output is not None else ''}")
    return 1


def check_origin(trace: Trace, config: ReplayConfig) -> None:
    """Raise a `UserError` unless the trace's environment may be imported, exists and is the one of the recording."""
    scene = trace.scene
    allow_env(scene.env, config.env, config.trace)
    settings = TrainConfig(
        env=scene.env,
        mode=scene.mode,
        env_kwargs=scene.env_kwargs,
        inputs=scene.inputs,  # type: ignore[arg-type]
        reward_clip=scene.reward_clip,
    )
    check_environment(settings, trace.observation_space, trace.action_space, config.trace)
    here = scene.versions()
    # ProcGen's distributions differ in name alone.
    if sorted(trace.versions.values()) != sorted(here.values()) and not config.any_version:
        raise UserError(
            f"{config.trace} was recorded with {_named(trace.versions)}, and here is {_named(here)}: install that "
            "version, or try with --any-version"
        )


def _named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "an environment of unknown version"


def replay(trace: Trace, with_pictures: bool) -> tuple[str | None, Album]:
    """Play a trace's actions in a fresh environment.

    Returns:
        The first difference in words, or None; and what was seen.
    """
    from srwm_rl.agents.evaluation.recording import Observer, collect, play

    env, album = trace.scene.stage() if with_pictures else (trace.scene.make(), Album(None))
    actions = iter(trace.arrays["actions"])

    def choose(obs: Any, start: bool) -> tuple[npt.NDArray[Any], None]:
        return next(actions)[None], None

    observer = Observer()

    def see(obs: Any) -> None:
        observer.see(obs)
        if with_pictures:
            album.see(obs)

    try:
        n_steps = len(trace.arrays["actions"])
        arrays = collect(islice(play(env, choose, trace.scene.levels(), see), n_steps))
    finally:
        env.close()
    return first_difference(trace, arrays, observer.links, observer.digest()), album


def first_difference(trace: Trace, arrays: dict[str, npt.NDArray[Any]], links: list[int], digest: str) -> str | None:
    """Say in words where a replay, its running digest and its digest first leave the trace; None: nowhere."""
    n_steps = min(len(arrays["rewards"]), len(trace.arrays["rewards"]))
    found = []
    for name, new in {"observations": np.array(links, np.uint64), **arrays}.items():
        old = trace.arrays["links" if name == "observations" else name]
        differ = np.flatnonzero((old[:n_steps] != new[:n_steps]).reshape(n_steps, -1).any(1))
        if len(differ):
            found.append((int(differ[0]), name))
    if found:
        step, name = min(found, key=lambda each: each[0])  # of one step, the observations first
        return f"{name} differ from step {step} on"
    if len(arrays["rewards"]) < len(trace.arrays["rewards"]):
        return f"the episodes end after step {len(arrays['rewards']) - 1}"
    return None if digest == trace.digest else "the observations' sha256 differs"
