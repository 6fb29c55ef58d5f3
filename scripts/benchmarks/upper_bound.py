"""The upper bound on training speed, as if only environment steps, acting and gradients took time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.rollout_buffer import SequenceBatch, storage
from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.ppo import PPO
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import Obs
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks import measure
from srwm_rl.scripts.benchmarks.measure import Clock, device_clock, ratio, speeds

FORMULAS = {False: "1 / (1/E + 1/A + k/L)", True: "min(E, 1 / (1/A + k/L))"}  # by `concurrent`


def make_components(model: RecurrentAlgorithm, env: VecEnv, batch_size: int) -> Callable[[], dict[str, float]]:
    """Return a function that times parts of training alone: environment steps (E), acting (A), gradients (L).

    It returns the steps per second of each. The model's state and its environments do not change, nor does torch's
    random state; `env` are others like them.
    """
    policy, n_envs, clock = model.policy, env.num_envs, device_clock(model.device)
    env.reset()
    obs, actions = sample(policy.observation_space, n_envs), sample(policy.action_space, n_envs)
    first_step = obs, policy.initial_state(n_envs), np.zeros(n_envs, np.float32)
    stored = storage((1, n_envs), policy.observation_space, model.device)
    actor = model.engine.actor(policy, 0, stored, 1, *first_step)

    def act() -> None:
        with torch.no_grad():
            actor(0, *first_step)

    n_sequences = max(1, batch_size // model.n_steps)
    at_once = model.sequences_at_once(model.n_steps) or n_sequences
    sizes = [min(at_once, n_sequences - first) for first in range(0, n_sequences, at_once)]
    batches = [make_batch(model, *random_unroll(model, model.n_steps, n)) for n in sizes]
    components: dict[str, tuple[Callable[[], Any], int, Clock]] = {
        "E": (partial(env.step, actions), n_envs, time.perf_counter),
        "A": (act, n_envs, clock),
        "L": (partial(backward, model, batches), n_sequences * model.n_steps, clock),
    }

    def timed() -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            return {
                name: speeds({name: run}, n, own_clock, measure.SECONDS)[name]
                for name, (run, n, own_clock) in components.items()
            }

    return timed


def sample(space: spaces.Space[Any], *shape: int) -> Any:
    """Return random elements `[*shape, ...]` of a space, the same at each call."""
    for n in reversed(shape):
        space = batch_space(space, n)
    space.seed(0)
    return space.sample()


def random_unroll(
    model: RecurrentAlgorithm, n_steps: int, n: int, start_rate: float = 0.0
) -> tuple[Obs, Tensor, Tensor, Tensor]:
    """Return observations and actions `[T, N, ...]`, the core state before them, and episode starts `[T, N]`."""
    policy, generator = model.policy, torch.Generator().manual_seed(0)
    starts = (torch.rand(n_steps, n, generator=generator) < start_rate).float().to(model.device)
    obs = model.obs_tensor(sample(policy.observation_space, n_steps, n))
    actions = torch.as_tensor(sample(policy.action_space, n_steps, n), device=model.device)
    return obs, actions, policy.initial_state(n), starts


def make_batch(
    model: RecurrentAlgorithm, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor
) -> SequenceBatch | Unrolls:
    """Return a batch of the trainer: an unroll `[T, N]`, with random values."""
    shape = episode_starts.shape
    random = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).to(model.device) - 0.5
    if isinstance(model, PPO):
        values, log_probs, advantages, returns = random
        return SequenceBatch(obs, actions, episode_starts, values, log_probs, advantages, returns, core_state)
    # IMPALA's unrolls have one more observation than actions.
    rewards, log_probs = random[:2, :-1]
    return Unrolls(obs, episode_starts, actions[:-1], rewards, log_probs, core_state, torch.zeros(shape[1]))


def backward(model: RecurrentAlgorithm, batches: list[Any]) -> None:
    """Set the parameters' `.grad` as in an update."""
    n_steps, clip_range, clip_range_vf = 1.0, 0.2, None
    model.engine.backward(batches, *((n_steps, clip_range, clip_range_vf) if isinstance(model, PPO) else ()))


def check_same(fused: RecurrentAlgorithm, reference: RecurrentAlgorithm) -> None:
    """Compare values, log-probabilities and gradients for one unroll of random steps with episode starts.

    The reference gets the weights of the fused trainer.

    Raises:
        UserError: they differ.
    """
    reference.policy.load_state_dict(fused.policy.state_dict())
    unroll = random_unroll(fused, min(fused.n_steps, 50), 4, start_rate=0.1)
    results = []
    for model, backend in ((fused, "auto"), (reference, "reference")):
        with prefer(backend):
            with torch.no_grad():
                evaluation = model.engine.evaluate_sequence(*unroll)
            backward(model, [make_batch(model, *unroll)])
        gradients = [weight.grad.flatten() for weight in model.engine.parameters if weight.grad is not None]
        results.append((evaluation.values, evaluation.log_probs, torch.cat(gradients)))
    for name, ours, expected in zip(("values", "log-probabilities", "gradients"), *results, strict=True):
        if (ours - expected).norm() > 1e-3 * expected.norm():
            raise UserError(f"the fused kernel's {name} differ from the reference's; not timed")


def upper_bound(E: float, A: float, L: float, k: int, concurrent: bool = False) -> float:
    """Return the steps per second of training if nothing else took time.

    Args:
        E, A, L: steps per second of environment steps, acting and gradients, each alone.
        k: passes over each step.
        concurrent: the CPU steps environments while a GPU acts and learns, so the slower of the two counts. Otherwise
            all use the same cores, and their times add up.
    """
    networks = 1 / A + k / L
    return min(E, 1 / networks) if concurrent else 1 / (1 / E + networks)


def report_upper_bound(
    rates: list[float], components: dict[str, list[float]], k: int, concurrent: bool
) -> dict[str, Any]:
    """Print the upper bound and the fraction of it that training reaches, from the speeds by round; return both."""
    median = {name: statistics.median(values) for name, values in components.items()}
    bound = upper_bound(**median, k=k, concurrent=concurrent)
    by_round = zip(components["E"], components["A"], components["L"], strict=True)
    reached = ratio(rates, [upper_bound(E, A, L, k, concurrent) for E, A, L in by_round])
    print(
        f"bound        {FORMULAS[concurrent]} = {bound:,.0f} steps/s, of environments {median['E']:,.0f}, "
        f"acting {median['A']:,.0f}, learning {median['L']:,.0f} x {k}; reached: {reached:.0%}"
    )
    values = {**median, "k": float(k), "bound": bound}
    return {"bound": values, "formula": FORMULAS[concurrent], "reached": reached}
