"""What a network does to itself while it acts: its edits, how far it has drifted, its rates and its policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor

from srwm_rl.nn.cores import Core
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.layers import COLUMN_GROUPS, DeltaLayer, SRDeltaLayer, SRWMLayer
from srwm_rl.nn.policy import Obs, SRWMPolicy

RATES = COLUMN_GROUPS
"""The four column groups that a rate of their own belongs to, in the order of `StepDiagnostics.rates`."""


class StepDiagnostics(NamedTuple):
    """One acting step of B environments, seen from inside; H is 0 for a core that carries nothing.

    W_t is the weight with which the step acts, after the reset that an episode start asks for.
    """

    actions: Tensor  # [B, *action_shape], as drawn
    values: Tensor  # [B]
    entropy: Tensor  # [B], nats
    choices: Tensor  # [B, N]: the actions' probabilities; for Box the mean of each of their N numbers
    std: Tensor | None  # [B, N], for Box alone
    edit: Tensor  # [L, B, H], |W_{t+1} - W_t|, Frobenius norm
    drift: Tensor  # [L, B, H], |W_t - W_0|
    rates: Tensor | None  # [L, B, H, 4] in (0, 1), for y, query, key and beta; None: the core has none
    core_state: Tensor  # [L, B, S], the new one


def introspect(
    policy: SRWMPolicy, obs: Obs, core_state: Tensor, episode_starts: Tensor, deterministic: bool = False
) -> StepDiagnostics:
    """Act as `SRWMPolicy.act` does (equal torch seeds give equal actions) and tell what happened inside.

    Args:
        policy: with any core. Where it has self-modifying heads, all of `StepDiagnostics` is there (an SR-Delta head's W is its
            two weights together); other cores have no rates, and their edit and drift are the norms of the state's
            change and of the state, head by head if there are heads.
        obs: `[B, ...]` or a dict of such.
        core_state: `[L, B, S]`.
        episode_starts: `[B]`; the state is zeroed *before* the step where it is non-zero.
        deterministic: the most probable action instead of a sample.
    """
    before = core_state.masked_fill(episode_starts[:, None] != 0, 0)
    with torch.no_grad(), record_rates(policy.core) as rates:
        distribution, values, after = policy._step(obs, core_state, episode_starts)
        actions = distribution.get_actions(deterministic=deterministic)
        entropy = distribution.entropy()
    choices, std = _describe(distribution)
    assert entropy is not None  # it is for squashed Gaussians alone, which this policy does not have
    return StepDiagnostics(
        actions.reshape(-1, *(policy.action_space.shape or ())),
        values,
        entropy,
        choices,
        std,
        head_norms(policy.core, after - before),
        head_norms(policy.core, before),
        torch.stack(rates) if rates else None,
        after,
    )


def _describe(distribution: Distribution) -> tuple[Tensor, Tensor | None]:
    """Return `choices` and `std` of `StepDiagnostics`."""
    inner: Any = distribution.distribution
    if isinstance(inner, list):  # one Categorical per part of a MultiDiscrete action
        return torch.cat([each.probs for each in inner], -1), None
    if isinstance(inner, torch.distributions.Normal):
        return inner.mean, inner.stddev
    return inner.probs, None


def state_heads(core: Core) -> Tensor:
    """Return which head each float of the core's state belongs to, `[L, S]`; all to 0 where there are no heads."""
    # Only of our own stacks is it known that layer l's state is row l; a user's core may be made of the same layers.
    layers = core.layers if isinstance(core, StackCore) else [None] * core.state_layers
    rows = [_layer_heads(layer, core.state_size) for layer in layers]
    return torch.stack(rows).to(next(core.parameters()).device) if rows else torch.zeros(0, core.state_size)


def _layer_heads(layer: object, size: int) -> Tensor:
    if not isinstance(layer, SRWMLayer | DeltaLayer):
        return torch.zeros(size, dtype=torch.long)
    # Each block of the state is [H, ...]: an SR-Delta layer has two, its shift and its fast weight.
    blocks = [layer.shift_size, size - layer.shift_size] if isinstance(layer, SRDeltaLayer) else [size]
    heads = torch.arange(layer.n_heads)
    return torch.cat([heads.repeat_interleave(block // layer.n_heads) for block in blocks])


def count_heads(core: Core) -> int:
    """Return H, heads per layer that carry something: 1 for a core without heads, 0 for one without a state."""
    heads = state_heads(core)
    return int(heads.max()) + 1 if heads.numel() else 0


def head_norms(core: Core, state: Tensor) -> Tensor:
    """Return the Euclidean norm of each head's part of `state` `[L, B, S]`, `[L, B, H]`."""
    heads = state_heads(core)
    norms = state.new_zeros(*state.shape[:2], count_heads(core))  # [L, B, H]
    if norms.numel():
        norms.scatter_add_(-1, heads[:, None].expand(state.shape), state.square())
    return norms.sqrt()


@contextmanager
def record_rates(core: Core) -> Iterator[list[Tensor]]:
    """Collect the rates of a stack's self-modifying layers as they run, `[B, H, 4]` each.

    Calls must be of one step: what later steps read depends on the edits in between.
    """
    heard: list[Tensor] = []
    stack = core.layers if isinstance(core, StackCore) else ()
    layers = [each for each in stack if isinstance(each, SRWMLayer)]
    for layer in layers:
        # In front of the method: what the heads are fed is its argument, and not known outside the layer.
        object.__setattr__(layer, "recur", partial(_recur, layer, heard))
    try:
        yield heard
    finally:
        for layer in layers:
            object.__delattr__(layer, "recur")


def _recur(
    layer: SRWMLayer, heard: list[Tensor], heads: Tensor, state: Tensor, episode_starts: Tensor
) -> tuple[Tensor, Tensor]:
    if len(heads) != 1:
        raise ValueError(f"rates can be told one step at a time, not of {len(heads)} in one call")
    heard.append(rates(layer, heads[0], state.masked_fill(episode_starts[0, :, None] != 0, 0)))
    return type(layer).recur(layer, heads, state, episode_starts)


def rates(layer: SRWMLayer, heads: Tensor, state: Tensor) -> Tensor:
    """Return the rates that the heads choose, `[B, H, 4]`: `sigmoid(x @ W_t)` of the beta columns.

    Args:
        layer: the layer.
        heads: `[B, H, D]`, what its heads are fed.
        state: `[B, state_size]`, the layer's state, resets done.
    """
    n_heads, size, columns = layer.shift_shape
    shift = state[:, : n_heads * size * columns].unflatten(-1, layer.shift_shape)  # an SR-Delta layer carries more
    fast = (layer.slow_weight() + shift)[..., -len(RATES) :]  # [B, H, D, 4]
    return torch.einsum("bhd,bhdn->bhn", heads, fast).sigmoid()
