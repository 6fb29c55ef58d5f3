"""Callbacks of a training run: statistics of the edits, evaluations, the best model and videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, play_levels
from srwm_rl.agents.run.best_model import BestModelTracker
from srwm_rl.agents.run.callbacks import LevelRecorder, TrainingReturn
from srwm_rl.agents.run.monitoring import EditStatsCallback, HeldOutEvalCallback, PeriodicCallback
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env, resolve
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.video.encoding import check_video
from srwm_rl.scripts.video.record import choose_scene, record, render
from srwm_rl.storage.seen_levels import SeenLevels

VIDEO_STEPS = 150  # ten seconds of ProcGen
MAX_EVAL_ENVS = 64


def make_best_model_tracker(config: TrainConfig) -> BestModelTracker:
    """Return the tracker of a new run."""
    levels = LevelRange.parse(config.levels)
    return BestModelTracker(SeenLevels(levels.start, levels.stop))


def make_callbacks(
    config: TrainConfig, model: RecurrentAlgorithm, best_model: BestModelTracker, heartbeat: Callable[[], None]
) -> list[BaseCallback]:
    """Return the callbacks that log `srwm/` and, with --eval-freq, `eval_train/`, `eval_test/` and `eval/gap`.

    They also update `best_model`, at the end of a rollout and before the next update: by the return on held-out levels
    with --eval-freq, else by the last training episodes. Both are independent of when checkpoints are written, so that
    a resumed run ends with the same best model. `heartbeat` is called at the end of every episode of an evaluation.
    """

    def update_held_out(score: float) -> None:
        n_levels = len(_spread(config.eval_levels, config.eval_episodes))
        # `play` evaluates the learner's weights, which do not change during a callback.
        of = f"mean return on {n_levels} held-out levels of {config.eval_levels}"
        best_model.update(score, of, model.num_timesteps, model.policy)

    def update_training(score: float) -> None:
        of = f"mean return of the last {model._stats_window_size} training episodes"
        best_model.update(score, of, model.num_timesteps, model.acting_policy)

    # Not `best_model.levels.add` itself: restoring a run replaces `levels`.
    callbacks: list[BaseCallback] = [LevelRecorder(lambda game, level: best_model.levels.add(game, level))]
    if model.processes.first:
        callbacks.append(EditStatsCallback())
    if not config.eval_freq:
        return [*callbacks, TrainingReturn(update_training)]
    plays = {
        split: _make_play(config, model, _spread(levels, config.eval_episodes), heartbeat)
        for split, levels in (("train", config.levels), ("test", config.eval_levels))
    }
    return [*callbacks, HeldOutEvalCallback(plays, config.eval_freq, update_held_out)]


def _spread(text: str, n: int) -> list[int]:
    """Return `n` levels spread evenly over a range, or all of a shorter one."""
    levels = LevelRange.parse(text)
    return list(range(levels.start, levels.stop, max(1, len(levels) // n)))[:n]


def _make_play(
    config: TrainConfig, model: RecurrentAlgorithm, levels: list[int], heartbeat: Callable[[], None]
) -> Callable[[], Episodes]:
    """Return a function that plays levels with the current policy, divided among the processes."""
    processes = model.processes
    own_levels = levels[processes.rank :: processes.size]
    games = len(resolve(config.env).names)
    n_envs = games * max(1, min(config.n_envs // processes.size, MAX_EVAL_ENVS) // games)

    def play_own() -> Episodes:
        with closing(make_levels_env(config.env, n_envs, own_levels, 1, config.seed, **config.env_settings())) as env:
            return play_levels(model.policy, env, on_progress=lambda _: heartbeat())

    def play() -> Episodes:
        by_rank = processes.all_gather([tuple(episode) for episode in (play_own() if own_levels else ())])
        return Episodes(Episode(*episode) for episodes in by_rank for episode in episodes)

    return play


class VideoCallback(PeriodicCallback):
    """Write a video of a held-out level to the run's folder every `video_freq` steps."""

    def __init__(self, config: TrainConfig, run: Path, heartbeat: Callable[[], None]) -> None:
        check_video(Path("film.mp4"))
        super().__init__(config.video_freq)
        self.config, self.run, self.heartbeat = config, run, heartbeat

    def act(self) -> None:
        """Play and write the video."""
        config, steps = self.config, self.num_timesteps
        output = self.run / "videos" / f"{steps:012d}.mp4"
        scene = choose_scene(config, n_steps=VIDEO_STEPS, seed=config.seed)
        try:
            output.parent.mkdir(exist_ok=True)
            trace, album = record(self.model.acting_policy, config, scene, self.run.name, steps, VIDEO_STEPS)
            with closing(album):
                render(trace, album, output)
        except OSError as error:  # such as a full disk
            warn(f"no video at {steps} steps ({error.strerror}); training continues")
        self.heartbeat()
