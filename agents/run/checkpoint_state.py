"""Everything a training run is, as one tree of arrays and plain values: taken between two updates, and put back."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.storage.model_file import load_policy_arrays, policy_arrays

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
# What every process has of its own; the rest is the same in all of them, or process 0's.
OWN = ("generators", "environments", "core_state", "last_obs", "episode_starts", "extra")
OTHERS = "processes"  # under this name, in a checkpoint of several processes, the parts of all but process 0


def capture_state(model: RecurrentAlgorithm) -> dict[str, Any]:
    """Return the run's state between two updates: weights, optimizer, counters, generators, environments, memory.

    Several processes capture together: process 0 gets the parts of all, the others need nothing of what they get.
    `"environments"` is None where the environments cannot tell their state; a run resumed from there is not exact.
    """
    own = _own_part(model)
    others = model.processes.gather(own)[1:]
    return {
        "policy": policy_arrays(model.policy),
        "optimizer": _optimizer_state(model.policy.optimizer),
        "counters": {name: getattr(model, name) for name in COUNTERS},
        **own,
        "episodes": [dict(each) for each in model.ep_info_buffer or ()],
        "successes": [bool(each) for each in model.ep_success_buffer or ()],
        **({OTHERS: others} if others else {}),
    }


def _own_part(model: RecurrentAlgorithm) -> dict[str, Any]:
    obs = model._last_obs
    return {
        "generators": generator_states(model.device),
        "environments": environment_state(model.env),
        "core_state": None if model._core_state is None else model._core_state.cpu().numpy(),
        "last_obs": {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else np.copy(obs),  # type: ignore[arg-type]
        "episode_starts": np.copy(model._last_episode_starts),  # type: ignore[arg-type]
        "extra": model.extra_state(),
    }


def parts_of_state(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each process's own part of a captured state, by rank."""
    return [state, *state.get(OTHERS, ())]


def without_environments(state: dict[str, Any]) -> dict[str, Any]:
    """Return a captured state without what the simulators say of themselves, in which any number may be."""
    others = [{**part, "environments": None} for part in state.get(OTHERS, ())]
    return {**state, "environments": None, **({OTHERS: others} if others else {})}


def restore_state(model: RecurrentAlgorithm, state: dict[str, Any], source: str) -> bool:
    """Put a captured state back into a model built with the same settings.

    Of a state of as many processes as there are now, each takes its own part; of any other number, all begin with new
    environments and generators.

    Returns:
        Whether the environments went on where they were; if not, they were reset and new episodes begin.

    Raises:
        UserError: the state is of another architecture.
    """
    load_policy_arrays(model.policy, state["policy"], source)
    _restore_optimizer(model.policy.optimizer, state["optimizer"], source)
    for name in COUNTERS:
        setattr(model, name, state["counters"][name])
    window = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(state["episodes"], window), deque(state["successes"], window)
    parts = parts_of_state(state)
    if len(parts) != model.processes.size:
        model._last_obs = model._core_state = None  # learn() resets the environments
        # Not the run's own seed: its first levels and actions would come again.
        model.set_random_seed(fresh_seed(model.seed or 0, model.num_timesteps))
        return False
    return _restore_part(model, parts[model.processes.rank])


def _restore_part(model: RecurrentAlgorithm, part: dict[str, Any]) -> bool:
    model.restore_extra_state(part.get("extra", {}))
    exact = part["environments"] is not None and hasattr(model.env, "set_state")
    if exact:
        model.env.set_state(part["environments"])  # type: ignore[union-attr]
        model._last_obs = part["last_obs"]
        model._last_episode_starts = part["episode_starts"]
        core_state = part["core_state"]
        model._core_state = None if core_state is None else torch.as_tensor(core_state, device=model.device)
    else:
        model._last_obs = model._core_state = None  # learn() resets the environments
    restore_generators(part["generators"], model.device)  # last: what stands above may have drawn from them
    return exact


def fresh_seed(seed: int, number: int) -> int:
    """Return another seed in [0, 2**30), unrelated to `seed`, to `seed + 1` and to what other numbers give."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) >> 2


def environment_state(env: Any) -> dict[str, Any] | None:
    """Return the environments' own state, or None where they have no access to it."""
    if not getattr(env, "supports_state", False):
        return None
    state: dict[str, Any] = env.get_state()
    return state


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        str(index): {
            name: np.array(value.cpu().numpy()) if isinstance(value, torch.Tensor) else value
            for name, value in entries.items()
        }
        for index, entries in optimizer.state_dict()["state"].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str) -> None:
    whole = optimizer.state_dict()
    n_parameters = sum(len(group["params"]) for group in whole["param_groups"])
    if state and len(state) != n_parameters:
        raise UserError(
            f"{source} is of another architecture: its optimizer knows {len(state)} of {n_parameters} weights"
        )
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
                # In the weight's own order in memory, which a file does not keep: a fused step goes through both side
                # by side and would give a channels-last weight another one's moments.
                entries[name] = torch.empty_like(weight, requires_grad=False).copy_(value)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's generators, the CPU's and a GPU's, and of numpy's and Python's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # SB3 and the minibatches draw from the global one
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy(),
        "cuda": [torch.cuda.get_rng_state(device).numpy()] if device.type == "cuda" else [],
        "numpy": [kind, np.asarray(keys), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `generator_states` returned, for this GPU or another one."""
    torch.set_rng_state(torch.from_numpy(np.array(states["torch"])))
    if states["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(np.array(states["cuda"][0])), device)
    np.random.set_state(tuple(states["numpy"]))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
