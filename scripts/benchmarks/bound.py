"""The bound on a trainer's speed: what it would reach if stepping, acting and gradients were all that takes time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srwm_rl.scripts.benchmarks.measure import device_clock, long_enough, ratio, summary

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.nn.policy import Obs


class Part(NamedTuple):
    """A part of training that is done alone."""

    work: Callable[[], Any]
    steps: int  # that it does
    clock: Callable[[], float]


def parts_of(model: RecurrentAlgorithm, env: VecEnv, batch_size: int) -> dict[str, Part]:
    """Return what training consists of: stepping (E), acting (A), and the gradient of what a minibatch holds (L).

    Args:
        model: whose policy acts and learns; its own environments are not touched.
        env: environments like the model's.
        batch_size: steps per minibatch.
    """
    from srwm_rl.agents.engine.transfer import to_host

    policy = model.policy
    env.reset()
    actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
    obs = model.obs_tensor(model._last_obs)
    starts = torch.zeros(env.num_envs, device=model.device)
    state = policy.initial_state(env.num_envs)

    acting = model.engine.act_fn(policy)

    def act() -> None:
        with torch.no_grad():
            step = acting(obs, state, starts)
        to_host(step.actions, step.values, step.log_probs)

    n = max(1, batch_size // model.n_steps)
    many = (
        {k: v[None, :1].expand(model.n_steps, n, *v.shape[1:]) for k, v in obs.items()}
        if isinstance(obs, dict)
        else (obs[None, :1].expand(model.n_steps, n, *obs.shape[1:]))
    )
    done = torch.zeros((model.n_steps, n, *np.shape(actions)[1:]), dtype=torch.int64, device=model.device)
    if actions.dtype.kind == "f":
        done = done.float()
    begins = torch.zeros(model.n_steps, n, device=model.device)

    at_once = model.sequences_at_once(model.n_steps) or n
    batches = []
    for first in range(0, n, at_once):
        rows = slice(first, min(first + at_once, n))
        part = {k: v[:, rows] for k, v in many.items()} if isinstance(many, dict) else many[:, rows]
        carried = policy.initial_state(rows.stop - rows.start)
        batch, *scalars = make_batch(model, part, done[:, rows], carried, begins[:, rows])
        batches.append(batch)

    def learn() -> None:
        model.engine.backward(batches, *scalars)

    clock = device_clock(model.device)
    return {
        "E": Part(lambda: env.step(actions), env.num_envs, time.perf_counter),
        "A": Part(act, env.num_envs, clock),
        "L": Part(learn, n * model.n_steps, clock),
    }


FORMULAS = {False: "1 / (1/E + 1/A + k/L)", True: "min(E, 1 / (1/A + k/L))"}  # by `apart`


def speed_bound(E: float, A: float, L: float, k: int, apart: bool = False) -> float:
    """Return the steps per second of training if nothing else took time.

    Args:
        E, A, L: steps per second of stepping, acting and the gradient, each alone.
        k: how often each step is learned from.
        apart: whether the environments step on the processor while a GPU acts and learns. Then the slower of the two
            decides. Otherwise all want the same cores, and their times add up, in turn or at once.
    """
    nets = 1 / A + k / L
    return min(E, 1 / nets) if apart else 1 / (1 / E + nets)


def share_of_bound(both: list[float], speeds: list[dict[str, float]], k: int, apart: bool) -> dict[str, Any]:
    """Print the bound, and how much of it was reached; return them.

    Args:
        both: steps per second of training, by round.
        speeds: of its parts alone, by round.
        k, apart: see `speed_bound`.
    """
    typical = {name: summary([each[name] for each in speeds]).median for name in speeds[0]}
    bound = {**typical, "k": float(k), "bound": speed_bound(**typical, k=k, apart=apart)}
    reached = ratio(both, [speed_bound(**each, k=k, apart=apart) for each in speeds])
    print(
        f"bound        {FORMULAS[apart]} = {bound['bound']:,.0f} steps/s, of environments {bound['E']:,.0f}, "
        f"acting {bound['A']:,.0f}, learning {bound['L']:,.0f} x {k}; reached: {reached.median:.0%} "
        f"[{reached.low:.0%}, {reached.high:.0%}]"
    )
    return {"bound": bound, "formula": FORMULAS[apart], "reached": reached._asdict()}


def speeds_of(parts: dict[str, Part]) -> dict[str, float]:
    """Return the steps per second of each part alone; the random numbers of training stay what they would have been."""
    with torch.random.fork_rng(devices=[]):
        return {name: _speed(each) for name, each in parts.items()}


def _speed(part: Part) -> float:
    part.work()
    rates: list[float] = []
    began = part.clock()
    while not rates or not long_enough(part.clock() - began):
        start = part.clock()
        part.work()
        rates.append(part.steps / (part.clock() - start))
    return float(np.median(rates))


def make_batch(
    model: RecurrentAlgorithm, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor
) -> tuple[Any, ...]:
    """Return the arguments of the trainer's loss for an unroll `[T, N]` with random numbers in place of the others."""
    from srwm_rl.agents.collecting.rollout_buffer import SequenceBatch
    from srwm_rl.agents.collecting.unroll_queue import Unrolls
    from srwm_rl.agents.ppo import PPO

    shape = episode_starts.shape
    drawn = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).to(model.device) - 0.5
    if isinstance(model, PPO):
        values, log_probs, advantages, returns = drawn
        batch = SequenceBatch(obs, actions, episode_starts, values, log_probs, advantages, returns, core_state)
        return batch, float(shape.numel()), 0.2, None
    # IMPALA's loss takes one step more than was played: here that is the last one.
    return (
        Unrolls(obs, episode_starts, actions[:-1], drawn[0, :-1], drawn[1, :-1], core_state, torch.zeros(shape[1])),
    )
