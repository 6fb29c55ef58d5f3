"""The whole state of a training run between two updates, as one tree of arrays and plain values."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.storage.model_file import load_policy_arrays, policy_arrays

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
OTHERS = "processes"  # a checkpoint's key for the parts of all processes but process 0


def capture_state(model: RecurrentAlgorithm) -> dict[str, Any]:
    """Return the run's state between two updates: weights, optimizer, counters, generators, environments, memory.

    Several processes capture together; only what process 0 gets is complete. `"environments"` is None where the
    environments cannot be saved; a run resumed from there is not exact.
    """
    env: Any = model.env
    obs = model._last_obs
    own = {
        "generators": generator_states(model.device),
        "environments": env.get_state() if getattr(env, "supports_state", False) else None,
        "core_state": None if model._core_state is None else model._core_state.cpu().numpy(),
        "last_obs": {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else np.copy(obs),  # type: ignore[arg-type]
        "episode_starts": np.copy(model._last_episode_starts),  # type: ignore[arg-type]
        "extra": model.extra_state(),
    }
    others = model.processes.gather(own)[1:]
    return {
        "policy": policy_arrays(model.policy),
        "optimizer": _optimizer_state(model.policy.optimizer),
        "counters": {name: getattr(model, name) for name in COUNTERS},
        **own,
        "episodes": [dict(episode) for episode in model.ep_info_buffer or ()],
        "successes": [bool(success) for success in model.ep_success_buffer or ()],
        **({OTHERS: others} if others else {}),
    }


def parts_of_state(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each process's own part of a captured state, by rank."""
    return [state, *state.get(OTHERS, ())]


def restore_state(model: RecurrentAlgorithm, state: dict[str, Any], source: str) -> bool:
    """Restore a captured state in a model that was built with the same settings.

    If it was captured by as many processes as there are now, each restores its own part; else all start with new
    episodes and generators.

    Returns:
        Whether the environments' state was restored; if not, they are reset and new episodes begin.

    Raises:
        UserError: the state is of another architecture.
    """
    load_policy_arrays(model.policy, state["policy"], source)
    _restore_optimizer(model.policy.optimizer, state["optimizer"])
    for name in COUNTERS:
        setattr(model, name, state["counters"][name])
    # Earlier versions wrote numbers below 0, with which IMPALA's learner would begin.
    model._current_progress_remaining = max(0.0, model._current_progress_remaining)
    window = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(state["episodes"], window), deque(state["successes"], window)
    parts = parts_of_state(state)
    if len(parts) == model.processes.size:
        return _restore_part(model, parts[model.processes.rank])
    model._last_obs = model._core_state = None  # learn() resets the environments
    # not the run's own seed, which would repeat its first levels and actions
    model.set_random_seed(fresh_seed(model.seed or 0, model.num_timesteps))
    return False


def _restore_part(model: RecurrentAlgorithm, part: dict[str, Any]) -> bool:
    model.restore_extra_state(part.get("extra", {}))
    model._last_obs = model._core_state = None  # learn() resets the environments
    exact = part["environments"] is not None and hasattr(model.env, "set_state")
    if exact:
        model.env.set_state(part["environments"])  # type: ignore[union-attr]
        model._last_obs, model._last_episode_starts = part["last_obs"], part["episode_starts"]
        if part["core_state"] is not None:
            model._core_state = torch.as_tensor(part["core_state"], device=model.device)
    restore_generators(part["generators"], model.device)  # last: the calls above may draw from them
    return exact


def fresh_seed(seed: int, number: int) -> int:
    """Return a seed in [0, 2**30) that is unrelated to `seed`, to `seed + 1` and to those of other numbers."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) >> 2


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        str(index): {
            name: np.array(value.cpu().numpy()) if isinstance(value, torch.Tensor) else value
            for name, value in entries.items()
        }
        for index, entries in optimizer.state_dict()["state"].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {
        int(index): {
            name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for name, value in entries.items()
        }
        for index, entries in state.items()
    }
    optimizer.load_state_dict(whole)
    for weight, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                # In the weight's memory order, which a file does not keep: a fused step reads both in parallel and
                # would pair a channels-last weight with the wrong moments.
                entries[name] = torch.empty_like(weight, requires_grad=False).copy_(value)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's (CPU and GPU), numpy's and Python's random generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # SB3 and the minibatches use the global one
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy(),
        "cuda": [torch.cuda.get_rng_state(device).numpy()] if device.type == "cuda" else [],
        "numpy": [kind, np.asarray(keys), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `generator_states` returned, on this GPU or another one."""
    torch.set_rng_state(torch.from_numpy(np.array(states["torch"])))
    if states["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(np.array(states["cuda"][0])), device)
    np.random.set_state(tuple(states["numpy"]))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the states of all random generators, a GPU's too, after the block."""
    states = generator_states(device)
    try:
        yield
    finally:
        restore_generators(states, device)
