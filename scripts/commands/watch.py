"""`srwm-rl watch`: a film of an agent that plays, and beside it of the network that edits itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import is_zipfile

import numpy as np
import tyro

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import allow_core, check_device, check_writable, parse
from srwm_rl.scripts.commands.eval import EvalConfig
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.load_agent import open_agent
from srwm_rl.scripts.video.scene import Album, Scene, fps_of
from srwm_rl.scripts.video.trace import Trace
from srwm_rl.storage.run_folder import title_of

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.recording import Played
    from srwm_rl.storage.model_file import Agent

Arg = tyro.conf.arg
PROG = "srwm-rl watch"
MAX_STEPS = 100_000
LONGEST = 3000  # steps, where the user names no number: 200 seconds of ProcGen


@dataclass(frozen=True)
class WatchConfig:
    """Film an agent while it plays a level, and beside it what its network does to itself."""

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest."""
    level: int | None = None
    """The level to play. Default: the first held-out one."""
    game: str | None = None
    """Which of the run's games. Default: its first."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """The video: .mp4 (H.264) or .gif. Default: <run>-<game>-<level>.mp4 in this folder."""
    gif: bool = False
    """Make a GIF instead of an MP4."""
    trace: str | None = None
    """Write what happened to this .npz file too, for srwm-rl replay."""
    steps: int | None = None
    """Play exactly so many steps, over the levels that follow if an episode ends. Default: one episode, at most 3,000
    steps."""
    deterministic: bool = False
    """Take the most probable action instead of sampling one."""
    seed: int = 0
    """Of sampled actions."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The run's environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 1
    """0: errors only, 1: what was written, 2: tracebacks too."""

    def __post_init__(self) -> None:
        from srwm_rl.envs.levels import MAX_LEVEL

        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"--steps must lie in 1 .. {MAX_STEPS}, not {self.steps}")
        if self.level is not None and not 0 <= self.level < MAX_LEVEL:
            raise UserError(f"--level must lie in 0 .. {MAX_LEVEL - 1}, not {self.level}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must lie in [0, {2**31 - 1}], not {self.seed}")
        if self.gif and self.output is not None and Path(self.output).suffix.lower() != ".gif":
            raise UserError(f"--gif makes a GIF, and -o names {self.output}: leave one of them out")
        if self.trace is not None and Path(self.trace).suffix.lower() != ".npz":
            raise UserError(f"cannot write {self.trace}: a trace's name ends in .npz")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    from srwm_rl.scripts.video.encoding import check_video

    config = parse(WatchConfig, argv, PROG)
    if config.output is not None:  # before the model is loaded and the game is played
        check_video(Path(config.output))
        check_writable(Path(config.output), "-o")
    if config.trace is not None:
        check_writable(Path(config.trace), "--trace")
    agent, trained = _open(config)
    scene = choose_scene(config, trained)
    output = _default_output(config, scene) if config.output is None else Path(config.output)
    check_video(output)
    check_writable(output, "-o")
    trace, album = record(agent, scene, describe(config, trained, agent, scene), config)
    with closing(album):
        if config.trace is not None:
            trace.save(Path(config.trace))
        n_frames = film(trace, album, output, config.progress)
    if config.verbose:
        print(_summary(trace, output, n_frames))
        if config.trace is not None:
            print(f"{config.trace}: {Path(config.trace).stat().st_size / 1000:.0f} kB, for srwm-rl replay")
    return 0


def _open(config: WatchConfig) -> tuple[Agent, TrainConfig]:
    from srwm_rl.storage.model_file import Agent

    if config.core is not None:
        allow_core(config.core, config.core)
    path = Path(config.run)
    if path.is_file() and is_zipfile(path):
        raise UserError(f"{path} is a zip; give a run folder, or a model file from its checkpoints folder")
    agent, trained, _ = open_agent(EvalConfig(run=config.run, env=config.env), check_device(config.device))
    assert isinstance(agent, Agent)  # only a zip holds another
    return agent, trained


def choose_scene(config: WatchConfig, trained: TrainConfig) -> Scene:
    """Return what to play.

    Raises:
        UserError: a game that the run does not have.
    """
    from srwm_rl.envs.levels import MAX_LEVEL, LevelRange
    from srwm_rl.envs.make import resolve

    games = resolve(trained.env).names
    if config.game is not None and config.game not in games:
        hint = did_you_mean(config.game, games)
        raise UserError(f"this run was not trained on {config.game!r}{hint}")
    level = config.level if config.level is not None else LevelRange.parse(trained.eval_levels).start
    return Scene(
        config.game or games[0],
        level,
        min(config.steps or 1, MAX_LEVEL - level),  # an episode has one step at least
        config.seed,
        trained.mode,
        tuple(each for each in trained.env_kwargs if not each.startswith("render_mode:")),
        trained.inputs,
        float(trained.reward_clip),
    )


def _default_output(config: WatchConfig, scene: Scene) -> Path:
    name = f"{title_of(config.run)}-{scene.env}-{scene.level}"
    safe = "".join(each if each.isalnum() or each in "-_+." else "-" for each in name)
    return Path(f"{safe}.{'gif' if config.gif else 'mp4'}")


def describe(config: WatchConfig, trained: TrainConfig, agent: Agent, scene: Scene) -> dict[str, Any]:
    """Return what the film's titles say of the run."""
    return {
        "run": title_of(config.run),
        "core": trained.core,
        "game": scene.env,
        "num_timesteps": agent.num_timesteps,
        "deterministic": config.deterministic,
        "levels": trained.levels,
        "eval_levels": trained.eval_levels,
    }


def say_level(level: int, about: dict[str, Any]) -> str:
    """Say a level, and what it is to the agent."""
    from srwm_rl.envs.levels import LevelRange

    kinds = {"training level": about["levels"], "held-out level": about["eval_levels"]}
    kind = next((kind for kind, text in kinds.items() if level in LevelRange.parse(text)), "unseen level")
    return f"{kind} {level}"


def record(agent: Agent, scene: Scene, about: dict[str, Any], config: WatchConfig) -> tuple[Trace, Album]:
    """Play a scene with an agent and keep everything."""
    import torch

    from srwm_rl.agents.evaluation.recording import Introspector, Observer, collect, play

    env, album = scene.stage()
    try:
        observer = Observer()

        def see(obs: Any) -> None:
            observer.see(obs)
            album.see(obs)

        torch.manual_seed(config.seed)
        choose = Introspector(agent.policy, config.deterministic)
        steps = play(env, choose, scene.levels(), see)
        arrays = collect(_shown(islice(steps, config.steps or LONGEST), config))
    finally:
        env.close()
    arrays["links"] = np.array(observer.links, np.uint64)
    policy = agent.policy
    spaces = policy.action_space, policy.observation_space
    return Trace(scene, arrays, observer.digest(), *spaces, scene.versions(), about), album


def _shown(steps: Iterator[Played], config: WatchConfig) -> Iterator[Played]:
    from tqdm.auto import tqdm

    quiet = None if config.progress else True  # None: quiet where stderr is no terminal
    return iter(tqdm(steps, desc="playing", total=config.steps, unit="step", disable=quiet, leave=False))


def film(trace: Trace, album: Album, output: Path, progress: bool) -> int:
    """Draw a trace and write the video; return the number of frames."""
    from tqdm.auto import tqdm

    from srwm_rl.scripts.video.encoding import write_video
    from srwm_rl.scripts.video.film import Film, Titles

    about = trace.about
    actions = "most probable actions" if about["deterministic"] else "sampled actions"
    titles = Titles(
        about["game"],
        lambda level: say_level(level, about),
        f"{about['run']}, core {about['core']}, {about['num_timesteps']:,} steps of training, {actions}",
    )
    is_procgen = trace.scene.kind() == "procgen"
    picture = album.picture()
    made = Film(trace.arrays, titles, picture, album.observations(), trace.action_space, is_procgen)
    fps = fps_of(trace.scene, picture is not None)
    quiet = None if progress else True
    count = made.count(fps)
    frames = tqdm(made.frames(fps), desc="drawing", total=count, unit="frame", disable=quiet, leave=False)
    write_video(output, iter(frames), count, fps)
    return count


def _summary(trace: Trace, output: Path, n_frames: int) -> str:
    arrays = trace.arrays
    n_episodes = int(arrays["starts"].sum())
    told = arrays["solved"][arrays["dones"] & (arrays["solved"] >= 0)]
    solved = f", {int(told.sum())} of {len(told)} solved" if len(told) else ""
    cut = "" if arrays["dones"][-1] else ", the last one cut short"
    size = output.stat().st_size / 1e6
    where = f"{trace.about['game']}, {say_level(trace.scene.level, trace.about)}"
    played = f"{len(arrays['rewards'])} steps, {n_episodes} episode(s){cut}{solved}, reward {arrays['rewards'].sum():g}"
    return f"{output}: {n_frames} frames, {size:.1f} MB; {where}, {played} in all"
