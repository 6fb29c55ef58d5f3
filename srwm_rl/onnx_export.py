"""A policy's acting step as an ONNX graph; the memory's state is an input and an output of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.nn.few_shot_cnns import FewShotCNN
from srwm_rl.nn.policy import MASKED, SRWMPolicy
from srwm_rl.nn.spaces import ACTION_MASK, mask_size

OPSET = 20
STATE, EPISODE_START, VALUE, NEW_STATE = "state", "episode_start", "value", "new_state"
PROBABILITIES, MEAN, STD = "action_probabilities", "action_mean", "action_std"
_RESERVED = (STATE, EPISODE_START, VALUE, NEW_STATE, PROBABILITIES, MEAN, STD)
_UNSIGNED = ("uint16", "uint32", "uint64")  # torch supports few operations on these: the graph takes int64
_TRACED_BATCH = 2  # torch.export treats 0 and 1 as constants


class Port(NamedTuple):
    """An input or output of the graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # "B" where the batch goes

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


class ActingStep(nn.Module):
    """One acting step of a policy as a module that `torch.export` can trace.

    The outputs describe the action's distribution; the caller samples from it. It has a copy of the policy whose
    CNNs compute in float32.

    Attributes:
        keys: of the observation's parts.
        inputs: the observation's parts by their keys (with "observation_" in front where the name is taken), then
            `state` `[L, B, S]` and `episode_start` `[B]`.
        outputs: `action_probabilities` `[B, n]` (of a MultiDiscrete action those of each choice after one another, of
            a MultiBinary one that of each 1), or for Box `action_mean` and `action_std` `[B, *action_shape]`; then
            `value` `[B]` and `new_state` `[L, B, S]` (names are unique in a graph).
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        super().__init__()
        self.policy = float32_copy(policy)
        ports = _observation_ports(policy)
        self.keys = tuple(ports)
        state_shape = (policy.core.state_layers, "B", policy.core.state_size)
        self.inputs = (
            *ports.values(),
            Port(STATE, "float32", state_shape),
            Port(EPISODE_START, "bool", ("B",)),
        )
        space = policy.action_space
        choices = (MEAN, STD) if isinstance(space, spaces.Box) else (PROBABILITIES,)
        shape = space.shape if isinstance(space, spaces.Box) else (policy.action_net.out_features,)
        self.outputs = (
            *(Port(name, "float32", ("B", *shape)) for name in choices),
            Port(VALUE, "float32", ("B",)),
            Port(NEW_STATE, "float32", state_shape),
        )

    def forward(self, obs: tuple[Tensor, ...], state: Tensor, episode_start: Tensor) -> tuple[Tensor, ...]:
        """Map `inputs`, the observation's as one tuple, to `outputs`."""
        policy = self.policy
        parts = dict(zip(self.keys, obs, strict=True))
        features = policy.encode(parts, episode_start.shape[0])  # [B, I]
        y, state = policy.core(features[None], state, episode_start[None])
        latent_pi, latent_vf = policy.mlp_extractor(y[0])
        raw, masks = policy.action_net(latent_pi), policy.action_masks(parts)
        raw = raw if masks is None else raw.masked_fill(~masks, MASKED)
        return (*self._distribution(raw), policy.value_net(latent_vf).squeeze(-1), state)

    def _distribution(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Map the action head's output `[B, .]` to the distribution's parameters."""
        space = self.policy.action_space
        if isinstance(space, spaces.Box):
            mean = raw.reshape(-1, *space.shape)
            return mean, self.policy.log_std.exp().reshape(space.shape).expand_as(mean)
        if isinstance(space, spaces.MultiBinary):
            return (raw.sigmoid(),)
        sizes = space.nvec.ravel().tolist() if isinstance(space, spaces.MultiDiscrete) else [raw.shape[-1]]
        return (torch.cat([logits.softmax(-1) for logits in raw.split(sizes, -1)], -1),)


def float32_copy(policy: SRWMPolicy) -> SRWMPolicy:
    """Return a copy on the CPU, in evaluation mode, whose CNNs compute in float32."""
    copy = deepcopy(policy).cpu()
    copy.set_training_mode(False)
    for module in copy.modules():
        if isinstance(module, (ImpalaCNN, FewShotCNN)):
            module.precision = "float32"
    return copy


def _observation_ports(policy: SRWMPolicy) -> dict[str, Port]:
    """Return the inputs by the observation's keys; an action mask is the last one."""
    obs_spaces, ports = dict(policy.obs_spaces), dict[str, Port]()
    if policy.masked:
        obs_spaces[ACTION_MASK] = spaces.MultiBinary(mask_size(policy.action_space) or 0)
    for key, space in obs_spaces.items():
        name, dtype, taken = key, str(np.dtype(space.dtype)), {port.name for port in ports.values()}
        while name in _RESERVED or name in taken or (name != key and name in obs_spaces):
            name = f"observation_{name}"
        ports[key] = Port(name, "int64" if dtype in _UNSIGNED else dtype, ("B", *(space.shape or ())))
    return ports


def to_onnx(step: ActingStep, metadata: dict[str, str]) -> bytes:
    """Return an acting step as the content of an ONNX file that takes batches of any size.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        UserError: the core, one of the user's own, cannot be exported.
    """
    import onnx

    model = _graph(step)
    for node in model.graph.node:  # stack traces with this machine's paths
        del node.metadata_props[:]
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    for port, info in zip((*step.inputs, *step.outputs), (*model.graph.input, *model.graph.output), strict=True):
        for axis, dim in zip(port.shape, info.type.tensor_type.shape.dim, strict=True):
            if isinstance(axis, str):
                dim.dim_param = axis
    model.producer_name, model.producer_version = "srwm-rl", metadata.get("srwm_rl_version", "")
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _graph(step: ActingStep) -> Any:
    """Export a step to torch's ModelProto.

    Through torch.export, which refuses branches on a tensor's values; tracing would keep the example's branch silently.
    """
    *obs, state, starts = (
        torch.from_numpy(
            np.zeros([_TRACED_BATCH if isinstance(axis, str) else axis for axis in port.shape], port.dtype)
        )
        for port in step.inputs
    )
    batch = torch.export.Dim("B")
    dynamic = (tuple({0: batch} for _ in obs), {1: batch}, {0: batch})
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(step, (tuple(obs), state, starts), dynamic_shapes=dynamic)
            program = torch.onnx.export(
                exported,
                input_names=[port.name for port in step.inputs],
                output_names=[port.name for port in step.outputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except ImportError:
            raise
        except Exception as error:  # any error of a user's core
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            raise UserError(f"core {step.policy.core_name!r} cannot be written as a graph: {reason}") from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress messages and warnings of torch's exporter."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
