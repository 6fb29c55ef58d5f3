"""The acting step as a graph of its own in ONNX, the memory's state an input and an output of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.nn import layers
from srwm_rl.nn.cores import Core
from srwm_rl.nn.cores.recurrent import SegmentedCore
from srwm_rl.nn.encoders import ImpalaCNN
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.ops.reference import delta_scan_reference, srwm_scan_reference

OPSET = 20
STATE, EPISODE_START, VALUE, NEW_STATE = "state", "episode_start", "value", "new_state"
PROBABILITIES, MEAN, STD = "action_probabilities", "action_mean", "action_std"
_RESERVED = (STATE, EPISODE_START, VALUE, NEW_STATE, PROBABILITIES, MEAN, STD)
_UNSIGNED = ("uint16", "uint32", "uint64")  # with which torch can do little: the graph takes them as int64
_TRACED_BATCH = 2  # 0 and 1 would be taken for constants
Recurrence = tuple[Tensor, Tensor]


class Port(NamedTuple):
    """An input or output of the graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # "B" where the batch goes

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


class ActingStep(nn.Module):
    """One acting step of a policy, in operations that depend on no number's value.

    The state is zeroed where an episode starts, then the core runs over one step, its recurrence as in
    `srwm_rl.ops.reference`. No action is drawn: how to choose is the caller's.

    Args:
        policy: with any core; it is copied, and the copy's CNNs compute in float32.

    Attributes:
        inputs: the observation's parts by their keys (with "observation_" in front where the name is taken), then
            `state` `[L, B, S]` and `episode_start` `[B]`.
        outputs: `action_probabilities` `[B, n]` (of a MultiDiscrete action those of each choice after one another, of
            a MultiBinary one that of each 1), or for Box `action_mean` and `action_std` `[B, *action_shape]`; then
            `value` `[B]` and `new_state` `[L, B, S]`, which no graph may call `state` again.
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        super().__init__()
        self.policy = float32_copy(policy)
        for module in self.policy.modules():
            if isinstance(module, ImpalaCNN):  # to split the batch by its size would fix the size
                module.forward = module._encode  # type: ignore[method-assign]
        state_shape = (policy.core.state_layers, "B", policy.core.state_size)
        names = _part_names(policy)
        self.inputs = (
            *(Port(names[key], _dtype(part), ("B", *(part.shape or ()))) for key, part in policy.obs_spaces.items()),
            Port(STATE, "float32", state_shape),
            Port(EPISODE_START, "bool", ("B",)),
        )
        self.outputs = (
            *(Port(name, "float32", ("B", *shape)) for name, shape in _choices(policy.action_space).items()),
            Port(VALUE, "float32", ("B",)),
            Port(NEW_STATE, "float32", state_shape),
        )

    def forward(self, parts: tuple[Tensor, ...], state: Tensor, episode_start: Tensor) -> tuple[Tensor, ...]:
        """Map `inputs`, the observation's parts as one tuple, to `outputs`."""
        policy = self.policy
        features = policy.encode(dict(zip(policy.obs_spaces, parts, strict=True)), episode_start.shape[0])  # [B, I]
        state = state.masked_fill(episode_start[:, None], 0)
        y, state = _run_core(policy.core, features[None], state, episode_start[None])
        latent_pi, latent_vf = policy.mlp_extractor(y[0])
        return (*self._distribution(policy.action_net(latent_pi)), policy.value_net(latent_vf).squeeze(-1), state)

    def _distribution(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Map what the last layer says of the action, `[B, .]`, to its distribution's numbers."""
        space = self.policy.action_space
        if isinstance(space, spaces.Box):
            mean = raw.reshape(-1, *space.shape)
            return mean, self.policy.log_std.exp().reshape(space.shape).expand_as(mean)
        if isinstance(space, spaces.MultiBinary):
            return (raw.sigmoid(),)
        sizes = space.nvec.tolist() if isinstance(space, spaces.MultiDiscrete) else [raw.shape[-1]]
        return (torch.cat([each.softmax(-1) for each in raw.split(sizes, -1)], -1),)


def float32_copy(policy: SRWMPolicy) -> SRWMPolicy:
    """Return a copy on the CPU, in evaluation mode, whose CNNs compute in float32."""
    copy = deepcopy(policy).cpu()
    copy.set_training_mode(False)
    for module in copy.modules():
        if isinstance(module, ImpalaCNN):
            module.precision = "float32"
    return copy


def _part_names(policy: SRWMPolicy) -> dict[str, str]:
    names: dict[str, str] = {}
    for key in policy.obs_spaces:
        name = key
        while name in _RESERVED or name in names.values() or (name != key and name in policy.obs_spaces):
            name = f"observation_{name}"
        names[key] = name
    return names


def _choices(space: spaces.Space[Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes, without batch, of what describes an action's distribution."""
    if isinstance(space, spaces.Box):
        return {MEAN: space.shape, STD: space.shape}
    n = space.nvec.sum() if isinstance(space, spaces.MultiDiscrete) else space.n  # type: ignore[attr-defined]
    return {PROBABILITIES: (int(n),)}


def _dtype(space: spaces.Space[Any]) -> str:
    name = str(np.dtype(space.dtype))
    return "int64" if name in _UNSIGNED else name


def _run_core(core: Core, x: Tensor, state: Tensor, starts: Tensor) -> Recurrence:
    """Run a core over one step, `x` `[1, B, I]`, from a state that is reset already."""
    if isinstance(core, SegmentedCore):  # whose forward looks for the steps at which to reset
        return core.stretch(x, state)
    result: Recurrence = core(x, state, starts)
    return result


@contextlib.contextmanager
def _plain_recurrences() -> Iterator[None]:
    """Let the layers run single steps in plain PyTorch, which a graph can hold, and reset without looking."""
    references: dict[str, Any] = {"srwm_scan": srwm_scan_reference, "delta_scan": delta_scan_reference}
    before = {name: getattr(layers, name) for name in references}
    for name, reference in references.items():
        setattr(layers, name, partial(_single_step, before[name], reference))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(layers, name, function)


def _single_step(
    whole: Callable[..., Recurrence], reference: Callable[..., Recurrence], *arguments: Any, **options: Any
) -> Recurrence:
    """Run the reference over one step, without its branch on whether an episode starts."""
    *inputs, carried, starts = arguments
    if len(inputs[0]) != 1:  # a trainer's, in another thread
        return whole(*arguments, **options)
    carried = carried.masked_fill((starts[0] != 0).reshape(-1, *[1] * (carried.dim() - 1)), 0)
    return reference(*inputs, carried, None, **options)


def to_onnx(step: ActingStep, metadata: dict[str, str]) -> bytes:
    """Return an acting step as the content of an ONNX file; batches of any size go through it.

    Args:
        step: what to write.
        metadata: what the file says of itself beside.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        UserError: the core, one of the user's own, cannot be written as a graph.
    """
    import onnx

    model = _graph(step)
    for node in model.graph.node:  # which lines of which files of this machine it comes from
        del node.metadata_props[:]
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    for port, info in zip((*step.inputs, *step.outputs), (*model.graph.input, *model.graph.output), strict=True):
        for axis, dim in zip(port.shape, info.type.tensor_type.shape.dim, strict=True):
            if isinstance(axis, str):
                dim.dim_param = axis
    model.producer_name, model.producer_version = "srwm-rl", metadata.get("srwm_rl_version", "")
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _graph(step: ActingStep) -> Any:
    """Trace a step; return torch's ModelProto of it.

    torch.onnx's exporter of traced modules would take the branches of one example for the whole truth; the one through
    torch.export refuses what depends on a number's value.
    """
    *parts, state, starts = (
        torch.from_numpy(
            np.zeros([_TRACED_BATCH if isinstance(axis, str) else axis for axis in port.shape], port.dtype)
        )
        for port in step.inputs
    )
    batch = torch.export.Dim("B")
    dynamic = (tuple({0: batch} for _ in parts), {1: batch}, {0: batch})
    with _quiet(), _plain_recurrences(), torch.no_grad():
        try:
            exported = torch.export.export(step, (tuple(parts), state, starts), dynamic_shapes=dynamic)
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
        except Exception as error:  # whatever a core of the user's own ends in, deep in torch
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            raise UserError(f"core {step.policy.core_name!r} cannot be written as a graph: {reason}") from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter says of its own progress and plans."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
