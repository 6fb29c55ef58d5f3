"""A residual CNN of frames in C, on the matrix tiles (AMX) of a processor that has them: outputs and gradients.

A thread computes one frame after the other, all activations in its cache; torch writes each to memory. Arithmetic is
that of bfloat16 with sums in float32. The gradient computes the activations again, so that none are stored.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.backends import is_forward_mode
from srwm_rl.ops.checks import has_memory
from srwm_rl.ops.cpu import load_kernel

KINDS = ("conv and pool", "patches", "block")  # CONV_AND_POOL, PATCHES, BLOCK of csrc/cnn_kernel.h
SIDE = 16  # of a tile: widths are multiples of it
MOST_LAYERS, MOST_CHANNELS, MOST_PIXELS = 64, 256, 2**16  # what the arrays of csrc/cnn_kernel.h hold
MOST_WEIGHTS = 2**19  # with more, preparing them takes longer than torch for a few frames


class Layer(NamedTuple):
    """A part of a CNN, from images of `h_in` x `w_in` pixels and `c_in` channels to `h` x `w` and `c`.

    `kind`: a convolution of 3 x 3 followed by max pooling with stride 2; a convolution of patches of `kernel` x
    `kernel` pixels that do not overlap; or a residual block, `x + conv(relu(conv(relu(x))))`, of 3 x 3.
    """

    kind: Literal["conv and pool", "patches", "block"]
    kernel: int
    h_in: int
    w_in: int
    c_in: int
    h: int
    w: int
    c: int

    @property
    def n_convs(self) -> int:
        """The number of its convolutions."""
        return 2 if self.kind == "block" else 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The shape of the weight of each of its convolutions."""
        return (self.c, self.c_in, self.kernel, self.kernel)


_SIZES = ("kind", "conv", "kernel", "h_in", "w_in", "c_in", "h", "w", "c")
_COUNTS = ("n", "n_layers", "n_convs", "n_shares", "grain", "next")
_POINTERS = ("layers", "frames", "y", "grad_y", "weights", "biases", "grad_weights", "grad_biases")


class _Layer(ctypes.Structure):
    """`Layer` of csrc/cnn_kernel.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in _SIZES)


class _Cnn(ctypes.Structure):
    """`Cnn` of csrc/cnn_kernel.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_float),
        ("failed", ctypes.c_int),
        ("prepared", ctypes.c_void_p),
    )


@cache
def has_tiles() -> bool:
    """Return whether the C library, the processor and the system have what the CNN needs."""
    kernel = load_kernel()
    return not isinstance(kernel, str) and bool(kernel.library.srwm_cpu_has_tiles())


def can_run(layers: Sequence[Layer]) -> bool:
    """Return whether a CNN of these layers can run here: widths are multiples of 16, the frames' channels few.

    CNNs with so many weights that torch can be faster are left to it.
    """
    if not layers or not has_tiles() or len(layers) > MOST_LAYERS:
        return False
    first, *others = layers
    return (
        first.kind != "block"
        and first.kernel * first.c_in <= SIDE
        and all(layer.kind != "patches" for layer in others)
        and all(layer.c % SIDE == 0 and layer.c <= MOST_CHANNELS for layer in layers)
        and sum(layer.n_convs * math.prod(layer.weight_shape) for layer in layers) <= MOST_WEIGHTS
        and all(min(layer.h, layer.w) > 0 and layer.h_in * (layer.w_in + 2) <= MOST_PIXELS for layer in layers)
    )


def encode(
    frames: Tensor, layers: Sequence[Layer], scale: float, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """Return the rectified output of a CNN, `[N, c * h * w]` of its last layer, channels first, in bfloat16.

    Args:
        frames: uint8 `[N, h, w, C]` on the CPU. They must not change before the backward pass.
        layers: For which `can_run` is true.
        scale: Factor on the frames' numbers.
        weights: float32 `[c, c_in, kernel, kernel]` of each convolution, in the order of their use.
        biases: float32 `[c]` of each.

    Raises:
        ValueError: tensors of other shapes or types than the layers have.
        MemoryError: too little memory for a thread's activations.
    """
    _check(frames, layers, weights, biases)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *biases)):
        output: Tensor = _Encode.apply(frames, layers, scale, *weights, *biases)
        return output
    return _forward(frames, layers, scale, weights, biases)


def _forward(
    frames: Tensor, layers: Sequence[Layer], scale: float, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    last = layers[-1]
    y = torch.empty(len(frames), last.c * last.h * last.w, dtype=torch.bfloat16)
    _run(frames, layers, scale, weights, biases, y=y)
    return y


def _check(frames: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    first, shapes = layers[0], [layer.weight_shape for layer in layers for _ in range(layer.n_convs)]
    if not can_encode(frames) or frames.shape[1:] != (first.h_in, first.w_in, first.c_in):
        raise ValueError(f"frames must be uint8 [N, {first.h_in}, {first.w_in}, {first.c_in}] on the CPU")
    sizes = [tuple(tensor.shape) for tensor in (*weights, *biases)]
    if sizes != [*shapes, *(shape[:1] for shape in shapes)]:
        raise ValueError(f"weights and biases must be of the layers' shapes, {shapes}")
    if not all(are_float32(tensors) for tensors in (weights, biases)):
        raise ValueError("weights and biases must be float32 on the CPU")


def are_float32(tensors: Iterable[Tensor]) -> bool:
    """Return whether all tensors are float32 on the CPU."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, layers: Sequence[Layer], scale: float, *parameters: Tensor) -> Tensor:
        frames = frames.clone() if frames.is_inference() else frames.contiguous()
        ctx.save_for_backward(frames, *parameters)
        ctx.layers, ctx.scale = layers, scale
        half = len(parameters) // 2
        return _forward(frames, layers, scale, parameters[:half], parameters[half:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        gradients = [torch.empty(parameter.shape) for parameter in parameters]
        grad_y = grad.to(torch.bfloat16).contiguous()
        outputs = {"grad_weights": _pointers(gradients[:half]), "grad_biases": _pointers(gradients[half:])}
        _run(frames, ctx.layers, ctx.scale, parameters[:half], parameters[half:], grad_y=grad_y, **outputs)
        return None, None, None, *gradients


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _run(
    frames: Tensor,
    layers: Sequence[Layer],
    scale: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    **more: Any,
) -> None:
    kernel = load_kernel()
    assert not isinstance(kernel, str)
    structs, n_convs = (_Layer * len(layers))(), 0
    for struct, (kind, *sizes), layer in zip(structs, layers, layers, strict=True):
        for name, number in zip(_SIZES, (KINDS.index(kind), n_convs, *sizes), strict=True):
            setattr(struct, name, number)
        n_convs += layer.n_convs
    frames = frames.contiguous()
    weights, biases = [weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]
    inputs = {"layers": structs, "frames": frames, "weights": _pointers(weights), "biases": _pointers(biases), **more}
    cnn = _Cnn(len(frames), len(layers), n_convs, scale=scale)
    for name, part in inputs.items():
        setattr(cnn, name, part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part))
    failed = kernel.library.srwm_cpu_cnn(ctypes.byref(cnn), kernel.level, torch.get_num_threads(), kernel.parallel)
    if failed:
        raise MemoryError("too little memory for a CNN's activations")


def can_encode(frames: Tensor) -> bool:
    """Return whether `encode` takes these frames."""
    return (
        frames.dtype == torch.uint8
        and frames.device.type == "cpu"
        and frames.dim() == 4
        and len(frames) > 0
        and has_memory(frames)
        and not is_forward_mode()
    )
