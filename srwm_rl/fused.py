"""A policy on the CPU in a few calls of C: in small networks, what lies between operations costs more than they do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from torch import Tensor, nn

from srwm_rl.cores.srwm import SRWMCore
from srwm_rl.cores.stack import StackCore
from srwm_rl.distributions import ChoiceDistribution
from srwm_rl.encoders import EPISODE_STEP, MAIN_KEY, Encoder
from srwm_rl.layers import FeedForwardBlock, MemoryLayer, SRWMLayer
from srwm_rl.ops.backends import preferred
from srwm_rl.ops.cpu import Kernel, load_kernel
from srwm_rl.ops.tape import Features, Tape
from srwm_rl.policy import ActStep, Obs, SequenceEvaluation, SRWMPolicy, as_floats
from srwm_rl.structure import Structure

logger = logging.getLogger(__name__)
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}
# What the tapes stand for.
_OWN = {
    name: getattr(SRWMPolicy, name)
    for name in ("act", "evaluate_sequence", "evaluation", "encode", "_step", "_heads", "distribution")
}


class UnknownPartError(Exception):
    """A part of a policy that no tape can play."""


class Tapes(NamedTuple):
    """A policy, written down."""

    parts: list[Tape]  # what lies before, between and after the core's memories
    judge: Tape | None  # the last of them, with what the heads say of an action that was chosen
    step: Tape | None  # all of it, memories and the choice of an action too


class FusedPolicy:
    """`act` and `evaluate_sequence` as `SRWMPolicy` has them: the same up to rounding, in a few calls of C.

    For policies on the CPU that read vectors and remember by a `StackCore` (the SRWM and its relatives); others do as
    they always do. An SRWM policy that chooses among `Discrete` actions acts in one call. Weights are read where they
    are, so that the policy may learn between two calls. What the tapes give is first compared with what the policy
    gives; where the two differ, it goes on by itself, and the log says so.

    Args:
        policy: whose weights are used.
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        self.policy = policy
        self._tapes: Tapes | None = None
        self._written_from: Structure | None = None  # also where it could not be written

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedPolicy:
        """Copy the policy; its tapes hold places in memory, and are written anew."""
        return FusedPolicy(deepcopy(self.policy, memo))

    @property
    def given_up(self) -> bool:
        """Whether the policy, as it is now, acts and learns by itself."""
        return self._written_from is not None and self._tapes is None

    def act(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        """Sample actions; arguments and result as in `SRWMPolicy.act`, without gradients."""
        with torch.no_grad():
            tapes = self._ready(obs, core_state, episode_starts)
            if tapes is None:
                return self.policy.act(obs, core_state, episode_starts)
            return self._act(tapes, obs, core_state, episode_starts)

    def evaluate_sequence(
        self, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor, bptt: int | None = None
    ) -> SequenceEvaluation:
        """Run over an unroll that was played; arguments and result as in `SRWMPolicy.evaluate_sequence`."""
        tapes = self._ready(_first(obs), core_state, episode_starts[0])
        if tapes is None or any(each.requires_grad for each in _tensors(obs)):  # a tape has no gradient for those
            return self.policy.evaluate_sequence(obs, actions, core_state, episode_starts, bptt)
        if tapes.judge is None:
            made, values, core_state = self._through(tapes.parts, obs, core_state, episode_starts, bptt)
            return self.policy.evaluation(self.policy.distribution(made), values, actions, core_state)
        parts = [*tapes.parts[:-1], tapes.judge]
        judged, values, core_state = self._through(parts, obs, core_state, episode_starts, bptt, actions)
        log_probs, entropy = judged.unflatten(0, episode_starts.shape).unbind(-1)
        return SequenceEvaluation(values.view(episode_starts.shape), log_probs, entropy, core_state)

    def _ready(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> Tapes | None:
        """Return the tapes, written and compared at the first of the steps they are for."""
        if preferred() not in ("auto", "cpu") or not _as_written_here(self.policy):
            return None
        if self._written_from is None or not self._written_from.unchanged():
            self._written_from = Structure(self.policy)
            self._tapes = self._written(obs, core_state, episode_starts)
        return self._tapes

    def _written(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> Tapes | None:
        if self._written_from is not None and self._written_from.n_hooks:
            return None  # a tape would not call them
        try:
            tapes = write(self.policy)
        except UnknownPartError:
            return None
        with torch.no_grad():
            wrong = self._difference(tapes, obs, core_state, episode_starts)
        if wrong:
            logger.warning("the policy goes on without its C kernel: %s", wrong)
        return None if wrong else tapes

    def _difference(self, tapes: Tapes, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> str:
        """Say in what one step's results differ from the policy's own; nothing is drawn at random."""
        distribution, values, state = self.policy._step(obs, core_state, episode_starts)
        actions = distribution.mode()
        made, *rest = self._through(tapes.parts, obs, core_state, episode_starts[None])
        found = [(self.policy.distribution(made).log_prob(actions), *rest)]
        if tapes.step is not None:  # with clocks that all ring at once the likeliest is chosen
            clocks = torch.ones(len(episode_starts), made.shape[-1])
            step = self._step(tapes.step, obs, core_state, episode_starts, clocks)
            found.append((step.log_probs, step.values, step.core_state))
        if tapes.judge is not None:
            parts = [*tapes.parts[:-1], tapes.judge]
            judged, *rest = self._through(parts, obs, core_state, episode_starts[None], None, actions)
            found.append((judged[:, 0], *rest))
        names = ("log-probabilities", "values", "core state")
        for one in found:
            for name, each, own in zip(names, one, (distribution.log_prob(actions), values, state), strict=True):
                if not torch.allclose(each, own, rtol=1e-3, atol=1e-4, equal_nan=True):
                    return f"its {name} differ from those of the policy"
        return ""

    def _act(self, tapes: Tapes, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        policy, batch = self.policy, len(episode_starts)
        if tapes.step is None:
            made, values, core_state = self._through(tapes.parts, obs, core_state, episode_starts[None])
            distribution = policy.distribution(made)
            actions = distribution.get_actions()
            log_probs = distribution.log_prob(actions)
            return ActStep(actions.reshape(-1, *(policy.action_space.shape or ())), values, log_probs, core_state)
        clocks = torch.empty(batch, int(policy.action_space.n)).exponential_()  # type: ignore[attr-defined]
        return self._step(tapes.step, obs, core_state, episode_starts, clocks)

    def _step(self, tape: Tape, obs: Obs, core_state: Tensor, episode_starts: Tensor, clocks: Tensor) -> ActStep:
        batch = len(episode_starts)
        inputs = [*_inputs(self.policy, obs, batch), clocks]
        (values, log_probs), actions, core_state = tape.step(inputs, core_state, episode_starts)
        return ActStep(actions, values.view(batch), log_probs.view(batch), core_state)

    def _through(
        self,
        parts: list[Tape],
        obs: Obs,
        core_state: Tensor,
        episode_starts: Tensor,
        bptt: int | None = None,
        actions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the last part makes of an unroll, `[T * B, k]` and the values `[T * B]`, and the new core state.

        Args:
            parts: of which the last may ask for `actions`.
            obs, core_state, episode_starts, bptt, actions: see `SRWMPolicy.evaluate_sequence`.
        """
        shape = episode_starts.shape
        layers: Sequence[MemoryLayer] = self.policy.core.layers  # type: ignore[assignment]
        made: Sequence[Tensor] = parts[0].run(_inputs(self.policy, obs, shape.numel()))
        finals = []
        for layer, carried, part in zip(layers, core_state.unbind(0), parts[1:], strict=True):
            stream, x = made
            heads = x.view(*shape, layer.n_heads, layer.head_size)
            y, final = _remember(layer, heads, carried, episode_starts, bptt)
            inputs = [stream, y.reshape(stream.shape)]
            if part is parts[-1] and actions is not None:
                inputs.append(actions.reshape(-1, 1).float())
            made = part.run(inputs)
            finals.append(final)
        numbers, values = made
        return numbers, values.view(-1), finals[0][None] if len(finals) == 1 else torch.stack(finals)


def _as_written_here(policy: SRWMPolicy) -> bool:
    """Say whether neither a subclass nor anybody else has put other methods in the place of the policy's own."""
    return all(getattr(getattr(policy, name), "__func__", None) is own for name, own in _OWN.items())


def write(policy: SRWMPolicy) -> Tapes:
    """Write a policy down.

    Raises:
        UnknownPartError: a part that no tape can play.
    """
    kernel, core = load_kernel(), policy.core
    known = (
        not isinstance(kernel, str)
        and policy.device.type == "cpu"
        and isinstance(core, StackCore)
        and core.carries_over
        and len(policy.action_space.shape or (1,)) == 1
        and type(core).forward is StackCore.forward
        and all(type(each) is FeedForwardBlock for each in core.blocks)
        and all(type(each).forward is MemoryLayer.forward for each in core.layers)
    )
    if not known or any(each.dtype != torch.float32 or not each.is_contiguous() for each in policy.parameters()):
        raise UnknownPartError
    parts = _parts(policy, core, kernel)  # type: ignore[arg-type]
    judge = step = None
    if type(policy.action_dist) is ChoiceDistribution:
        judge = _last(policy, core, kernel, judge=True)  # type: ignore[arg-type]
        step = _step(policy, core, kernel)  # type: ignore[arg-type]
    return Tapes(parts, judge, step)


def _parts(policy: SRWMPolicy, core: StackCore, kernel: Kernel) -> list[Tape]:
    """Write one tape up to the first memory, one from each to the next, and one to the heads."""
    layers: Sequence[MemoryLayer] = core.layers  # type: ignore[assignment]
    tape = Tape(kernel)
    tapes, x = [tape], _linear(tape, _encoder(tape, policy), core.project)
    for layer, after, block in zip(layers, (*layers[1:], None), core.blocks, strict=True):
        for each in _before(tape, layer, x):
            tape.output(each)
        if after is not None:
            tapes.append(tape := Tape(kernel))
            x = _after(tape, layer, block, *_carried_on(tape, core))  # type: ignore[arg-type]
    return [*tapes, _last(policy, core, kernel, judge=False)]


def _last(policy: SRWMPolicy, core: StackCore, kernel: Kernel, judge: bool) -> Tape:
    """Write what follows the last memory: what the heads make, or say of an action, and the value."""
    tape = Tape(kernel)
    x = _after(tape, core.layers[-1], core.blocks[-1], *_carried_on(tape, core))  # type: ignore[arg-type]
    made, value = _actor_and_critic(tape, policy, x)
    tape.output(tape.judge(made, tape.input(1)) if judge else made)
    tape.output(value)
    return tape


def _carried_on(tape: Tape, core: StackCore) -> tuple[Features, Features]:
    """Take what went past a memory, and what it gave."""
    return tape.input(core.output_size, wanted=True), tape.input(core.output_size, wanted=True)


def _step(policy: SRWMPolicy, core: StackCore, kernel: Kernel) -> Tape | None:
    """Write one acting step, where a tape knows the memories; the value is its first output."""
    layers: Sequence[SRWMLayer] = core.layers  # type: ignore[assignment]
    known = type(core) is SRWMCore and all(type(each) is SRWMLayer for each in layers)
    if not known or any(each.frozen_weight is not None for each in layers):
        return None
    tape = Tape(kernel)
    x = _linear(tape, _encoder(tape, policy), core.project)
    for layer, block in zip(layers, core.blocks, strict=True):
        stream, heads = _before(tape, layer, x)
        kept = None if layer.gate is None else _linear(tape, heads, layer.gate, "sigmoid")
        y = tape.heads(heads, layer.weight, kept, layer.shift_bound)
        x = _after(tape, layer, block, stream, y)  # type: ignore[arg-type]
    logits, value = _actor_and_critic(tape, policy, x)
    tape.output(value)
    tape.choose(logits, tape.input(logits.n))
    return tape


def _inputs(policy: SRWMPolicy, obs: Obs, n: int) -> list[Tensor]:
    """Return the parts of `n` observations in the order in which a tape takes them, as floats `[n, width]`."""
    given = obs if isinstance(obs, dict) else {MAIN_KEY: obs}
    spaces_of = policy.parts
    return [
        as_floats(given[key].reshape(n, *(spaces_of[key].shape or ())), spaces_of[key]).flatten(1)
        for key in _keys(policy.features_extractor)
    ]


def _keys(encoder: Encoder) -> list[str]:
    return [*([EPISODE_STEP] if encoder.step is not None else []), *encoder.vectors, *encoder.plain]


def _encoder(tape: Tape, policy: SRWMPolicy) -> Features:
    """Write the encoder; its features come to lie side by side, in its own order."""
    encoder = policy.features_extractor
    if type(encoder) is not Encoder or encoder.images:
        raise UnknownPartError
    widths = {key: get_flattened_obs_dim(space) for key, space in policy.parts.items()}
    step = tape.input(1) if encoder.step is not None else None
    features = []
    if encoder.vectors:
        vectors = _joined([tape.input(widths[key]) for key in encoder.vectors])
        features.append(_sequence(tape, encoder.mlp, vectors))
    features += [tape.input(widths[key]) for key in encoder.plain]
    if step is not None and encoder.step is not None:
        features.append(tape.sines(step, encoder.step.periods))
    return _joined(features)


def _before(tape: Tape, layer: MemoryLayer, x: Features) -> tuple[Features, Features]:
    """Write what a layer does before its memory: return what goes past it and what goes in."""
    normed = _norm(tape, x, layer.layer_norm)
    heads = normed if layer.norm == "pre" else x
    if layer.input_softmax:
        heads = tape.softmax(heads, layer.head_size)
    return normed if layer.norm == "residual" else x, heads


def _after(tape: Tape, layer: MemoryLayer, block: FeedForwardBlock, stream: Features, y: Features) -> Features:
    """Write what a layer does with what its memory gave, and the block that follows."""
    x = _linear(tape, y, layer.out, add=stream)
    inner = _linear(tape, _norm(tape, x, block.layer_norm), block.up, "relu")
    return _linear(tape, inner, block.down, add=x)


def _actor_and_critic(tape: Tape, policy: SRWMPolicy, x: Features) -> tuple[Features, Features]:
    extractor = policy.mlp_extractor
    made = _linear(tape, _sequence(tape, extractor.policy_net, x), policy.action_net)
    return made, _linear(tape, _sequence(tape, extractor.value_net, x), policy.value_net)


def _norm(tape: Tape, x: Features, norm: nn.Module) -> Features:
    if type(norm) is nn.Identity:
        return x
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise UnknownPartError
    return tape.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _sequence(tape: Tape, modules: nn.Module, x: Features) -> Features:
    """Write linear layers, each with or without an activation after it."""
    layers = list(modules.children())
    for layer, after in pairwise([*layers, nn.Identity()]):
        if type(layer) is nn.Linear:
            x = _linear(tape, x, layer, _ACTIVATIONS.get(type(after), "identity"))
        elif type(layer) not in _ACTIVATIONS:
            raise UnknownPartError
    return x


def _linear(
    tape: Tape, x: Features, layer: nn.Module, activation: str = "identity", add: Features | None = None
) -> Features:
    # A weight that is no parameter is made anew from others at every call.
    if type(layer) is not nn.Linear or layer._parameters.get("weight") is None:
        raise UnknownPartError
    return tape.linear(x, layer.weight, layer.bias, activation, add)


def _joined(parts: list[Features]) -> Features:
    assert all(one.first + one.n == other.first for one, other in pairwise(parts)), "these do not lie side by side"
    return Features(parts[0].first, sum(each.n for each in parts))


def _tensors(obs: Obs) -> list[Tensor]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def _first(obs: Obs) -> Obs:
    return {key: each[0] for key, each in obs.items()} if isinstance(obs, dict) else obs[0]


def _remember(
    layer: MemoryLayer, heads: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None
) -> tuple[Tensor, Tensor]:
    """Run a layer's memory over an unroll, cutting its gradient every `bptt` steps."""
    if bptt is None or bptt >= len(heads):
        return layer.remember(heads, state, episode_starts)
    outputs = []
    for part, starts in zip(heads.split(bptt), episode_starts.split(bptt), strict=True):
        y, state = layer.remember(part, state.detach(), starts)
        outputs.append(y)
    return torch.cat(outputs), state
