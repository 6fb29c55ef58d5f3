"""Record an agent that plays, and render a recording as a film."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from srwm_rl.agents.evaluation.recording import Choose, Introspector, Observer, collect, play
from srwm_rl.envs.levels import MAX_LEVEL, LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.video.encoding import write_video
from srwm_rl.scripts.video.film import Film
from srwm_rl.scripts.video.panel import Arrays
from srwm_rl.scripts.video.scene import Album, Scene
from srwm_rl.scripts.video.trace import About, Trace

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
        level = LevelRange.parse(trained.eval_levels).start
    return Scene(
        game or games[0],
        level,
        min(n_steps or 1, MAX_LEVEL - level),  # an episode has at least one step
        seed,
        trained.mode,
        tuple(pair for pair in trained.env_kwargs if not pair.startswith("render_mode:")),
        trained.inputs,
        float(trained.reward_clip),
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
) -> tuple[Trace, Album]:
    """Let a policy play a scene; return the trace, and the album with what the steps looked like.

    `run` is the run's title, and `num_timesteps` the steps of its training. Without `n_steps` the scene's episode is
    played, at most `MAX_EPISODE` steps of it.
    """
    env, album = scene.make_with_album()
    torch.manual_seed(scene.seed)
    choose = Introspector(policy, deterministic)
    arrays, digest = play_scene(env, choose, scene, n_steps, album, progress)
    about = About(run, trained.core, scene.env, trained.levels, trained.eval_levels, num_timesteps, deterministic)
    return Trace(scene, arrays, digest, policy.action_space, policy.observation_space, scene.versions(), about), album


def play_scene(
    env: VecEnv, choose: Choose, scene: Scene, n_steps: int | None, album: Album | None, progress: bool = False
) -> tuple[Arrays, str]:
    """Play a scene in its environment, at most `n_steps` or `MAX_EPISODE` steps, and close it.

    Returns:
        The arrays of a trace, and its digest.
    """
    observer = Observer()

    def see(obs: Any) -> None:
        observer.see(obs)
        if album is not None:
            album.add(obs)

    try:
        steps = play(env, choose, scene.levels(), see)
        arrays = collect(_progress(islice(steps, n_steps or MAX_EPISODE), "playing", "step", n_steps, progress))
    finally:
        env.close()
    return {"links": np.array(observer.links, np.uint64), **arrays}, observer.digest()


def render(trace: Trace, album: Album, output: Path, progress: bool = False) -> int:
    """Draw a trace and write the video; return the number of frames."""
    film, fps = Film(trace, album), trace.scene.fps(album.has_pictures)
    n_frames = film.n_frames(fps)
    write_video(output, _progress(film.frames(fps), "drawing", "frame", n_frames, progress), n_frames, fps)
    return n_frames


def _progress(items: Iterator[Any], label: str, unit: str, total: int | None, show: bool) -> Iterator[Any]:
    """Show a progress bar, if stderr is a terminal."""
    return iter(tqdm(items, desc=label, total=total, unit=unit, disable=None if show else True, leave=False))
