"""A checkpoint's state, checked against the run that resumes from it before any of it is used.

A file's sha256 shows damage, not tampering. A wrong type or shape would raise an error in the middle of training, far
from its cause.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from msgspec import UNSET, Meta, Struct, UnsetType

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.best_model import Best
from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import flatten_obs_space
from srwm_rl.storage.model_schema import Steps
from srwm_rl.storage.seen_levels import SeenLevels
from srwm_rl.storage.strict_json import convert

MERSENNE_WORDS = 624
LARGEST_MOMENT = 1e18  # the square of the largest gradient norm that a setting allows
LARGEST_STEP = 1e15


class Generators(Struct):
    """The states of the random generators; Python's and numpy's as these packages return them."""

    torch: np.ndarray
    cuda: list[np.ndarray]
    # numpy accepts any position, and would read beyond the keys.
    numpy: tuple[Literal["MT19937"], np.ndarray, Annotated[int, Meta(ge=0, le=MERSENNE_WORDS)], int, float]
    python: tuple[int, tuple[int, ...], float | None]


class ProcessState(Struct, kw_only=True):
    """The entries that every process has of its own."""

    generators: Generators
    environments: dict[str, Any] | None
    core_state: np.ndarray | None
    last_obs: Any  # an array, or arrays by name
    episode_starts: np.ndarray
    extra: dict[str, Any] | UnsetType = UNSET


class Counters(Struct):
    """Stable-Baselines3's counters."""

    num_timesteps: Steps
    _n_updates: Steps
    _episode_num: Steps
    _current_progress_remaining: float


class Episode(Struct):
    """An entry of Stable-Baselines3's `ep_info_buffer`: return, length and ProcGen's game."""

    r: float
    l: float  # noqa: E741
    game: str = ""


class State(ProcessState, kw_only=True):
    """What `capture_state` and the command line write; the first process's own entries are among them."""

    policy: dict[str, np.ndarray]
    optimizer: dict[str, dict[str, Any]]
    counters: Counters
    episodes: list[Episode]
    successes: list[bool]
    metrics: Steps
    log: dict[str, tuple[float | None, list[str]]] | UnsetType = UNSET
    processes: list[ProcessState] | UnsetType = UNSET
    best: Best | UnsetType | None = UNSET
    levels_played: dict[str, Any] | UnsetType = UNSET

    def parts(self) -> list[ProcessState]:
        """Return each process's own entries, by rank."""
        return [self, *(self.processes or ())]


def check_state(model: RecurrentAlgorithm, state: Any, source: str) -> None:
    """Check that a state is possible for this model with these environments.

    Its weights are checked when they are loaded. Every process checks a state of several processes as a whole: all find
    the same error.

    Raises:
        UserError: it is not; the message names the file and the entry.
    """
    declared = convert(state, State, f"{source} is damaged")
    _check_optimizer(model.policy.optimizer, declared.optimizer, source)
    parts = declared.parts()
    n_envs, remainder = divmod(model.n_envs * model.processes.size, len(parts))
    if remainder:
        raise UserError(f"{source} is of {len(parts)} processes, among which the run's environments cannot be divided")
    for part in parts:
        _check_arrays(model, part, n_envs, source)
        _check_generators(part.generators, source)
    if isinstance(declared.best, Best):
        _require(declared.best.steps <= declared.counters.num_timesteps, source, "best score")
    if declared.levels_played is not UNSET:
        SeenLevels.from_tree(declared.levels_played, source)


def _require(fits: bool, source: str, name: str) -> None:
    if not fits:
        raise UserError(f"{source} is damaged: its {name} does not fit; use another checkpoint")


def _check_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, dict[str, Any]], source: str) -> None:
    """Check that there are no moments yet, or those of all weights, of the weight's shape and a possible range."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if entries and entries.keys() != {str(i) for i in range(len(weights))}:
        raise UserError(
            f"{source} is of another architecture: its optimizer knows {len(entries)} of {len(weights)} weights"
        )
    names = _moments_of(optimizer).keys()
    for index, moments in entries.items():
        _require(moments.keys() == names, source, "optimizer")
        for name, value in moments.items():
            _require(isinstance(value, np.ndarray | int | float), source, "optimizer")
            moment, is_step = np.asarray(value), name == "step"
            fits = moment.size == 1 if is_step else moment.shape == weights[int(index)].shape
            _require(moment.dtype.kind in "fiu" and fits, source, "optimizer")
            low = 0.0 if is_step or "sq" in name else -LARGEST_MOMENT
            in_range = (moment >= low) & (moment <= (LARGEST_STEP if is_step else LARGEST_MOMENT))  # False for NaN
            _require(bool(in_range.all()), source, "optimizer")


def _moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps for a weight: what another one with the same settings has after a step."""
    probe = torch.nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    other = type(optimizer)([probe], **optimizer.defaults)
    other.step()
    return dict(other.state[probe])


def size_of_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return how many bytes a checkpoint's moments have, once there are some."""
    n_moments = len(_moments_of(optimizer).keys() - {"step"})
    weights: list[torch.Tensor] = [weight for group in optimizer.param_groups for weight in group["params"]]
    return n_moments * sum(weight.numel() * weight.element_size() for weight in weights)


def _check_arrays(model: RecurrentAlgorithm, part: ProcessState, n_envs: int, source: str) -> None:
    """Check the last observations, the episode starts and the core's state, which have an entry per environment."""
    starts, core_state = part.episode_starts, part.core_state
    _require(starts.ndim == 1 and starts.dtype.kind in "bf", source, "episode_starts")
    if len(starts) != n_envs:
        raise UserError(f"{source} has {len(starts)} environments, not {n_envs}; use the same environments and n_envs")
    expected = flatten_obs_space(model.observation_space)
    obs = part.last_obs if isinstance(model.observation_space, spaces.Dict) else dict.fromkeys(expected, part.last_obs)
    if (
        not isinstance(obs, dict)
        or obs.keys() != expected.keys()
        or not all(_is_array(obs[name], (n_envs, *(space.shape or ()))) for name, space in expected.items())
    ):
        raise UserError(f"{source} has other observations than these; use the same environments and n_envs")
    if core_state is not None:
        new = model.policy.initial_state(n_envs).numpy(force=True)
        # Its type too: weights and observations are converted when they are restored, the core's state is not.
        _require(_is_array(core_state, new.shape) and core_state.dtype == new.dtype, source, "core_state")


def _is_array(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind in "biuf"


def _check_generators(states: Generators, source: str) -> None:
    """Set the states of new generators to them."""
    arrays = [(states.numpy[1], (MERSENNE_WORDS,)), *((state, state.shape) for state in states.cuda)]
    _require(all(_is_array(array, shape) for array, shape in arrays), source, "generators")
    try:
        torch.Generator().set_state(torch.from_numpy(np.array(states.torch)))
        np.random.RandomState().set_state(states.numpy)
        random.Random().setstate(states.python)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        _require(False, source, "generators")
