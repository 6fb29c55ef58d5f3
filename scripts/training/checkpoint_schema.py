"""A checkpoint's state, checked against the run it is to go on with before any of it is taken up.

The files' sha256 tells damage, not malice: whoever writes a file writes its sha256 too. What is of a wrong type or
shape would end in the middle of training, far from its cause.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.storage.model_schema import MAX_STEPS, check_finite, check_score, check_shapes
from srwm_rl.storage.seen_levels import SeenLevels

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm

ENTRIES: dict[str, tuple[type, ...]] = {
    "policy": (dict,),
    "optimizer": (dict,),
    "counters": (dict,),
    "episodes": (list,),
    "successes": (list,),
    "metrics": (int,),
}
# What each of several processes has of its own; the first one's stand beside the entries above.
OWN_ENTRIES: dict[str, tuple[type, ...]] = {
    "generators": (dict,),
    "environments": (dict, type(None)),
    "core_state": (np.ndarray, type(None)),
    "last_obs": (np.ndarray, dict),
    "episode_starts": (np.ndarray,),
}
MERSENNE_WORDS = 624
LARGEST_MOMENT = 1e18  # the square of the largest gradient norm that a setting lets through
OPTIONAL: dict[str, tuple[type, ...]] = {
    "log": (dict,),
    "processes": (list,),
    "best": (dict, type(None)),
    "levels_played": (dict,),
}
OWN_OPTIONAL: dict[str, tuple[type, ...]] = {"extra": (dict,)}


def check_state(model: RecurrentAlgorithm, state: Any, source: str) -> None:
    """Check that a state is one that this model, with these environments, could have been in.

    A state of several processes is checked whole in each of them: all find the same error.

    Raises:
        UserError: it is not; the message names the file and what does not fit.
    """
    if not isinstance(state, dict):
        raise _damaged(source, "state")
    _check_types(state, ENTRIES, OPTIONAL, source)
    _check_weights(model, state["policy"], source)
    _check_optimizer(model, state["optimizer"], source)
    _check_counters(state, source)
    _check_parts(model, state, source)
    _check_logs(state, source)
    _check_best_model(state, source)


def _check_types(
    state: dict[str, Any], entries: dict[str, tuple[type, ...]], optional: dict[str, tuple[type, ...]], source: str
) -> None:
    for name, types in {**entries, **{name: optional[name] for name in optional.keys() & state.keys()}}.items():
        if type(state.get(name, ...)) not in types:
            raise _damaged(source, name)


def _damaged(source: str, name: str) -> UserError:
    return UserError(f"{source} is damaged: its {name} cannot be; use another checkpoint")


def _check_weights(model: RecurrentAlgorithm, policy: dict[str, Any], source: str) -> None:
    if not all(isinstance(each, np.ndarray) for each in policy.values()):
        raise _damaged(source, "policy")
    check_shapes({name: tuple(each.shape) for name, each in model.policy.named_parameters()}, policy, source)
    check_finite(policy, source)


def _check_optimizer(model: RecurrentAlgorithm, entries: dict[str, Any], source: str) -> None:
    """Check that there is nothing yet, or every moment of every weight."""
    optimizer = model.policy.optimizer
    shapes = [tuple(each.shape) for group in optimizer.param_groups for each in group["params"]]
    if entries and entries.keys() != {str(i) for i in range(len(shapes))}:
        raise UserError(
            f"{source} is of another architecture: its optimizer knows {len(entries)} of {len(shapes)} weights"
        )
    names = _moments(optimizer)
    for index, moments in entries.items():
        if not isinstance(moments, dict) or moments.keys() != names:
            raise _damaged(source, "optimizer")
        for name, value in moments.items():
            array = np.asarray(value if isinstance(value, np.ndarray | int | float) else "none")
            fits = array.size == 1 if name == "step" else array.shape == shapes[int(index)]
            if not fits or array.dtype.kind not in "fiu" or not _in_range(array, name):
                raise _damaged(source, "optimizer")


def _in_range(moment: np.ndarray, name: str) -> bool:
    squares = name == "step" or "sq" in name
    low, high = 0.0 if squares else -LARGEST_MOMENT, MAX_STEPS if name == "step" else LARGEST_MOMENT
    return bool(((moment >= low) & (moment <= high)).all())  # which NaN is not


def _moments(optimizer: Any) -> set[str]:
    """Return what such an optimizer keeps for each weight, found by letting another one make a step."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    other = type(optimizer)([weight], **optimizer.defaults)
    other.step()
    return set(other.state[weight])


def _check_counters(state: dict[str, Any], source: str) -> None:
    from srwm_rl.agents.run.checkpoint_state import COUNTERS

    counters = state["counters"]
    for name in COUNTERS:
        value = counters.get(name)
        fraction = name == "_current_progress_remaining" and type(value) is float
        if not fraction and not (type(value) is int and 0 <= value <= MAX_STEPS):
            raise _damaged(source, name)
    if not 0 <= state["metrics"] <= MAX_STEPS:
        raise _damaged(source, "metrics")


def _check_parts(model: RecurrentAlgorithm, state: dict[str, Any], source: str) -> None:
    """Check what each of the processes that wrote the state had of its own; they shared the environments equally."""
    from srwm_rl.agents.run.checkpoint_state import parts_of_state

    parts = parts_of_state(state)
    n_envs, odd = divmod(model.n_envs * model.processes.size, len(parts))
    if odd:
        raise UserError(f"{source} has {len(parts)} processes, who cannot have shared the run's environments equally")
    for part in parts:
        if not isinstance(part, dict):
            raise _damaged(source, "processes")
        _check_types(part, OWN_ENTRIES, OWN_OPTIONAL, source)
        _check_place(model, part, n_envs, source)
        _check_generators(part["generators"], source)


def _check_place(model: RecurrentAlgorithm, state: dict[str, Any], n_envs: int, source: str) -> None:
    """Check the last observations, the episodes' starts and the memory, which have an entry per environment."""
    starts = state["episode_starts"]
    if starts.ndim == 1 and len(starts) != n_envs:
        raise UserError(f"{source} has {len(starts)} environments, not {n_envs}; use the same environments and n_envs")
    if starts.ndim != 1 or starts.dtype.kind not in "bf":
        raise _damaged(source, "episode_starts")
    space = model.observation_space
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    obs = state["last_obs"] if isinstance(state["last_obs"], dict) else {"": state["last_obs"]}
    if obs.keys() != parts.keys():
        raise UserError(f"{source} has other observations than these; use the same environments and n_envs")
    for name, part in parts.items():
        if not _is_array(obs[name], (n_envs, *(part.shape or ()))):
            raise UserError(f"{source} has other observations than these; use the same environments and n_envs")
    if (memory := state["core_state"]) is not None:
        new = model.policy.initial_state(n_envs).numpy(force=True)
        # Its type too: weights and observations are converted when they are taken up, the memory is used as it is.
        if not _is_array(memory, new.shape) or memory.dtype != new.dtype:
            raise _damaged(source, "core_state")


def _is_array(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind in "biuf"


def _check_logs(state: dict[str, Any], source: str) -> None:
    for episode in state["episodes"]:
        numbers = isinstance(episode, dict) and all(type(episode.get(name)) in (int, float) for name in "rl")
        if not numbers or not isinstance(episode.get("game", ""), str):
            raise _damaged(source, "episodes")
    if not all(isinstance(each, bool) for each in state["successes"]):
        raise _damaged(source, "successes")
    for entry in state.get("log", {}).values():
        pair = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in (int, float, type(None))
        if not pair or not isinstance(entry[1], list) or not all(isinstance(each, str) for each in entry[1]):
            raise _damaged(source, "log")


def _check_best_model(state: dict[str, Any], source: str) -> None:
    if (best := state.get("best")) is not None:
        steps = best.get("steps")
        if type(steps) is not int or not 0 <= steps <= state["counters"]["num_timesteps"]:
            raise _damaged(source, "best score")
        check_score({name: value for name, value in best.items() if name != "steps"}, source)
    if "levels_played" in state:
        SeenLevels.from_tree(state["levels_played"], source)


def _check_generators(states: dict[str, Any], source: str) -> None:
    """Put the states into generators that nobody uses."""
    import torch

    try:
        torch.Generator().set_state(torch.from_numpy(np.array(states["torch"])))
        _check_numpy_generator(*states["numpy"])
        version, internal, gauss_next = states["python"]
        random.Random().setstate((version, tuple(internal), gauss_next))
        if not all(_is_array(each, each.shape) for each in states["cuda"]):
            raise TypeError("cuda")
        if gauss_next is not None and type(gauss_next) is not float:
            raise TypeError("python")
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise _damaged(source, "generators") from error


def _check_numpy_generator(kind: Any, keys: Any, position: Any, has_gauss: Any, gauss: Any) -> None:
    # numpy takes any position, and then reads what lies beyond the keys.
    if not (_is_array(keys, (MERSENNE_WORDS,)) and type(position) is int and 0 <= position <= MERSENNE_WORDS):
        raise ValueError("numpy")
    np.random.RandomState().set_state((kind, keys, position, has_gauss, gauss))
