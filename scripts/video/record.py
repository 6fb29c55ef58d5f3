"""Record an agent that plays, play a recording again, and render it as a film."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from srwm_rl.agents.evaluation.head_costs import HeadCost
from srwm_rl.agents.evaluation.interventions import column_part, head_part, parse_groups
from srwm_rl.agents.evaluation.recording import Array, Arrays, Choose, Introspector, collect, play
from srwm_rl.envs.levels import MAX_LEVEL
from srwm_rl.envs.make import resolve
from srwm_rl.envs.origin import versions
from srwm_rl.errors import UserError, did_you_mean, named
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.scripts.config.foreign_settings import allow_env, allow_wrappers, check_environment
from srwm_rl.scripts.config.settings import TrainConfig, Wrappers
from srwm_rl.scripts.config.tested_levels import tested_range
from srwm_rl.scripts.video.encoding import write_video
from srwm_rl.scripts.video.few_shot_film import FPS, FewShotFilm
from srwm_rl.scripts.video.film import Film
from srwm_rl.scripts.video.scene import Album, Scene
from srwm_rl.scripts.video.trace import FORMAT, About, Trace

# Settings of a scene that are those of training.
OF_SCENE = (
    *("env", "mode", "env_kwargs", "inputs", "reward_clip", "attempts", "shuffle_actions"),
    *("wrapper", "atari", "frame_stack"),
)
MAX_EPISODE = 3000  # steps of a recording whose length is not given: 200 seconds of ProcGen


def choose_scene(
    trained: TrainConfig, game: str | None = None, level: int | None = None, n_steps: int | None = None, seed: int = 0
) -> Scene:
    """Return what to record of a run: by default one episode of its first game, on the first held-out level.

    `n_steps` are played over the levels that follow `level` if an episode ends.

    Raises:
        UserError: the run was not trained on `game`.
    """
    games = resolve(trained.env).names
    if game is not None and game not in games:
        raise UserError(f"this run was not trained on {game!r}{did_you_mean(game, games)}")
    if level is None:
        level = tested_range(trained).start
    return Scene(
        game or games[0],
        level,
        min(n_steps or 1, MAX_LEVEL - level),  # an episode has at least one step
        seed,
        trained.mode,
        tuple(pair for pair in trained.env_kwargs if not pair.startswith("render_mode:")),
        trained.inputs,
        float(trained.reward_clip),
        trained.attempts,
        trained.shuffle_actions,
        trained.wrapper,
        trained.atari,
        trained.frame_stack,
    )


def record(
    policy: SRWMPolicy,
    trained: TrainConfig,
    scene: Scene,
    run: str,
    num_timesteps: int,
    n_steps: int | None = None,
    deterministic: bool = False,
    progress: bool = False,
    changed: Intervention | None = None,
    head_costs: tuple[HeadCost, ...] = (),
) -> tuple[Trace, Album]:
    """Let a policy play a scene; return the trace, and the album with what the steps looked like.

    `run` is the run's title, and `num_timesteps` the steps of its training. Without `n_steps` the scene's episode is
    played, at most `MAX_EPISODE` steps of it. `head_costs` are those of the scene's game, for the film's panel.
    """
    env, album = scene.make_with_album()
    torch.manual_seed(scene.seed)
    name, frozen = changed or Intervention("", None)
    arrays, digest = _play(env, Introspector(policy, deterministic, frozen), scene, n_steps, album, progress)
    levels = trained.levels, str(tested_range(trained))
    about = About(run, trained.core, scene.env, *levels, num_timesteps, deterministic, name)
    spaces = policy.action_space, policy.observation_space
    return Trace(FORMAT, scene, digest, *spaces, versions(scene.env), about, head_costs, arrays), album


class Intervention(NamedTuple):
    """Edits that are suppressed in a recording."""

    name: str  # for the film's title
    frozen: npt.NDArray[np.bool_] | None  # [L, S]: elements of the state that stay 0


def suppress_edits(policy: SRWMPolicy, undo: str | None, lesion: Sequence[str]) -> Intervention | None:
    """Return the intervention of columns, as query,key,beta, and heads, as 0.3, whose edits are suppressed together.

    Raises:
        UserError: the core has no such columns or heads.
    """
    parts, names = [], []
    if undo is not None:
        with named("--undo"):
            parts.append(column_part(policy, undo))
            names.append(f"edits of {', '.join(parse_groups(undo))} undone")
    for head in lesion:
        parts.append(head_part(policy, *map(int, head.split("."))))
        names.append(f"no edits in head {head}")
    return Intervention(", ".join(names), np.logical_or.reduce(parts)) if parts else None


def _play(
    env: VecEnv, choose: Choose, scene: Scene, n_steps: int | None, album: Album | None, progress: bool = False
) -> tuple[Arrays, str]:
    """Play at most `n_steps` or `MAX_EPISODE` steps, and close the environment; return a trace's arrays and digest."""
    digest, see = hashlib.sha256(), None if album is None else album.add
    with closing(env):
        steps = islice(play(env, choose, scene.levels(), digest, see), n_steps or MAX_EPISODE)
        arrays = collect(_progress(steps, "playing", "step", n_steps, progress))
    if not arrays["attempts"].any():  # the first one throughout
        del arrays["attempts"]
    return arrays, digest.hexdigest()


def check_origin(trace: Trace, path: str, env: str | None, any_version: bool, wrapper: Wrappers = ()) -> None:
    """Check that a trace's environment exists and is the recorded one; `env` and `wrapper` may be imported.

    Raises:
        UserError: the environment is missing, must not be imported, or differs from the recorded one.
    """
    scene = trace.scene
    allow_env(scene.env, env, path)
    allow_wrappers(scene.wrapper, wrapper, path)
    settings = TrainConfig(**{name: getattr(scene, name) for name in OF_SCENE})
    check_environment(settings, trace.observation_space, trace.action_space, path)
    installed = versions(scene.env)
    # Of ProcGen's distributions, two differ in their names only; the third, procgen-gym, has another version.
    if sorted(trace.versions.values()) != sorted(installed.values()) and not any_version:
        raise UserError(
            f"{path} was recorded with {_format(trace.versions)}, and here is {_format(installed)}: install that "
            "version, or try with --any-version"
        )


def _format(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "an environment of unknown version"


def replay(trace: Trace, render: bool) -> tuple[str | None, Album]:
    """Play a trace's actions in a new environment.

    Returns:
        The first difference as text, or None; and the album, which is empty unless `render`.
    """
    scene, actions = trace.scene, iter(trace.arrays["actions"])
    env, album = scene.make_with_album() if render else (scene.make(), Album())

    def choose(obs: Any, start: bool) -> tuple[Array, Arrays]:
        return next(actions)[None], {}

    arrays, digest = _play(env, choose, scene, len(trace.arrays["actions"]), album if render else None)
    return first_difference(trace, arrays, digest), album


def first_difference(trace: Trace, arrays: Arrays, digest: str) -> str | None:
    """Describe the first difference of a replay's arrays and digest from a trace; None: they are equal."""
    n_steps = min(len(arrays["rewards"]), len(trace.arrays["rewards"]))
    steps = {}
    for name, array in arrays.items():  # `links`, the observations, come first
        if name not in trace.arrays:
            continue
        differ = (trace.arrays[name][:n_steps] != array[:n_steps]).reshape(n_steps, -1).any(1)
        if differ.any():
            steps["observations" if name == "links" else name] = int(np.argmax(differ))
    if steps:
        name = min(steps, key=lambda name: steps[name])
        return f"{name} differ from step {steps[name]} on"
    if n_steps < len(trace.arrays["rewards"]):
        return f"the episodes end after step {n_steps - 1}"
    return None if digest == trace.digest else "the observations' sha256 differs"


def render(trace: Trace, album: Album, output: Path, progress: bool = False) -> int:
    """Draw a trace and write the video; return the number of frames."""
    is_few_shot = "answer" in trace.arrays
    film = FewShotFilm(trace, album) if is_few_shot else Film(trace, album)
    fps = FPS if is_few_shot else trace.scene.fps(album.has_pictures)
    n_frames = film.n_frames(fps)
    write_video(output, _progress(film.frames(fps), "drawing", "frame", n_frames, progress), n_frames, fps)
    return n_frames


def _progress(items: Iterator[Any], label: str, unit: str, total: int | None, show: bool) -> Iterator[Any]:
    """Show a progress bar, if stderr is a terminal."""
    return iter(tqdm(items, desc=label, total=total, unit=unit, disable=None if show else True, leave=False))
