"""What a training run is watched with: its edits of itself, the levels it plays, others played now and then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import TrainConfig, pairs

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.agents.evaluation.play_levels import Episodes
    from srwm_rl.agents.run.best_model import BestModelTracker


VIDEO_STEPS = 150  # ten seconds of ProcGen


def make_best_model_tracker(config: TrainConfig) -> BestModelTracker:
    """Return the empty best_model of a run."""
    from srwm_rl.agents.run.best_model import BestModelTracker
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.storage.seen_levels import SeenLevels

    levels = LevelRange.parse(config.levels)
    return BestModelTracker(SeenLevels(levels.start, levels.stop))


def make_callbacks(
    config: TrainConfig, model: RecurrentAlgorithm, best_model: BestModelTracker, heartbeat: Callable[[], None]
) -> list[BaseCallback]:
    """Return the callbacks that log `srwm/` and, with --eval-freq, `eval_train/`, `eval_test/` and `eval/gap`.

    They write the best_model too. What is scored there are the weights at the end of a rollout, before their next update:
    on held-out levels with --eval-freq, else by the last training episodes. Neither depends on when a checkpoint is
    written, or a run that was stopped and resumed could end with another best model.

    Args:
        config: the run's settings.
        model: the trainer.
        best_model: gets the levels played and the scores.
        heartbeat: called whenever an episode of an evaluation ends.
    """
    from srwm_rl.agents.run.callbacks import LevelRecorder, TrainingReturn
    from srwm_rl.agents.run.monitoring import EditStatsCallback, HeldOutEvalCallback

    def scored_held_out(score: float) -> None:
        some = len(_some(config.eval_levels, config.eval_episodes))
        # Beside a learner these are its own weights, which nothing changes while a callback looks at them.
        best_model.update(
            score, f"mean return on {some} held-out levels of {config.eval_levels}", model.num_timesteps, model.policy
        )

    def scored_in_training(score: float) -> None:
        # Beside a learner, the copy that acts: the learner's weights have played none of these episodes.
        acting = model.acting_policy
        window = model._stats_window_size
        best_model.update(score, f"mean return of the last {window} training episodes", model.num_timesteps, acting)

    # Through the best_model, not its record of the moment: a resumed run gets another one.
    callbacks: list[BaseCallback] = [
        LevelRecorder(lambda game, level: best_model.levels.add(game, level)),
        *([EditStatsCallback()] if model.processes.first else []),
    ]
    if not config.eval_freq:
        callbacks.append(TrainingReturn(scored_in_training))
    else:
        ranges = {"train": config.levels, "test": config.eval_levels}
        plays = {
            split: _player(config, model, _some(text, config.eval_episodes), heartbeat)
            for split, text in ranges.items()
        }
        callbacks.append(HeldOutEvalCallback(plays, config.eval_freq, scored_held_out))
    return callbacks


def _some(text: str, n: int) -> list[int]:
    """Return `n` levels spread evenly over a range, or all of a shorter one."""
    from srwm_rl.envs.levels import LevelRange

    levels = LevelRange.parse(text)
    step = max(1, len(levels) // n)
    return list(range(levels.start, levels.stop, step))[:n]


def _player(
    config: TrainConfig, model: RecurrentAlgorithm, levels: list[int], heartbeat: Callable[[], None]
) -> Callable[[], Episodes]:
    from srwm_rl.agents.evaluation.play_levels import Episode, Episodes

    def together(episodes: Episodes) -> Episodes:
        parts = model.processes.all_gather([tuple(each) for each in episodes])
        return Episodes(Episode(*each) for part in parts for each in part)

    def play() -> Episodes:
        from srwm_rl.agents.evaluation.play_levels import play_levels
        from srwm_rl.envs.make import make_levels_env, resolve

        processes = model.processes
        games = len(resolve(config.env).names)
        n_envs = games * max(1, min(config.n_envs // processes.size, 64) // games)
        own = levels[processes.rank :: processes.size]
        if not own:
            return together(Episodes())
        env = make_levels_env(
            config.env,
            n_envs,
            own,
            1,
            config.seed,
            config.mode,
            pairs(config.env_kwargs, "env_kwargs"),
            config.inputs,
            config.reward_clip or None,
        )
        try:
            return together(play_levels(model.policy, env, on_progress=lambda _: heartbeat()))
        finally:
            env.close()

    return play


def make_video_callback(
    config: TrainConfig, model: RecurrentAlgorithm, run: Path, heartbeat: Callable[[], None]
) -> list[BaseCallback]:
    """Return, with --video-freq, the callback that films a held-out level now and then.

    Raises:
        UserError: the video's codec is missing.
    """
    if not config.video_freq:
        return []
    from stable_baselines3.common.callbacks import BaseCallback as Callback

    from srwm_rl.agents.run.monitoring import undisturbed
    from srwm_rl.scripts.video.encoding import check_video

    check_video(Path("film.mp4"))

    class Films(Callback):
        before = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.before = self.num_timesteps

        def _on_rollout_end(self) -> None:
            if self.num_timesteps // config.video_freq > self.before // config.video_freq:
                with undisturbed(self.model.device):
                    _film(config, model, run)
                heartbeat()

    return [Films()]


def _film(config: TrainConfig, model: RecurrentAlgorithm, run: Path) -> None:
    from srwm_rl.scripts.commands import watch
    from srwm_rl.storage.model_file import Agent

    output = run / "videos" / f"{model.num_timesteps:012d}.mp4"
    # Where a learner runs beside the actors, the copy that acts: to record_rates to a network changes its methods.
    policy = model.acting_policy
    agent = Agent(policy, config.to_json(), model.num_timesteps, output)
    options = watch.WatchConfig(run=str(run), steps=VIDEO_STEPS, progress=False, seed=config.seed)
    scene = watch.choose_scene(options, config)
    try:
        output.parent.mkdir(exist_ok=True)
        trace, album = watch.record(agent, scene, watch.describe(options, config, agent, scene), options)
        with closing(album):
            watch.film(trace, album, output, progress=False)
    except OSError as error:  # a full disk costs the film, not the run
        warn(f"no film at {model.num_timesteps} steps ({error.strerror}); training goes on")
