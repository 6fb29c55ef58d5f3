"""Lowering of a policy to programs for the C kernel: its row-wise parts, and one whole acting step."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from srwm_rl.nn.cores.srwm import SRWMCore
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.distributions import UncheckedCategorical
from srwm_rl.nn.encoders import CNNS, EPISODE_STEP, MAIN_KEY, Encoder
from srwm_rl.nn.layers import FeedForwardBlock, MemoryLayer, SRWMLayer
from srwm_rl.nn.policy import Obs, SRWMPolicy
from srwm_rl.nn.short_conv import ShortConv
from srwm_rl.nn.spaces import as_floats
from srwm_rl.ops.cpu import Kernel, load_kernel
from srwm_rl.ops.program import Features, Program

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class UnsupportedModuleError(Exception):
    """The policy has a module that the C kernel has no operations for."""


class Inputs:
    """Conversion of observations to the inputs of a policy's programs."""

    def __init__(self, policy: SRWMPolicy) -> None:
        encoder = policy.features_extractor
        self._scaled, self._scale = encoder.vectors, encoder.vector_scale
        self._sources = []
        for key in _keys(encoder):
            space, network = policy.obs_spaces[key], dict(encoder.images.items()).get(key)
            is_vector = network is None and isinstance(space, spaces.Box)
            shape = (spaces.flatdim(space),) if is_vector else space.shape or ()
            self._sources.append((key, shape, network or (None if is_vector else partial(as_floats, space=space))))

    def of(self, obs: Obs, n: int) -> list[Tensor]:
        """Return the programs' inputs for `n` observations, floats `[n, width]`.

        Images are replaced by the features of their CNN, with a gradient where that is enabled.
        """
        arrays, inputs = obs if isinstance(obs, dict) else {MAIN_KEY: obs}, []
        for key, shape, encode in self._sources:
            array = arrays[key].reshape(n, *shape)
            values = array.float() if encode is None else encode(array).flatten(1)
            inputs.append(values * self._scale if self._scale != 1.0 and key in self._scaled else values)
        return inputs


class LoweredPolicy(NamedTuple):
    """The programs of a policy; the last three are None where the kernel cannot run them."""

    inputs: Inputs  # of the first program and of the step
    programs: list[Program]  # before, between and after the core's recurrences; the last ends in logits and value
    log_prob_and_entropy: Program | None  # the last one, ending in log-probability and entropy of an action instead
    ppo_loss: Program | None  # the last one, ending in PPO's loss
    step: Program | None  # a whole acting step, with memories and sampling


def lower(policy: SRWMPolicy) -> LoweredPolicy:
    """Lower a policy to programs.

    Raises:
        UnsupportedModuleError: a module that the kernel has no operations for.
    """
    kernel, core = load_kernel(), policy.core
    supported = (
        policy.device.type == "cpu"
        and isinstance(core, StackCore)
        and core.carries_over
        and len(policy.action_space.shape or (1,)) == 1
        and type(core).forward is StackCore.forward
        and (core.short_conv is None or type(core.short_conv) is ShortConv)
        and all(type(block) is FeedForwardBlock for block in core.blocks)
        and all(type(layer).forward is MemoryLayer.forward for layer in core.layers)
        and type(policy.features_extractor) is Encoder
        and type(policy.mlp_extractor) is MlpExtractor
    )
    if isinstance(kernel, str) or not supported:
        raise UnsupportedModuleError
    # torch runs the CNNs.
    modules = (policy.features_extractor.mlp, core, policy.mlp_extractor, policy.action_net, policy.value_net)
    if not all(w.dtype == torch.float32 and w.is_contiguous() for module in modules for w in module.parameters()):
        raise UnsupportedModuleError
    programs = _programs(policy, kernel)
    if type(policy.action_dist) is not UncheckedCategorical or policy.masked:
        return LoweredPolicy(Inputs(policy), programs, None, None, None)
    log_prob_and_entropy = _last_program(policy, kernel, "log_prob_and_entropy")
    ppo_loss = _last_program(policy, kernel, "ppo_loss")
    return LoweredPolicy(Inputs(policy), programs, log_prob_and_entropy, ppo_loss, _step(policy, kernel))


def _programs(policy: SRWMPolicy, kernel: Kernel) -> list[Program]:
    """Return one program up to the first recurrence, one from each to the next, and one to the heads' outputs."""
    core: Any = policy.core
    program = Program(kernel)
    programs, x = [program], _linear(program, _encoder(program, policy), core.project)
    if core.short_conv is not None:
        program.output(x)
        programs.append(program := Program(kernel))
        x = program.input(core.output_size, needs_grad=True)
    for i, (layer, block) in enumerate(zip(core.layers, core.blocks, strict=True), start=1):
        for features in _before_memory(program, layer, x):
            program.output(features)
        if i < len(core.layers):
            programs.append(program := Program(kernel))
            x = _after_memory(program, layer, block, *_memory_inputs(program, core))
    return [*programs, _last_program(policy, kernel)]


def _last_program(
    policy: SRWMPolicy, kernel: Kernel, end: Literal["logits", "log_prob_and_entropy", "ppo_loss"] = "logits"
) -> Program:
    """Return the program after the last memory; its outputs are `end` and the value, or PPO's loss."""
    core: Any = policy.core
    program = Program(kernel)
    x = _after_memory(program, core.layers[-1], core.blocks[-1], *_memory_inputs(program, core))
    action_head, value = _actor_and_critic(program, policy, x)
    if end != "logits":
        action_head = program.log_prob_and_entropy(action_head, program.input(1))
    if end == "ppo_loss":
        program.ppo_loss(action_head, value)
    else:
        program.output(action_head)
        program.output(value)
    return program


def _memory_inputs(program: Program, core: StackCore) -> tuple[Features, Features]:
    """Take the residual stream beside a memory, and the memory's output."""
    return program.input(core.output_size, needs_grad=True), program.input(core.output_size, needs_grad=True)


def _step(policy: SRWMPolicy, kernel: Kernel) -> Program | None:
    """Return the program of one acting step, or None where the kernel does not support the memories.

    The value is its first output.
    """
    core: Any = policy.core
    supported = type(core) is SRWMCore and all(type(layer) is SRWMLayer for layer in core.layers)
    if not supported or any(layer.frozen_weight is not None for layer in core.layers):
        return None
    program = Program(kernel)
    x = _linear(program, _encoder(program, policy), core.project)
    if core.short_conv is not None:
        x = program.short_conv(x, core.short_conv.weight, core.layers[0].state_size)
    for layer, block in zip(core.layers, core.blocks, strict=True):
        stream, heads = _before_memory(program, layer, x)
        retention = None if layer.gate is None else _linear(program, heads, layer.gate, "sigmoid")
        y = program.heads(heads, layer.weight, retention, layer.shift_bound)
        x = _after_memory(program, layer, block, stream, y)
    logits, value = _actor_and_critic(program, policy, x)
    program.output(value)
    program.sample(logits, program.input(logits.n))
    return program


def _keys(encoder: Encoder) -> list[str]:
    """Return the observation's keys in the order of the program's inputs; see `_encoder`."""
    step, images = [EPISODE_STEP] if encoder.step is not None else [], [*encoder.images]
    first, second = (encoder.vectors, images) if len(list(encoder.mlp.children())) else (images, encoder.vectors)
    return [*step, *first, *second, *encoder.plain]


def _encoder(program: Program, policy: SRWMPolicy) -> Features:
    """Append the encoder; return its features, contiguous and in the encoder's order: images, MLP, previous inputs.

    For that, the output of the MLP's last layer must directly follow the images' features.
    """
    encoder = policy.features_extractor
    if any(type(cnn) not in CNNS.values() for cnn in encoder.images.values()):
        raise UnsupportedModuleError
    widths = {key: spaces.flatdim(space) for key, space in policy.obs_spaces.items()}
    widths |= {key: cnn.n_features for key, cnn in encoder.images.items()}  # type: ignore[misc]
    step = program.input(1) if encoder.step is not None else None
    layers, vectors = list(encoder.mlp.children()), None
    last = max((i for i, layer in enumerate(layers) if type(layer) is nn.Linear), default=0)
    if layers:
        vectors = _sequence(
            program, layers[:last], _concatenated([program.input(widths[key]) for key in encoder.vectors])
        )
    features = [program.input(widths[key], needs_grad=True) for key in encoder.images]
    if vectors is not None:
        features.append(_sequence(program, layers[last:], vectors))
    else:
        features += [program.input(widths[key]) for key in encoder.vectors]
    features += [program.input(widths[key]) for key in encoder.plain]
    if step is not None and encoder.step is not None:
        features.append(program.sines(step, encoder.step.periods))
    return _concatenated(features)


def _before_memory(program: Program, layer: MemoryLayer, x: Features) -> tuple[Features, Features]:
    """Append a layer up to its memory; return the residual stream and the heads' inputs."""
    normed = _norm(program, x, layer.layer_norm)
    heads = normed if layer.norm == "pre" else x
    if layer.input_softmax:
        heads = program.softmax(heads, layer.head_size)
    return normed if layer.norm == "residual" else x, heads


def _after_memory(
    program: Program, layer: MemoryLayer, block: FeedForwardBlock, stream: Features, y: Features
) -> Features:
    """Append the rest of a layer after its memory's output `y`, and the feed-forward block."""
    x = _linear(program, y, layer.out, add=stream)
    inner = _linear(program, _norm(program, x, block.layer_norm), block.up, "relu")
    return _linear(program, inner, block.down, add=x)


def _actor_and_critic(program: Program, policy: SRWMPolicy, x: Features) -> tuple[Features, Features]:
    extractor = policy.mlp_extractor
    pi, vf = (list(network.children()) for network in (extractor.policy_net, extractor.value_net))
    action_head = _linear(program, _sequence(program, pi, x), policy.action_net)
    return action_head, _linear(program, _sequence(program, vf, x), policy.value_net)


def _norm(program: Program, x: Features, norm: nn.Module) -> Features:
    if type(norm) is nn.Identity:
        return x
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise UnsupportedModuleError
    return program.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _sequence(program: Program, layers: list[nn.Module], x: Features) -> Features:
    """Append linear layers, each with or without an activation after it."""
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
    # A parametrized weight is no parameter: it is computed at every call.
    if type(layer) is not nn.Linear or layer._parameters.get("weight") is None:
        raise UnsupportedModuleError
    return program.linear(x, layer.weight, layer.bias, activation, add)


def _concatenated(parts: list[Features]) -> Features:
    assert all(left.first + left.n == right.first for left, right in pairwise(parts)), "not contiguous"
    return Features(parts[0].first, sum(part.n for part in parts))
