"""Callbacks of a training run: statistics of the edits, evaluations, the best model and videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, play_levels
from srwm_rl.agents.run.callbacks import (
    AttemptReturns,
    EditStatsCallback,
    HeldOutEvalCallback,
    LevelRecorder,
    PeriodicCallback,
    TrainingReturn,
)
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env, resolve
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.training.checkpoints import Session
from srwm_rl.scripts.video.encoding import check_video
from srwm_rl.scripts.video.record import choose_scene, record, render

VIDEO_STEPS = 150  # ten seconds of ProcGen
MAX_EVAL_ENVS = 64


def make_callbacks(session: Session, heartbeat: Callable[[], None]) -> list[BaseCallback]:
    """Return the callbacks that log `srwm/` and, with --eval-freq, `eval_train/`, `eval_test/` and `eval/gap`.

    They also update the session's best model, at the end of a rollout and before the next update: by the return on
    held-out levels with --eval-freq, else by the last 100 training episodes. It must be higher than the best one by
    more than the standard error of their difference (`BestModelTracker`). Both are independent of when checkpoints are
    written, so that a resumed run ends with the same best model. `heartbeat` is called at the end of every episode of
    an evaluation.
    """
    config, model, best_model = session.config, session.model, session.best_model
    plays = {
        split: partial(_play, session, LevelRange.parse(levels).spread(config.eval_episodes), heartbeat)
        for split, levels in (("train", config.levels), ("test", config.eval_levels))
    }
    of = f"mean return of the last {model._stats_window_size} training episodes"
    if config.eval_freq:
        n_levels = min(config.eval_episodes, len(LevelRange.parse(config.eval_levels)))
        of = f"mean return on {n_levels} held-out levels of {config.eval_levels}"

    def update(score: float, error: float) -> None:
        # Evaluations play the learner's weights, which do not change during a callback.
        policy = model.policy if config.eval_freq else model.acting_policy
        best_model.update(score, of, model.num_timesteps, policy, error)

    return [
        # Not `best_model.levels.add` itself: restoring a run replaces `levels`.
        LevelRecorder(lambda game, level: best_model.levels.add(game, level)),
        *([EditStatsCallback(), AttemptReturns()] if model.processes.first else []),
        HeldOutEvalCallback(plays, config.eval_freq, update) if config.eval_freq else TrainingReturn(update),
    ]


def _play(session: Session, levels: list[int], heartbeat: Callable[[], None]) -> Episodes:
    """Play levels with the current policy, divided among the processes."""
    config, model, processes = session.config, session.model, session.model.processes
    games = len(resolve(config.env).names)
    n_envs = games * max(1, min(config.n_envs // processes.size, MAX_EVAL_ENVS) // games)
    episodes = Episodes()
    if own := levels[processes.rank :: processes.size]:
        with closing(make_levels_env(config.env, n_envs, own, 1, config.seed, **config.env_settings())) as env:
            # An agent that learns from right answers is evaluated by its most probable ones, as by srwm-rl eval.
            episodes = play_levels(model.policy, env, config.algo == "supervised", lambda _: heartbeat())
    by_rank = processes.all_gather([tuple(episode) for episode in episodes])
    return Episodes(Episode(*episode) for part in by_rank for episode in part)


def make_video_callback(session: Session, heartbeat: Callable[[], None]) -> PeriodicCallback:
    """Return the callback that writes a video of a held-out level to the run's folder every `video_freq` steps."""
    check_video(Path("film.mp4"))
    config, model, folder = session.config, session.model, session.run.path
    reasons: set[str] = set()  # for which there was no video the last time

    def write() -> None:
        steps = model.num_timesteps
        output = folder / "videos" / f"{steps:012d}.mp4"
        scene = choose_scene(config, n_steps=VIDEO_STEPS, seed=config.seed)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            trace, album = record(model.acting_policy, config, scene, folder.name, steps, VIDEO_STEPS)
            with closing(album):
                render(trace, album, output)
            reasons.clear()
        except Exception as error:  # a full disk, an environment that cannot be drawn, a codec
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            if reason not in reasons:
                warn(f"no video at {steps:,} steps ({reason:.300}); training continues")
            reasons.add(reason)
        heartbeat()

    return PeriodicCallback(config.video_freq, write)
