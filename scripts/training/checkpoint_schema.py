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
from srwm_rl.errors import UserError
from srwm_rl.storage.model_schema import Score, Steps, check_finite, check_shapes, shapes_of
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
    python: tuple[int, list[int], float | None]


class ProcessState(Struct, kw_only=True):
    """The entries that every process has of its own."""

    generators: Generators
    environments: dict[str, Any] | None
    core_state: np.ndarray | None
    last_obs: Any  # an array, or arrays by name
    episode_starts: np.ndarray
    extra: dict[str, Any] | UnsetType = UNSET


class Counters(
    Struct,
    rename={
        "n_updates": "_n_updates",
        "episode_num": "_episode_num",
        "progress_remaining": "_current_progress_remaining",
    },
):
    """Stable-Baselines3's counters."""

    num_timesteps: Steps
    n_updates: Steps
    episode_num: Steps
    progress_remaining: float


class Episode(Struct, rename={"episode_return": "r", "length": "l"}):
    """An entry of Stable-Baselines3's `ep_info_buffer`."""

    episode_return: float
    length: float
    game: str = ""


class BestModel(Score):
    """The run's best model, and the step at which its score was measured."""

    steps: Steps


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
    best: BestModel | UnsetType | None = UNSET
    levels_played: dict[str, Any] | UnsetType = UNSET

    def parts(self) -> list[ProcessState]:
        """Return each process's own entries, by rank."""
        return [self, *(self.processes or ())]


def check_types(state: Any, source: str) -> State:
    """Return a state whose entries have the declared types."""
    return convert(state, State, f"{source} is damaged")


def check_state(model: RecurrentAlgorithm, state: Any, source: str) -> None:
    """Check that a state is possible for this model with these environments.

    Every process checks a state of several processes as a whole: all find the same error.

    Raises:
        UserError: it is not; the message names the file and the entry.
    """
    declared = check_types(state, source)
    check_shapes(shapes_of(model.policy), declared.policy, source)
    check_finite(declared.policy, source)
    _check_optimizer(model.policy.optimizer, declared.optimizer, source)
    parts = declared.parts()
    n_envs, remainder = divmod(model.n_envs * model.processes.size, len(parts))
    if remainder:
        raise UserError(f"{source} is of {len(parts)} processes, among which the run's environments cannot be divided")
    for part in parts:
        _check_arrays(model, part, n_envs, source)
        _check_generators(part.generators, source)
    if isinstance(declared.best, BestModel) and declared.best.steps > declared.counters.num_timesteps:
        raise _damaged(source, "best score")
    if declared.levels_played is not UNSET:
        SeenLevels.from_tree(declared.levels_played, source)


def _damaged(source: str, name: str) -> UserError:
    return UserError(f"{source} is damaged: its {name} does not fit; use another checkpoint")


def _check_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, dict[str, Any]], source: str) -> None:
    """Check that there are no moments yet, or all moments of all weights."""
    shapes = [tuple(weight.shape) for group in optimizer.param_groups for weight in group["params"]]
    if entries and entries.keys() != {str(i) for i in range(len(shapes))}:
        raise UserError(
            f"{source} is of another architecture: its optimizer knows {len(entries)} of {len(shapes)} weights"
        )
    names = _moment_names(optimizer)
    for index, moments in entries.items():
        if moments.keys() != names or not all(_fits(name, moments[name], shapes[int(index)]) for name in names):
            raise _damaged(source, "optimizer")


def _fits(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an optimizer's moment has the weight's shape and a possible range; `step` is one number."""
    if not isinstance(value, np.ndarray | int | float):
        return False
    moment = np.asarray(value)
    if moment.dtype.kind not in "fiu" or (moment.size != 1 if name == "step" else moment.shape != shape):
        return False
    low = 0.0 if name == "step" or "sq" in name else -LARGEST_MOMENT
    high = LARGEST_STEP if name == "step" else LARGEST_MOMENT
    return bool(((moment >= low) & (moment <= high)).all())  # False for NaN


def _moment_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return what an optimizer keeps for each weight, after a step of another one with the same settings."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    probe = type(optimizer)([weight], **optimizer.defaults)
    probe.step()
    return set(probe.state[weight])


def _check_arrays(model: RecurrentAlgorithm, part: ProcessState, n_envs: int, source: str) -> None:
    """Check the last observations, the episode starts and the core's state, which have an entry per environment."""
    starts = part.episode_starts
    if starts.ndim != 1 or starts.dtype.kind not in "bf":
        raise _damaged(source, "episode_starts")
    if len(starts) != n_envs:
        raise UserError(f"{source} has {len(starts)} environments, not {n_envs}; use the same environments and n_envs")
    space = model.observation_space
    expected = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    obs = part.last_obs if isinstance(part.last_obs, dict) else {"": part.last_obs}
    if obs.keys() != expected.keys() or not all(
        _is_array(obs[name], (n_envs, *(expected[name].shape or ()))) for name in expected
    ):
        raise UserError(f"{source} has other observations than these; use the same environments and n_envs")
    if part.core_state is not None:
        new = model.policy.initial_state(n_envs).numpy(force=True)
        # Its type too: weights and observations are converted when they are restored, the core's state is not.
        if not _is_array(part.core_state, new.shape) or part.core_state.dtype != new.dtype:
            raise _damaged(source, "core_state")


def _is_array(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind in "biuf"


def _check_generators(states: Generators, source: str) -> None:
    """Set the states of new generators to them."""
    if not _is_array(states.numpy[1], (MERSENNE_WORDS,)):
        raise _damaged(source, "generators")
    version, internal, gauss_next = states.python
    try:
        torch.Generator().set_state(torch.from_numpy(np.array(states.torch)))
        np.random.RandomState().set_state(states.numpy)
        random.Random().setstate((version, tuple(internal), gauss_next))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _damaged(source, "generators") from error
    if not all(_is_array(state, state.shape) for state in states.cuda):
        raise _damaged(source, "generators")
