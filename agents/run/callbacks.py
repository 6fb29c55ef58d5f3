"""Callbacks of the command line; those that observe the agent do not change what it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.evaluation.play_levels import Episodes
from srwm_rl.agents.run.checkpoint_state import undisturbed
from srwm_rl.nn.diagnostics import count_heads, head_norms, introspect

# Time that capturing states may take: a share of the run's time, and at its start so many seconds.
SHARE, GRACE = 0.05, 10.0
RETRY_SECONDS = 30.0  # after a state could not be saved


class RolloutCallback(BaseCallback):
    """A callback that acts between rollouts, not at every step."""

    model: RecurrentAlgorithm

    def _on_step(self) -> bool:
        return True


class Checkpoints(RolloutCallback):
    """Capture the run's state between updates and save it at intervals.

    The latest state is kept in memory, so that a run interrupted anywhere can be saved at once and resumed exactly. It
    is the state before the present update or, where updates are so fast that capturing each would cost more than
    `SHARE`, an older one: from about 20 times as long ago as capturing takes. Several processes capture together.

    Args:
        capture: returns the state tree of the model as it is now.
        save: writes a state tree; False: it could not, and is called again after `RETRY_SECONDS`.
        every_steps: environment steps between saves.
        every_seconds: save also when so much time has passed.
        check: called with the first state, before the first step; it raises an error if that cannot be saved.
    """

    def __init__(
        self,
        capture: Callable[[], dict[str, Any]],
        save: Callable[[dict[str, Any]], bool | None],
        every_steps: int,
        every_seconds: float = 600.0,
        check: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> None:
        super().__init__()
        self.capture, self.save, self.check = capture, save, check
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.latest: dict[str, Any] | None = None
        self.failed = False  # whether the last save failed

    def _on_training_start(self) -> None:
        self.started = self.saved_time = monotonic()
        self.saved_at, self.spent = self.num_timesteps, 0.0

    def _on_rollout_start(self) -> None:
        now = monotonic()
        due = self.num_timesteps - self.saved_at >= self.every_steps or now - self.saved_time >= self.every_seconds
        due = now - self.saved_time >= RETRY_SECONDS if self.failed else due
        affordable = self.spent <= GRACE + SHARE * (now - self.started)
        if not self.model.processes.all_gather(due or affordable)[0]:  # clocks differ: process 0 decides for all
            return
        start = monotonic()  # not `now`: waiting for the slowest process is no cost of capturing
        state = self.capture()
        if self.latest is None:
            self.check(state)
        self.latest = state
        self.spent += monotonic() - start
        if due:
            self.save_latest()

    def save_latest(self) -> bool:
        """Save the state that was captured last, if there is one; return False if it could not be written."""
        if self.latest is not None:
            self.failed = self.save(self.latest) is False
            self.saved_at, self.saved_time = self.num_timesteps, monotonic()
        return not self.failed


class LevelRecorder(RolloutCallback):
    """Record every level that the training environments begin, at the end of each rollout.

    Steps that end no episode cost nothing. Of several processes, process 0 records the levels of all.
    """

    def __init__(self, add: Callable[[str, int], None]) -> None:
        super().__init__()
        self.add = add
        self.begun: set[tuple[str, int]] = set()  # since the last rollout

    def _on_training_start(self) -> None:
        try:
            games = self.training_env.get_attr("game_names")
            levels = self.training_env.env_method("level_seed")
        except AttributeError:  # environments without levels
            return
        # Environments that are simulated together return the same lists, once for each of them.
        for group in zip(games, levels, strict=True):
            self.begun |= {(game, int(level)) for game, level in zip(*group, strict=True)}

    def _on_step(self) -> bool:
        for i in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][i]
            # The level that ended, too: an environment may have changed it after it reported its beginning.
            for name in ("prev_level_seed", "level_seed"):
                if name in info and "game" in info:
                    self.begun.add((info["game"], int(info[name])))
        return True

    def _on_rollout_end(self) -> None:
        for part in self.model.processes.gather(sorted(self.begun)):
            for game, level in part:
                self.add(game, level)
        self.begun.clear()


class AttemptReturns(RolloutCallback):
    """Log how much more is earned in later attempts at a level, where episodes are trials of several attempts.

    `rollout/first_attempt_rew_mean` and `rollout/last_attempt_rew_mean` are the mean returns of the first and the last
    attempts of trials that ended within the rollout, in this process's environments.
    """

    def __init__(self) -> None:
        super().__init__()
        self._returns: dict[str, list[float]] = {"first": [], "last": []}

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            if "attempt_return" in info:
                if info["attempt"] == 0:
                    self._returns["first"].append(info["attempt_return"])
                if done:
                    self._returns["last"].append(info["attempt_return"])
        return True

    def _on_rollout_end(self) -> None:
        for name, returns in self._returns.items():
            if returns:
                self.logger.record(f"rollout/{name}_attempt_rew_mean", float(np.mean(returns)))
            returns.clear()


def mean_and_error(returns: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, infinite for a single return."""
    spread = np.std(returns, ddof=1) if len(returns) > 1 else np.inf
    return float(np.mean(returns)), float(spread / np.sqrt(len(returns)))


class TrainingReturn(RolloutCallback):
    """Score the acting weights by the mean return of the last training episodes (`rollout/ep_rew_mean`).

    `on_score` is called with it and its standard error at the end of each rollout, before the update, once as many
    episodes have ended as the mean is taken over.
    """

    def __init__(self, on_score: Callable[[float, float], None]) -> None:
        super().__init__()
        self.on_score = on_score

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or ()
        if len(episodes) >= self.model._stats_window_size:
            self.on_score(*mean_and_error([episode["r"] for episode in episodes]))


class EditStatsCallback(RolloutCallback):
    """Log statistics of the network's edits of itself, once per rollout, from one further acting step at its end.

    Logged per layer, as means over environments and heads: `srwm/l0/edit`, |W_{t+1} - W_t|; `srwm/l0/drift`,
    |W_t - W_0|; `srwm/l0/rate_y`, `rate_query`, `rate_key`, `rate_beta`, the self-chosen learning rates; and
    `srwm/l0/drift_max`, the largest drift, which first shows a head that diverges. Every `histogram_every` rollouts
    TensorBoard gets all drifts, `srwm/l0/drifts`. Where an episode has just ended, the drift is the one at its end; the
    edit and the rates are those of the next episode's first step. Nothing is logged for a core without state.
    """

    def __init__(self, histogram_every: int = 20) -> None:
        super().__init__()
        self.histogram_every = histogram_every
        self.rollouts = 0

    def _on_rollout_end(self) -> None:
        # Not `model.policy`, with which a learner may compute at the same time: `introspect` patches its methods.
        policy = self.model.acting_policy
        core_state = self.model._core_state
        if core_state is None or not count_heads(policy.core):
            return
        obs = self.model.obs_tensor(self.model._last_obs)
        starts = torch.as_tensor(self.model._last_episode_starts, device=self.model.device)
        with undisturbed(self.model.device):
            step = introspect(policy, obs, core_state, starts, deterministic=True)
        self.rollouts += 1
        # Not `step.drift`, which is 0 where an episode begins: in all environments if rollouts are whole episodes.
        drifts = head_norms(policy.core, core_state)
        for layer, (edit, drift) in enumerate(zip(step.edit, drifts, strict=True)):
            stats = {"edit": edit.mean(), "drift": drift.mean(), "drift_max": drift.max()}
            if step.rates is not None:
                rates = step.rates[layer].mean((0, 1))
                stats |= {f"rate_{name}": rates[i] for i, name in enumerate(("y", "query", "key", "beta"))}
            for name, value in stats.items():
                self.logger.record(f"srwm/l{layer}/{name}", value.item())
            if self.rollouts % self.histogram_every == 0:
                histogram = drift.flatten().cpu()
                self.logger.record(f"srwm/l{layer}/drifts", histogram, exclude=("stdout", "log", "json", "csv"))


class PeriodicCallback(RolloutCallback):
    """Call `act` after each rollout that passes a multiple of `every` environment steps.

    So a resumed run acts where an uninterrupted one does. The random generators are left as they were.
    """

    def __init__(self, every: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.every, self.act = every, act

    def _on_rollout_start(self) -> None:
        self.before = self.num_timesteps

    def _on_rollout_end(self) -> None:
        if self.num_timesteps // self.every > self.before // self.every:
            with undisturbed(self.model.device):
                self.act()


class HeldOutEvalCallback(PeriodicCallback):
    """Evaluate on training and held-out levels at intervals.

    Logged: `eval_train/mean_reward`, `eval_train/mean_ep_length` and, where games can be solved,
    `eval_train/success_rate`; the same under `eval_test/`; and `eval/gap`, the difference of the mean returns.

    Args:
        play: plays a split ("train" or "test") with the present policy.
        every: environment steps between evaluations.
        on_score: called with the held-out (or else the training) mean return and its standard error.
    """

    def __init__(
        self,
        play: Mapping[str, Callable[[], Episodes]],
        every: int,
        on_score: Callable[[float, float], None] = lambda *_: None,
    ) -> None:
        super().__init__(every, self._evaluate)
        self.play, self.on_score = play, on_score

    def _evaluate(self) -> None:
        scores: dict[str, tuple[float, float]] = {}
        for split, play in self.play.items():
            _, _, returns, lengths, solved = zip(*play(), strict=True)
            scores[split] = mean_and_error(returns)
            self.logger.record(f"eval_{split}/mean_reward", scores[split][0])
            self.logger.record(f"eval_{split}/mean_ep_length", float(np.mean(lengths)))
            if None not in solved:
                self.logger.record(f"eval_{split}/success_rate", float(np.mean(solved)))
        if {"train", "test"} <= scores.keys():
            self.logger.record("eval/gap", scores["train"][0] - scores["test"][0])
        self.on_score(*scores.get("test", scores.get("train", (-np.inf, np.inf))))
