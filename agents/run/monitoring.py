"""Callbacks that observe the agent while it learns, without changing what it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from srwm_rl.agents.evaluation.play_levels import Episodes
from srwm_rl.agents.run.callbacks import RolloutCallback
from srwm_rl.agents.run.checkpoint_state import generator_states, restore_generators
from srwm_rl.nn.diagnostics import count_heads, introspect


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the states of all random generators, a GPU's too, after the block."""
    states = generator_states(device)
    try:
        yield
    finally:
        restore_generators(states, device)


class EditStatsCallback(RolloutCallback):
    """Log statistics of the network's edits of itself, once per rollout, from one further acting step at its end.

    Logged per layer, as means over environments and heads: `srwm/l0/edit`, |W_{t+1} - W_t|; `srwm/l0/drift`,
    |W_t - W_0|; `srwm/l0/rate_y`, `rate_query`, `rate_key`, `rate_beta`, the self-chosen learning rates; and
    `srwm/l0/drift_max`, the largest drift, which first shows a head that diverges. Every `histogram_every` rollouts
    TensorBoard gets all drifts, `srwm/l0/drifts`. Nothing is logged for a core without state.
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
        for layer, (edit, drift) in enumerate(zip(step.edit, step.drift, strict=True)):
            stats = {"edit": edit.mean(), "drift": drift.mean(), "drift_max": drift.max()}
            if step.rates is not None:
                rates = step.rates[layer].mean((0, 1))
                stats |= {f"rate_{name}": rates[i] for i, name in enumerate(("y", "query", "key", "beta"))}
            for name, value in stats.items():
                self.logger.record(f"srwm/l{layer}/{name}", value.item())
            if self.rollouts % self.histogram_every == 0:
                drifts = drift.flatten().cpu()
                self.logger.record(f"srwm/l{layer}/drifts", drifts, exclude=("stdout", "log", "json", "csv"))


class PeriodicCallback(RolloutCallback):
    """Call `act` after each rollout that passes a multiple of `every` environment steps.

    So a resumed run acts where an uninterrupted one does. The random generators are left as they were.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def _on_rollout_start(self) -> None:
        self.before = self.num_timesteps

    def _on_rollout_end(self) -> None:
        if self.num_timesteps // self.every > self.before // self.every:
            with undisturbed(self.model.device):
                self.act()

    def act(self) -> None:
        """Do what is due."""
        raise NotImplementedError


class HeldOutEvalCallback(PeriodicCallback):
    """Evaluate on training and held-out levels at intervals.

    Logged: `eval_train/mean_reward`, `eval_train/mean_ep_length` and, where games can be solved,
    `eval_train/success_rate`; the same under `eval_test/`; and `eval/gap`, the difference of the mean returns.

    Args:
        play: plays a split ("train" or "test") with the present policy.
        every: environment steps between evaluations.
        on_score: called with the held-out (or else the training) mean return.
    """

    def __init__(
        self,
        play: Mapping[str, Callable[[], Episodes]],
        every: int,
        on_score: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__(every)
        self.play, self.on_score = play, on_score

    def act(self) -> None:
        """Play all splits and log their results."""
        results = {split: play() for split, play in self.play.items()}
        means: dict[str, float] = {}
        for split, episodes in results.items():
            means[split] = float(np.mean([episode.episode_return for episode in episodes]))
            self.logger.record(f"eval_{split}/mean_reward", means[split])
            self.logger.record(f"eval_{split}/mean_ep_length", float(np.mean([episode.length for episode in episodes])))
            solved = [episode.solved for episode in episodes]
            if None not in solved:
                self.logger.record(f"eval_{split}/success_rate", solved.count(True) / len(solved))
        if {"train", "test"} <= means.keys():
            self.logger.record("eval/gap", means["train"] - means["test"])
        self.on_score(means.get("test", means.get("train", -np.inf)))
