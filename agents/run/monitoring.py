"""Callbacks that look at the agent while it learns and change nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.evaluation.play_levels import Episodes
from srwm_rl.agents.run.checkpoint_state import generator_states, restore_generators
from srwm_rl.nn.diagnostics import count_heads, introspect


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Give back every random generator as it was, a GPU's too: looking must not change what is learned."""
    states = generator_states(device)
    try:
        yield
    finally:
        restore_generators(states, device)


class EditStatsCallback(BaseCallback):
    """Log what the network does to itself, once per rollout: `srwm/l0/edit`, `drift`, `rate_y`, ...

    One acting step more per rollout, on the observations at its end. Per layer, means over environments and heads:
    `edit` is |W_{t+1} - W_t|, `drift` |W_t - W_0|, `rate_*` the four self-chosen rates; `drift_max` is the largest, in
    which a head that explodes is seen first. Every `histogram_every` rollouts TensorBoard gets the drifts themselves.
    Nothing is logged for a core that carries nothing.
    """

    model: RecurrentAlgorithm

    def __init__(self, histogram_every: int = 20) -> None:
        super().__init__()
        self.histogram_every = histogram_every
        self.rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # Where a learner runs beside the actors, the copy that acts: to record_rates to a network changes its methods.
        policy = self.model.acting_policy
        core_state = self.model._core_state
        if core_state is None or not count_heads(policy.core):
            return
        obs = self.model.obs_tensor(self.model._last_obs)
        starts = torch.as_tensor(self.model._last_episode_starts, device=self.model.device)
        with undisturbed(self.model.device):
            seen = introspect(policy, obs, core_state, starts, deterministic=True)
        self.rollouts += 1
        for layer in range(len(seen.edit)):
            self._record(layer, "edit", seen.edit[layer].mean().item())
            self._record(layer, "drift", seen.drift[layer].mean().item())
            self._record(layer, "drift_max", seen.drift[layer].max().item())
            if seen.rates is not None:
                for name, rate in zip(
                    ("y", "query", "key", "beta"), seen.rates[layer].mean((0, 1)).tolist(), strict=True
                ):
                    self._record(layer, f"rate_{name}", rate)
            if self.rollouts % self.histogram_every == 0:
                drifts = seen.drift[layer].flatten().cpu()
                self.logger.record(f"srwm/l{layer}/drifts", drifts, exclude=("stdout", "log", "json", "csv"))

    def _record(self, layer: int, name: str, value: float) -> None:
        self.logger.record(f"srwm/l{layer}/{name}", value)


class HeldOutEvalCallback(BaseCallback):
    """Play training and held-out levels now and then, and log `eval_train/`, `eval_test/` and `eval/gap`.

    Args:
        play: plays a split ("train" or "test") with the present policy.
        every: environment steps between evaluations; they fall on multiples of it, so that a resumed run evaluates
            where an uninterrupted one does.
        on_score: called with the held-out (or else the training) mean return.
    """

    def __init__(
        self,
        play: Mapping[str, Callable[[], Episodes]],
        every: int,
        on_score: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.play, self.every, self.on_score = play, every, on_score
        self.before = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.before = self.num_timesteps

    def _on_rollout_end(self) -> None:
        if self.num_timesteps // self.every == self.before // self.every:
            return
        with undisturbed(self.model.device):
            found = {split: play() for split, play in self.play.items()}
        means = {split: float(np.mean([each.episode_return for each in episodes])) for split, episodes in found.items()}
        for split, episodes in found.items():
            self.logger.record(f"eval_{split}/mean_reward", means[split])
            self.logger.record(f"eval_{split}/mean_ep_length", float(np.mean([each.length for each in episodes])))
            solved = [each.solved for each in episodes]
            if None not in solved:
                self.logger.record(f"eval_{split}/success_rate", float(np.mean([bool(each) for each in solved])))
        if {"train", "test"} <= means.keys():
            self.logger.record("eval/gap", means["train"] - means["test"])
        self.on_score(means.get("test", means.get("train", -np.inf)))
