"""`srwm-rl watch`: a film of an agent that plays, beside a picture of its network editing itself."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from msgspec import Meta

from srwm_rl.envs.levels import MAX_LEVEL
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device, check_writable, parse, warn
from srwm_rl.scripts.config.settings import Seed, Wrappers, check_bounds, check_wrappers
from srwm_rl.scripts.evaluation.protocol import EvalConfig, check_lesions
from srwm_rl.storage.run_folder import title_of
from srwm_rl.zoo import DEMO, PREFIX

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.head_costs import HeadCost

Arg = tyro.conf.arg
MAX_STEPS = 100_000


@dataclass(frozen=True)
class WatchConfig:
    """Film an agent that plays a level, beside a picture of its network editing itself."""

    run: tyro.conf.Positional[str | None] = None
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest; zoo:NAME one that comes with
    the package."""
    demo: bool = False
    """Film an agent that comes with the package: hidden_controls, or the one that is named in RUN's place."""
    level: Annotated[int, Meta(ge=0, le=MAX_LEVEL - 1)] | None = None
    """The level to play. Default: the first held-out one."""
    game: str | None = None
    """Which of the run's games. Default: its first."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """The video: .mp4 (H.264) or .gif. Default: <run>-<game>-<level>.mp4 in this folder."""
    gif: bool = False
    """Make a GIF instead of an MP4."""
    trace: str | None = None
    """Write a recording to this .npz file too, for srwm-rl replay."""
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] | None = None
    """Play exactly so many steps, over the levels that follow if an episode ends. Default: one episode, at most 3,000
    steps."""
    deterministic: bool = False
    """Take the most probable action instead of sampling one."""
    undo: str | None = None
    """Undo the edits of these columns of every head after every step: of y, query, key, beta, with commas."""
    lesion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Leave out the edits of one head, layer.head, counted from 0; repeat the option for further heads."""
    rank_heads: bool = False
    """Rank the heads by what lesioning each costs on held-out levels, unless the run folder holds that already
    (srwm-rl report stores it). Those of a run on a built-in task are ranked anyway."""
    seed: Seed = 0
    """For sampled actions."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The run's environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    wrapper: tyro.conf.UseAppendAction[Wrappers] = ()
    """The wrappers that the run was trained with, as in srwm-rl train."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 1
    """0: errors only, 1: what was written, 2: tracebacks too."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_wrappers(self.wrapper)
        if self.gif and self.output is not None and Path(self.output).suffix.lower() != ".gif":
            raise UserError(f"--gif makes a GIF, and -o names {self.output}: leave one of them out")
        if self.trace is not None and Path(self.trace).suffix.lower() != ".npz":
            raise UserError(f"cannot write {self.trace}: a trace's name ends in .npz")
        check_lesions(self.lesion)
        if self.run is None and not self.demo:
            raise UserError("name a run folder: srwm-rl watch RUN; or film an agent of the zoo: srwm-rl watch --demo")

    def path(self) -> str:
        """Return the run folder, model file or zoo:NAME to film."""
        name = self.run or DEMO
        return f"{PREFIX}{name.removeprefix(PREFIX)}" if self.demo else name


def ranked_heads(config: WatchConfig, game: str, play: bool) -> tuple[HeadCost, ...]:
    """Return what lesioning each head costs; () with a warning where the run has no held-out levels to play."""
    from srwm_rl.scripts.evaluation.head_costs import head_costs

    options = {
        name: getattr(config, name) for name in ("core", "env", "wrapper", "device", "progress", "deterministic")
    }
    try:
        costs = head_costs(EvalConfig(run=config.path(), **options), play)
    except UserError as error:
        warn(f"the heads are not ranked: {error}")
        return ()
    return () if costs is None else tuple(costs.ranked(game))


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(WatchConfig, argv, "srwm-rl watch")
    from srwm_rl.scripts.evaluation.load_agent import open_model
    from srwm_rl.scripts.video.encoding import check_video
    from srwm_rl.scripts.video.record import choose_scene, record, render, suppress_edits

    agent, trained = open_model(config.path(), config.core, config.env, check_device(config.device), config.wrapper)
    changed = suppress_edits(agent.policy, config.undo, config.lesion)
    scene, title = choose_scene(trained, config.game, config.level, config.steps, config.seed), title_of(config.path())
    name = re.sub(r"[^\w+.-]", "-", f"{title}-{scene.env}-{scene.level}")
    output = Path(config.output or f"{name}.{'gif' if config.gif else 'mp4'}")
    check_video(output)
    check_writable(output, "-o")
    check_writable(config.trace, "--trace")
    trace, album = record(
        *(agent.policy, trained, scene, title, agent.num_timesteps, config.steps),
        deterministic=config.deterministic or trained.algo == "supervised",
        progress=config.progress,
        changed=changed,
        head_costs=ranked_heads(config, scene.env, config.rank_heads or scene.kind() == "task"),
    )
    with closing(album):
        if config.trace is not None:
            trace.save(Path(config.trace))
        n_frames = render(trace, album, output, config.progress)
    if config.verbose:
        print(f"{output}: {n_frames} frames, {output.stat().st_size / 1e6:.1f} MB; {trace.describe()}")
        if config.trace is not None:
            print(f"{config.trace}: {Path(config.trace).stat().st_size / 1000:.0f} kB, for srwm-rl replay")
    return 0
