"""Acting on a CPU as one call of C, for policies of vectors: in small networks what lies between operations costs most."""

from __future__ import annotations

import logging
from itertools import pairwise

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from torch import Tensor, nn

from srwm_rl.cores.srwm import SRWMCore
from srwm_rl.encoders import EPISODE_STEP, MAIN_KEY, Encoder
from srwm_rl.layers import FeedForwardBlock, SRWMLayer
from srwm_rl.ops.cpu import load_kernel
from srwm_rl.ops.tape import Rows, Tape
from srwm_rl.policy import ActStep, Obs, SRWMPolicy, as_floats

logger = logging.getLogger(__name__)
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class _UnknownError(Exception):
    """A part of the policy that no tape can play."""


class FusedActing:
    """Call it like `policy.act`: the same results up to rounding, the same draws from torch's generator, in one call.

    For policies on the CPU that read vectors, remember by an `SRWMCore` and choose among `Discrete` actions; others act
    as they are. Weights are read where they are, so that the policy may learn between two calls. The first step is
    compared with the policy's own; where they differ, the policy acts as it is, and the log says so.

    Args:
        policy: that acts, sampling its actions.
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        self.policy = policy
        self._tape: Tape | None = None
        self._memory: list[int] = []  # where the tape's weights are
        self.given_up = False

    @torch.no_grad()
    def __call__(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        """Choose actions; arguments and result as in `SRWMPolicy.act`."""
        if not self.given_up and (self._tape is None or [w.data_ptr() for w in self._tape.weights] != self._memory):
            self._try_to_write(obs, core_state, episode_starts)
        if self._tape is None:
            return self.policy.act(obs, core_state, episode_starts)
        return self._play(self._tape, obs, core_state, episode_starts)

    def _play(self, tape: Tape, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        policy, given = self.policy, obs if isinstance(obs, dict) else {MAIN_KEY: obs}
        encoder, batch = policy.features_extractor, len(episode_starts)
        inputs = [as_floats(given[key], policy.parts[key]) for key in _keys(encoder)]
        clocks = torch.empty(batch, int(policy.action_space.n)).exponential_()  # type: ignore[attr-defined]
        (values, log_probs), actions, core_state = tape.run([*inputs, clocks], core_state, episode_starts)
        return ActStep(actions, values.view(batch), log_probs.view(batch), core_state)

    def _try_to_write(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> None:
        self._tape, self.given_up = None, True
        try:
            tape = write_tape(self.policy)
        except _UnknownError:
            return
        generator = torch.get_rng_state()
        found = self._play(tape, obs, core_state, episode_starts)
        torch.set_rng_state(generator)  # as if this had not been
        if wrong := self._difference(found, obs, core_state, episode_starts):
            logger.warning("acting goes on without its C kernel: %s", wrong)
            return
        self._tape, self._memory, self.given_up = tape, [each.data_ptr() for each in tape.weights], False

    def _difference(self, found: ActStep, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> str:
        """Say in what a step's result differs from the policy's own."""
        distribution, values, state = self.policy._step(obs, core_state, episode_starts)
        expected = ActStep(found.actions, values, distribution.log_prob(found.actions), state)
        for name in ("values", "log_probs", "core_state"):
            if not torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4, equal_nan=True):
                return f"its {name} differ from those of the policy"
        return ""


def write_tape(policy: SRWMPolicy) -> Tape:
    """Write down a policy's step: values and log-probabilities are the outputs, actions the choices.

    Raises:
        _UnknownError: a part that no tape can play.
    """
    kernel, encoder, core = load_kernel(), policy.features_extractor, policy.core
    known = (
        not isinstance(kernel, str)
        and policy.device.type == "cpu"
        and type(encoder) is Encoder
        and not encoder.images
        and type(core) is SRWMCore
        and isinstance(policy.action_space, spaces.Discrete)
        and type(policy)._step is SRWMPolicy._step
    )
    if not known or any(each.dtype != torch.float32 or not each.is_contiguous() for each in policy.parameters()):
        raise _UnknownError
    tape = Tape(kernel)  # type: ignore[arg-type]
    x = _core(tape, core, _encoder(tape, encoder, policy))  # type: ignore[arg-type]
    extractor = policy.mlp_extractor
    logits = _linear(tape, _sequence(tape, extractor.policy_net, x), policy.action_net)
    tape.output(_linear(tape, _sequence(tape, extractor.value_net, x), policy.value_net))
    tape.choose(logits, tape.input(logits.n))
    return tape


def _keys(encoder: Encoder) -> list[str]:
    """Name the parts of an observation in the order in which the tape takes them."""
    return [*([EPISODE_STEP] if encoder.step is not None else []), *encoder.vectors, *encoder.plain]


def _encoder(tape: Tape, encoder: Encoder, policy: SRWMPolicy) -> Rows:
    """Write the encoder; its features come to lie side by side, in its own order."""
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


def _core(tape: Tape, core: SRWMCore, x: Rows) -> Rows:
    x = _linear(tape, x, core.project)
    for layer, block in zip(core.layers, core.blocks, strict=True):
        x = _block(tape, block, _layer(tape, layer, x))
    return x


def _layer(tape: Tape, layer: nn.Module, x: Rows) -> Rows:
    if type(layer) is not SRWMLayer or layer.frozen_weight is not None:
        raise _UnknownError
    normed = _norm(tape, x, layer.layer_norm)
    heads = normed if layer.norm == "pre" else x
    if layer.input_softmax:
        heads = tape.softmax(heads, layer.head_size)
    kept = None if layer.gate is None else tape.linear(heads, layer.gate.weight, layer.gate.bias, "sigmoid")
    y = tape.heads(heads, layer.weight, kept, layer.shift_bound)
    return tape.linear(y, layer.out.weight, None, add=normed if layer.norm == "residual" else x)


def _block(tape: Tape, block: nn.Module, x: Rows) -> Rows:
    if type(block) is not FeedForwardBlock:
        raise _UnknownError
    inner = tape.linear(_norm(tape, x, block.layer_norm), block.up.weight, block.up.bias, "relu")
    return tape.linear(inner, block.down.weight, block.down.bias, add=x)


def _norm(tape: Tape, x: Rows, norm: nn.Module) -> Rows:
    return tape.layer_norm(x, norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else x


def _sequence(tape: Tape, modules: nn.Module, x: Rows) -> Rows:
    """Write linear layers, each with or without an activation after it."""
    layers = list(modules.children())
    for layer, after in pairwise([*layers, nn.Identity()]):
        if type(layer) is nn.Linear:
            x = _linear(tape, x, layer, _ACTIVATIONS.get(type(after), "identity"))
        elif type(layer) not in _ACTIVATIONS:
            raise _UnknownError
    return x


def _linear(tape: Tape, x: Rows, layer: nn.Linear, activation: str = "identity") -> Rows:
    return tape.linear(x, layer.weight, layer.bias, activation)


def _joined(parts: list[Rows]) -> Rows:
    assert all(one.first + one.n == other.first for one, other in pairwise(parts)), "these rows are not side by side"
    return Rows(parts[0].first, sum(each.n for each in parts))
