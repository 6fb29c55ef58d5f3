"""Interventions: an agent whose edits of itself are suppressed, to measure their effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from srwm_rl.agents.evaluation.play_levels import Predictor, State
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.diagnostics import count_heads, state_columns, state_heads
from srwm_rl.nn.layers import COLUMN_GROUPS
from srwm_rl.nn.policy import SRWMPolicy


class FrozenStateAgent:
    """Acts as `agent`, with its state constant from some step of each episode on.

    `after` is the number of steps of each episode before its state is frozen, `part` `[L, S]` true for the elements to
    freeze; None: all.

    From the first step on, an agent with self-modifying heads acts with its slow weight throughout, and one with
    another memory as if every observation were an episode's first. Within a step nothing changes: a core that reads
    what it has just written, as an LSTM does, still does so.
    """

    def __init__(self, agent: Predictor, after: int = 0, part: npt.NDArray[np.bool_] | None = None) -> None:
        self.agent, self.after, self.part = agent, after, part

    def predict(
        self, observation: Any, state: State = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, State]:
        """Act on `[B, ...]` observations as SB3's `predict` does; the state is the agent's and a clock `[1, B]`."""
        actions, new = self.agent.predict(observation, state and state[:1], episode_start, deterministic)
        if new is None:  # no memory
            return actions, None
        starts = np.zeros(len(actions), bool) if episode_start is None else np.asarray(episode_start, bool)
        after = new[0]  # [L, B, S]
        before = np.zeros_like(after) if state is None else np.where(starts[:, None], 0, state[0])
        clock = np.zeros((1, len(actions)), np.int64) if state is None else np.where(starts, 0, state[1])
        frozen = (clock >= self.after)[..., None]  # [1, B, 1]
        if self.part is not None:
            frozen = frozen & self.part[:, None]
        return actions, (np.where(frozen, before, after), clock + 1)


def memory_part(policy: SRWMPolicy) -> npt.NDArray[np.bool_]:
    """Return the mask `[L, S]` of the memory in the core's state: all but the earlier inputs of a short convolution."""
    return (state_heads(policy.core) >= 0).cpu().numpy()


def head_part(policy: SRWMPolicy, layer: int, head: int) -> npt.NDArray[np.bool_]:
    """Return the mask `[L, S]` of one head's elements in the core's state, layers and heads counted from 0.

    Raises:
        UserError: there is no such head.
    """
    core = policy.core
    n_heads = count_heads(core)
    if not n_heads:
        raise UserError(f"core {policy.core_name!r} carries nothing, so that it has no head to leave out")
    if not (0 <= layer < core.state_layers and 0 <= head < n_heads):
        raise UserError(
            f"there is no head {layer}.{head}: core {policy.core_name!r} has layers 0 to {core.state_layers - 1} with "
            f"heads 0 to {n_heads - 1}; write layer.head, such as 0.0"
        )
    part = np.zeros((core.state_layers, core.state_size), np.bool_)
    part[layer] = (state_heads(core)[layer] == head).cpu().numpy()
    return part


def column_part(policy: SRWMPolicy, groups: str | Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return the mask `[L, S]` of groups of columns of every head's shift in the core's state.

    With this mask `FrozenStateAgent` undoes the edits of these columns after every step: each step reads them as they
    were learned, and edits of the other columns are kept.

    Args:
        policy: the agent's.
        groups: of `srwm_rl.nn.layers.COLUMN_GROUPS`: "y", "query", "key", "beta"; a list, or one string with commas.

    Raises:
        UserError: the core has no such columns, or carries none from step to step, or a group is unknown.
    """
    names = parse_groups(groups)
    columns = state_columns(policy.core).cpu().numpy()
    if not (policy.core.carries_over and (columns >= 0).any()):
        raise UserError(
            f"core {policy.core_name!r} carries no edits of y, query, key and beta columns that could be undone; "
            "cores that do are srwm and sr_delta"
        )
    return np.isin(columns, [COLUMN_GROUPS.index(name) for name in names])


def parse_groups(groups: str | Sequence[str]) -> tuple[str, ...]:
    """Return the named groups in the columns' order, each once.

    Raises:
        UserError: a group is unknown, or none is named.
    """
    names = [name.strip() for name in (groups.split(",") if isinstance(groups, str) else groups)]
    for name in names:
        if name not in COLUMN_GROUPS:
            hint = did_you_mean(name, COLUMN_GROUPS)
            raise UserError(f"there is no group of columns {name!r}{hint}")
    if not names:
        raise UserError("no group of columns is named; give some of y, query, key, beta")
    return tuple(name for name in COLUMN_GROUPS if name in names)


def undo_edits(agent: Predictor, policy: SRWMPolicy, groups: str | Sequence[str]) -> FrozenStateAgent:
    """Return `agent` with the edits of some columns undone after every step; arguments as of `column_part`."""
    return FrozenStateAgent(agent, part=column_part(policy, groups))
