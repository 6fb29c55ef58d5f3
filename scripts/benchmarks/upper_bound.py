"""The upper bound on training speed, as if only environment steps, acting and gradients took time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.utils import _pytree as pytree

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.rollout_buffer import SequenceBatch
from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.engine.transfer import to_host
from srwm_rl.agents.ppo import PPO
from srwm_rl.nn.policy import Obs
from srwm_rl.scripts.benchmarks.measure import device_clock, long_enough, ratio, summary

FORMULAS = {False: "1 / (1/E + 1/A + k/L)", True: "min(E, 1 / (1/A + k/L))"}  # by `concurrent`


class Component(NamedTuple):
    """A part of training that can be timed alone."""

    run: Callable[[], Any]
    n_steps: int  # per run
    clock: Callable[[], float]


def make_components(model: RecurrentAlgorithm, env: VecEnv, batch_size: int) -> dict[str, Component]:
    """Return the components of training: environment steps (E), acting (A), the gradient of a minibatch (L).

    The model's state and its environments do not change; `env` are others like them.
    """
    policy, n_envs, clock = model.policy, env.num_envs, device_clock(model.device)
    env.reset()
    actions = np.stack([env.action_space.sample() for _ in range(n_envs)])
    obs = model.obs_tensor(model._last_obs)
    act_fn, state = model.engine.act_fn(policy), policy.initial_state(n_envs)
    starts = torch.zeros(n_envs, device=model.device)

    def act() -> None:
        with torch.no_grad():
            step = act_fn(obs, state, starts)
        to_host(step.actions, step.values, step.log_probs)

    n_sequences = max(1, batch_size // model.n_steps)
    at_once = model.sequences_at_once(model.n_steps) or n_sequences
    sizes = [min(at_once, n_sequences - first) for first in range(0, n_sequences, at_once)]
    batches = [_repeat_first(model, obs, torch.as_tensor(actions), n) for n in sizes]
    scalars = batches[0][1]
    return {
        "E": Component(lambda: env.step(actions), n_envs, time.perf_counter),
        "A": Component(act, n_envs, clock),
        "L": Component(
            lambda: model.engine.backward([batch for batch, _ in batches], *scalars),
            n_sequences * model.n_steps,
            clock,
        ),
    }


def _repeat_first(model: RecurrentAlgorithm, obs: Obs, actions: Tensor, n: int) -> tuple[Any, tuple[Any, ...]]:
    """Return a batch of n sequences, and the loss's scalars; every step has the first environment's observation."""
    shape = (model.n_steps, n)
    repeated: Obs = pytree.tree_map(lambda x: x[None, :1].expand(*shape, *x.shape[1:]), obs)
    no_actions = torch.zeros(*shape, *actions.shape[1:], dtype=actions.dtype, device=model.device)
    starts = torch.zeros(shape, device=model.device)
    return make_batch(model, repeated, no_actions, model.policy.initial_state(n), starts)


def make_batch(
    model: RecurrentAlgorithm, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor
) -> tuple[Any, tuple[Any, ...]]:
    """Return a batch of the trainer, an unroll `[T, N]` with random values, and the loss's scalars."""
    shape = episode_starts.shape
    random = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).to(model.device) - 0.5
    if isinstance(model, PPO):
        values, log_probs, advantages, returns = random
        batch = SequenceBatch(obs, actions, episode_starts, values, log_probs, advantages, returns, core_state)
        return batch, (float(shape.numel()), 0.2, None)
    # IMPALA's unrolls have one more observation than actions.
    versions = torch.zeros(shape[1])
    return Unrolls(obs, episode_starts, actions[:-1], random[0, :-1], random[1, :-1], core_state, versions), ()


def component_speeds(components: dict[str, Component]) -> dict[str, float]:
    """Return the steps per second of each component alone; the random state of training does not change."""
    with torch.random.fork_rng(devices=[]):
        return {name: _speed(component) for name, component in components.items()}


def _speed(component: Component) -> float:
    component.run()
    rates: list[float] = []
    first = component.clock()
    while not rates or not long_enough(component.clock() - first):
        start = component.clock()
        component.run()
        rates.append(component.n_steps / (component.clock() - start))
    return float(np.median(rates))


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


def report_upper_bound(rates: list[float], speeds: list[dict[str, float]], k: int, concurrent: bool) -> dict[str, Any]:
    """Print the upper bound and the fraction of it that training reaches, from the speeds by round; return both."""
    median = {name: summary([speed[name] for speed in speeds]).median for name in speeds[0]}
    bound = upper_bound(**median, k=k, concurrent=concurrent)
    reached = ratio(rates, [upper_bound(**speed, k=k, concurrent=concurrent) for speed in speeds])
    print(
        f"bound        {FORMULAS[concurrent]} = {bound:,.0f} steps/s, of environments {median['E']:,.0f}, "
        f"acting {median['A']:,.0f}, learning {median['L']:,.0f} x {k}; reached: {reached.median:.0%} "
        f"[{reached.low:.0%}, {reached.high:.0%}]"
    )
    values = {**median, "k": float(k), "bound": bound}
    return {"bound": values, "formula": FORMULAS[concurrent], "reached": reached._asdict()}
