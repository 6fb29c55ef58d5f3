"""A policy written down as lists of operations, for C: the parts of it that go row by row, and one acting step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from srwm_rl.nn.cores.srwm import SRWMCore
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.distributions import UncheckedCategorical
from srwm_rl.nn.encoders import EPISODE_STEP, MAIN_KEY, Encoder, ImpalaCNN
from srwm_rl.nn.layers import FeedForwardBlock, MemoryLayer, SRWMLayer
from srwm_rl.nn.policy import Obs, SRWMPolicy, as_floats
from srwm_rl.ops.cpu import Kernel, load_kernel
from srwm_rl.ops.program import Features, Program

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class UnsupportedModuleError(Exception):
    """A part of a policy that no program can play."""


class Inputs:
    """What the programs of a policy take of its observations.

    Args:
        policy: which one; its encoder is an `Encoder`.
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        self._parts, networks = [], dict(policy.features_extractor.images.items())
        for key in _keys(policy.features_extractor):
            space, network = policy.obs_spaces[key], networks.get(key)
            is_box = network is None and isinstance(space, spaces.Box)
            shape = (get_flattened_obs_dim(space),) if is_box else space.shape or ()
            self._parts.append((key, shape, network, None if is_box else space))

    def of(self, obs: Obs, n: int) -> list[Tensor]:
        """Return what a program takes of `n` observations, in its order, as floats `[n, width]`.

        Images are given as the features that their network makes of them, with a gradient where that is enabled.
        """
        given, made = obs if isinstance(obs, dict) else {MAIN_KEY: obs}, []
        for key, shape, network, space in self._parts:
            each = given[key].reshape(n, *shape)
            if network is not None:
                made.append(network(each))
            elif space is None:
                made.append(each.float())
            else:
                made.append(as_floats(each, space).flatten(1))
        return made


class LoweredPolicy(NamedTuple):
    """A policy, written down."""

    inputs: Inputs  # what the first of them takes
    parts: list[Program]  # what lies before, between and after the core's memories
    log_prob_and_entropy: Program | None  # the last of them, with what the heads say of an action that was chosen
    surrogate: Program | None  # the same, with PPO's loss
    step: Program | None  # all of it, memories and the choice of an action too


def write(policy: SRWMPolicy) -> LoweredPolicy:
    """Write a policy down.

    Raises:
        UnsupportedModuleError: a part that no program can play.
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
        and type(policy.features_extractor) is Encoder
        and type(policy.mlp_extractor) is MlpExtractor
    )
    if not known:
        raise UnsupportedModuleError
    # All but the networks for images, which torch runs.
    read = (policy.features_extractor.mlp, core, policy.mlp_extractor, policy.action_net, policy.value_net)
    if not all(_is_readable(each) for part in read for each in part.parameters()):
        raise UnsupportedModuleError
    parts = _parts(policy, core, kernel)  # type: ignore[arg-type]
    log_prob_and_entropy = surrogate = step = None
    if type(policy.action_dist) is UncheckedCategorical:
        log_prob_and_entropy = _last(policy, core, kernel, "log_prob_and_entropy")  # type: ignore[arg-type]
        surrogate = _last(policy, core, kernel, "surrogate")  # type: ignore[arg-type]
        step = _step(policy, core, kernel)  # type: ignore[arg-type]
    return LoweredPolicy(Inputs(policy), parts, log_prob_and_entropy, surrogate, step)


def _is_readable(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous()


def _parts(policy: SRWMPolicy, core: StackCore, kernel: Kernel) -> list[Program]:
    """Write one program up to the first memory, one from each to the next, and one to the heads."""
    layers: Sequence[MemoryLayer] = core.layers  # type: ignore[assignment]
    program = Program(kernel)
    programs, x = [program], _linear(program, _encoder(program, policy), core.project)
    for layer, after, block in zip(layers, (*layers[1:], None), core.blocks, strict=True):
        for each in _before(program, layer, x):
            program.output(each)
        if after is not None:
            programs.append(program := Program(kernel))
            x = _after(program, layer, block, *_carried_on(program, core))  # type: ignore[arg-type]
    return [*programs, _last(policy, core, kernel)]


def _last(
    policy: SRWMPolicy,
    core: StackCore,
    kernel: Kernel,
    end: Literal["logits", "log_prob_and_entropy", "surrogate"] = "logits",
) -> Program:
    """Write what follows the last memory: what the heads make, or say of an action, and the value; or PPO's loss."""
    program = Program(kernel)
    x = _after(program, core.layers[-1], core.blocks[-1], *_carried_on(program, core))  # type: ignore[arg-type]
    made, value = _actor_and_critic(program, policy, x)
    if end != "logits":
        made = program.log_prob_and_entropy(made, program.input(1))
    if end == "surrogate":
        program.surrogate(made, value)
    else:
        program.output(made)
        program.output(value)
    return program


def _carried_on(program: Program, core: StackCore) -> tuple[Features, Features]:
    """Take what went past a memory, and what it gave."""
    return program.input(core.output_size, wanted=True), program.input(core.output_size, wanted=True)


def _step(policy: SRWMPolicy, core: StackCore, kernel: Kernel) -> Program | None:
    """Write one acting step, where a program knows the memories; the value is its first output."""
    layers: Sequence[SRWMLayer] = core.layers  # type: ignore[assignment]
    known = type(core) is SRWMCore and all(type(each) is SRWMLayer for each in layers)
    if not known or any(each.frozen_weight is not None for each in layers):
        return None
    program = Program(kernel)
    x = _linear(program, _encoder(program, policy), core.project)
    for layer, block in zip(layers, core.blocks, strict=True):
        stream, heads = _before(program, layer, x)
        kept = None if layer.gate is None else _linear(program, heads, layer.gate, "sigmoid")
        y = program.heads(heads, layer.weight, kept, layer.shift_bound)
        x = _after(program, layer, block, stream, y)  # type: ignore[arg-type]
    logits, value = _actor_and_critic(program, policy, x)
    program.output(value)
    program.sample(logits, program.input(logits.n))
    return program


def _keys(encoder: Encoder) -> list[str]:
    """Name the parts of an observation in the order in which a program takes them; see `_encoder`."""
    step, images = [EPISODE_STEP] if encoder.step is not None else [], [*encoder.images]
    first, second = (encoder.vectors, images) if len(list(encoder.mlp.children())) else (images, encoder.vectors)
    return [*step, *first, *second, *encoder.plain]


def _encoder(program: Program, policy: SRWMPolicy) -> Features:
    """Write the encoder; its features come to lie side by side, in its own order: images, MLP, the agent's past.

    So what the MLP's last layer makes has to follow the images' features at once.
    """
    encoder = policy.features_extractor
    if any(type(each) is not ImpalaCNN for each in encoder.images.values()):
        raise UnsupportedModuleError
    widths = {key: get_flattened_obs_dim(space) for key, space in policy.obs_spaces.items()}
    widths |= {key: each.head.out_features for key, each in encoder.images.items()}  # type: ignore[union-attr, misc]
    step = program.input(1) if encoder.step is not None else None
    layers, vectors = list(encoder.mlp.children()), None
    last = max((i for i, each in enumerate(layers) if type(each) is nn.Linear), default=0)
    if layers:
        vectors = _sequence(program, layers[:last], _joined([program.input(widths[key]) for key in encoder.vectors]))
    features = [program.input(widths[key], wanted=True) for key in encoder.images]
    if vectors is not None:
        features.append(_sequence(program, layers[last:], vectors))
    else:
        features += [program.input(widths[key]) for key in encoder.vectors]
    features += [program.input(widths[key]) for key in encoder.plain]
    if step is not None and encoder.step is not None:
        features.append(program.sines(step, encoder.step.periods))
    return _joined(features)


def _before(program: Program, layer: MemoryLayer, x: Features) -> tuple[Features, Features]:
    """Write what a layer does before its memory: return what goes past it and what goes in."""
    normed = _norm(program, x, layer.layer_norm)
    heads = normed if layer.norm == "pre" else x
    if layer.input_softmax:
        heads = program.softmax(heads, layer.head_size)
    return normed if layer.norm == "residual" else x, heads


def _after(program: Program, layer: MemoryLayer, block: FeedForwardBlock, stream: Features, y: Features) -> Features:
    """Write what a layer does with what its memory gave, and the block that follows."""
    x = _linear(program, y, layer.out, add=stream)
    inner = _linear(program, _norm(program, x, block.layer_norm), block.up, "relu")
    return _linear(program, inner, block.down, add=x)


def _actor_and_critic(program: Program, policy: SRWMPolicy, x: Features) -> tuple[Features, Features]:
    extractor = policy.mlp_extractor
    pi, vf = (list(each.children()) for each in (extractor.policy_net, extractor.value_net))
    made = _linear(program, _sequence(program, pi, x), policy.action_net)
    return made, _linear(program, _sequence(program, vf, x), policy.value_net)


def _norm(program: Program, x: Features, norm: nn.Module) -> Features:
    if type(norm) is nn.Identity:
        return x
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise UnsupportedModuleError
    return program.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _sequence(program: Program, layers: list[nn.Module], x: Features) -> Features:
    """Write linear layers, each with or without an activation after it."""
    none = nn.Identity()
    for before, layer, after in zip([none, *layers], layers, [*layers[1:], none], strict=False):
        if type(layer) is nn.Linear:
            x = _linear(program, x, layer, _ACTIVATIONS.get(type(after), "identity"))
        elif type(layer) not in _ACTIVATIONS or type(before) is not nn.Linear:
            raise UnsupportedModuleError
    return x


def _linear(
    program: Program, x: Features, layer: nn.Module, activation: str = "identity", add: Features | None = None
) -> Features:
    # A weight that is no parameter is made anew from others at every call.
    if type(layer) is not nn.Linear or layer._parameters.get("weight") is None:
        raise UnsupportedModuleError
    return program.linear(x, layer.weight, layer.bias, activation, add)


def _joined(parts: list[Features]) -> Features:
    assert all(one.first + one.n == other.first for one, other in pairwise(parts)), "these do not lie side by side"
    return Features(parts[0].first, sum(each.n for each in parts))
