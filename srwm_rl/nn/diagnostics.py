"""Diagnostics of an acting step: the size of the edits and of the shift, the learning rates and the policy."""

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


class StepDiagnostics(NamedTuple):
    """Diagnostics of one acting step of B environments; H is 0 for a core without state.

    W_t is the fast weight that the step reads, after a reset.
    """

    actions: Tensor  # [B, *action_shape]
    values: Tensor  # [B]
    entropy: Tensor  # [B], nats
    choices: Tensor  # [B, N]: the actions' probabilities; for Box the means
    std: Tensor | None  # [B, N], for Box only
    edit: Tensor  # [L, B, H], |W_{t+1} - W_t|, Frobenius norm
    drift: Tensor  # [L, B, H], |W_t - W_0|
    rates: Tensor | None  # [L, B, H, 4] in (0, 1), in COLUMN_GROUPS' order; None: the core has none
    core_state: Tensor  # [L, B, S], the new one


def introspect(
    policy: SRWMPolicy, obs: Obs, core_state: Tensor, episode_starts: Tensor, deterministic: bool = False
) -> StepDiagnostics:
    """Act as `SRWMPolicy.act` does (equal torch seeds give equal actions) and return diagnostics of the step.

    An SR-Delta head's W is its two weights together. Cores without self-modifying heads have no rates; their edit and
    drift are the norms of the state's change and of the state, by head if there are heads.
    """
    before = core_state.masked_fill(episode_starts[:, None] != 0, 0)
    with torch.no_grad(), record_rates(policy.core) as rates:
        distribution, values, after = policy._step(obs, core_state, episode_starts)
        actions = distribution.get_actions(deterministic=deterministic)
        entropy = distribution.entropy()
    choices, std = describe_distribution(distribution)
    assert entropy is not None  # None only for squashed Gaussians, which this policy does not have
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


def describe_distribution(distribution: Distribution) -> tuple[Tensor, Tensor | None]:
    """Return `choices` and `std` of `StepDiagnostics`."""
    inner: Any = distribution.distribution
    if isinstance(inner, list):  # one Categorical per part of a MultiDiscrete action
        return torch.cat([categorical.probs for categorical in inner], -1), None
    if isinstance(inner, torch.distributions.Normal):
        return inner.mean, inner.stddev
    return inner.probs, None


def state_heads(core: Core) -> Tensor:
    """Return the head to which each float of the core's state belongs, `[L, S]`.

    It is 0 in a core without heads, -1 for floats of no head: the earlier inputs of a short convolution.
    """
    # Only in a StackCore is layer l's state known to be row l; a user's core may use the same layers otherwise.
    heads = torch.full((core.state_layers, core.state_size), -1 if isinstance(core, StackCore) else 0)
    layers: Any = core.layers if isinstance(core, StackCore) else ()
    for row, layer in zip(heads, layers, strict=False):
        row[: layer.state_size] = _layer_heads(layer, layer.state_size)
    return heads.to(next(core.parameters()).device)


def _layer_heads(layer: object, size: int) -> Tensor:
    if not isinstance(layer, SRWMLayer | DeltaLayer):
        return torch.zeros(size, dtype=torch.long)
    # Each block of the state is [H, ...]: an SR-Delta layer has two, its shift and its fast weight.
    blocks = [layer.shift_size, size - layer.shift_size] if isinstance(layer, SRDeltaLayer) else [size]
    heads = torch.arange(layer.n_heads)
    return torch.cat([heads.repeat_interleave(block // layer.n_heads) for block in blocks])


def state_columns(core: Core) -> Tensor:
    """Return the index in `COLUMN_GROUPS` of the column that each float of the core's state shifts, `[L, S]`.

    It is -1 for floats that belong to no shift of a self-referential weight.
    """
    layers = core.layers if isinstance(core, StackCore) else ()
    columns = torch.full((core.state_layers, core.state_size), -1)
    for row, layer in zip(columns, layers, strict=False):
        if isinstance(layer, SRWMLayer):
            groups = torch.repeat_interleave(torch.arange(len(COLUMN_GROUPS)), torch.tensor(layer.widths))
            row[: layer.shift_size] = groups.repeat(layer.shift_size // len(groups))
    return columns


def has_fast_weights(core: Core) -> bool:
    """Return whether the core's state is of weights that it edits; that of an LSTM, for example, is not."""
    return isinstance(core, StackCore) and any(isinstance(layer, SRWMLayer | DeltaLayer) for layer in core.layers)


def count_heads(core: Core) -> int:
    """Return H, the heads per layer: 1 for a core without heads, 0 for one without state."""
    heads = state_heads(core)
    return int(heads.max()) + 1 if heads.numel() else 0


def head_norms(core: Core, state: Tensor) -> Tensor:
    """Return the Euclidean norm of each head's part of `state` `[L, B, S]`, `[L, B, H]`."""
    heads = state_heads(core)[:, None].expand(state.shape)
    norms = state.new_zeros(*state.shape[:2], count_heads(core))  # [L, B, H]
    if norms.numel():
        norms.scatter_add_(-1, heads.clamp(min=0), state.square().masked_fill(heads < 0, 0))
    return norms.sqrt()


@contextmanager
def record_rates(core: Core) -> Iterator[list[Tensor]]:
    """Collect the learning rates of a stack's self-modifying layers as they run, `[B, H, 4]` each.

    Within the context the core may run single steps only.

    Raises:
        ValueError: from a call of several steps.
    """
    recorded: list[Tensor] = []
    stack = core.layers if isinstance(core, StackCore) else ()
    layers = [layer for layer in stack if isinstance(layer, SRWMLayer)]

    def recur(layer: SRWMLayer, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        if len(heads) != 1:
            raise ValueError(f"record_rates needs one step at a time, not {len(heads)} in one call")
        recorded.append(rates(layer, heads[0], state.masked_fill(episode_starts[0, :, None] != 0, 0)))
        return type(layer).recur(layer, heads, state, episode_starts)

    for layer in layers:
        # A wrapped method, because the heads' inputs are its argument; a hook would see the layer's input only.
        object.__setattr__(layer, "recur", partial(recur, layer))
    try:
        yield recorded
    finally:
        for layer in layers:
            object.__delattr__(layer, "recur")


def rates(layer: SRWMLayer, heads: Tensor, state: Tensor) -> Tensor:
    """Return the learning rates `[B, H, 4]` of heads with inputs `[B, H, D]` and state `[B, state_size]` after resets.

    They are `sigmoid(x @ W_t)` of the beta columns.
    """
    n_heads, size, columns = layer.shift_shape
    shift = state[:, : n_heads * size * columns].unflatten(-1, layer.shift_shape)  # an SR-Delta layer's state is longer
    fast = (layer.slow_weight() + shift)[..., -len(COLUMN_GROUPS) :]  # [B, H, D, 4]
    return torch.einsum("bhd,bhdn->bhn", heads, fast).sigmoid()
