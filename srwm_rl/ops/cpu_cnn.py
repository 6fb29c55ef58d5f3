"""A residual CNN of frames in C: outputs and gradients.

A thread computes one frame after the other, all activations in its cache; torch writes each to memory. In bfloat16 it
runs on the matrix tiles (AMX) of a processor that has them, with sums in float32; the gradient computes the activations
again, so that none are stored. In float32 it runs on the processor's vectors, and the gradient reads the activations
that it needs.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.backends import is_forward_mode
from srwm_rl.ops.checks import has_memory
from srwm_rl.ops.cpu import LEVELS, load_kernel

KINDS = ("conv and pool", "patches", "block")  # CONV_AND_POOL, PATCHES, BLOCK of csrc/srwm_cpu.c
SIDE = 16  # of a tile: widths are multiples of it
MOST_LAYERS = 64  # of csrc/srwm_cpu.c
MOST_CHANNELS, MOST_PIXELS = 256, 2**16  # what the arrays of csrc/tile_cnn_kernel.h hold
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
_POINTERS = ("layers", "frames", "y", "grad_y", "weights", "biases", "grad_weights", "grad_biases", "kept")


class _Layer(ctypes.Structure):
    """`Layer` of csrc/srwm_cpu.c."""

    _fields_ = tuple((name, ctypes.c_int32) for name in _SIZES)


class _Cnn(ctypes.Structure):
    """`Cnn` of csrc/srwm_cpu.c."""

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


def is_faster(precision: str) -> bool:
    """Return whether a CNN that can run in C is faster so: on tiles, and on AVX2 (on AVX-512 it was not measured)."""
    kernel = load_kernel()
    return not isinstance(kernel, str) and (precision == "bfloat16" or LEVELS[kernel.level] == "AVX2")


def can_run(layers: Sequence[Layer], dtype: torch.dtype) -> bool:
    """Return whether a CNN of these layers can run here in this type, bfloat16 on tiles or float32 on vectors.

    Widths are multiples of 16 on tiles, of 8 on AVX2's vectors; on tiles the frames' channels are few. CNNs with so
    many weights that torch can be faster are left to it.
    """
    n_weights = sum(layer.n_convs * math.prod(layer.weight_shape) for layer in layers)
    if (
        not layers
        or len(layers) > MOST_LAYERS
        or layers[0].kind == "block"
        or any(layer.kind == "patches" for layer in layers[1:])
        or any(min(layer.h, layer.w) < 1 for layer in layers)
        or n_weights > MOST_WEIGHTS
        or not _are_consistent(layers)
    ):
        return False
    return _fit_tiles(layers) if dtype == torch.bfloat16 else dtype == torch.float32 and _n_kept(layers) > 0


def _are_consistent(layers: Sequence[Layer]) -> bool:
    """Return whether the sizes of each layer's output are those of its kind, and of the next layer's input."""
    for layer in layers:
        step = {"conv and pool": 2, "patches": max(layer.kernel, 1), "block": 1}[layer.kind]
        padding = 1 if layer.kind == "conv and pool" else 0
        if (layer.h, layer.w) != ((layer.h_in + padding) // step, (layer.w_in + padding) // step):
            return False
        if (layer.kind != "patches" and layer.kernel != 3) or (layer.kind == "block" and layer.c != layer.c_in):
            return False
    return all((a.h, a.w, a.c) == (b.h_in, b.w_in, b.c_in) for a, b in pairwise(layers))


def _fit_tiles(layers: Sequence[Layer]) -> bool:
    return (
        has_tiles()
        and layers[0].kernel * layers[0].c_in <= SIDE
        and all(layer.c % SIDE == 0 and layer.c <= MOST_CHANNELS for layer in layers)
        and all(layer.h_in * (layer.w_in + 2) <= MOST_PIXELS for layer in layers)
    )


def _n_kept(layers: Sequence[Layer]) -> int:
    """Return how many numbers float32 keeps of a frame for the gradient; 0: such layers cannot run."""
    kernel, cnn = load_kernel(), _Cnn(0, len(layers))
    if isinstance(kernel, str):
        return 0
    structs = _structs(layers)
    cnn.layers = ctypes.addressof(structs)
    return int(kernel.library.srwm_cpu_cnn_kept(ctypes.byref(cnn), kernel.level))


def encode(
    frames: Tensor,
    layers: Sequence[Layer],
    scale: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Return the rectified output of a CNN, `[N, c * h * w]` of its last layer, channels first, in `dtype`.

    Args:
        frames: uint8 `[N, h, w, C]` on the CPU. They must not change before the backward pass.
        layers: For which `can_run` is true with this `dtype`.
        scale: Factor on the frames' numbers.
        weights: float32 `[c, c_in, kernel, kernel]` of each convolution, in the order of their use.
        biases: float32 `[c]` of each.
        dtype: of the arithmetic: bfloat16 or float32.

    Raises:
        ValueError: tensors of other shapes or types than the layers have.
        MemoryError: too little memory for a thread's activations.
    """
    _check(frames, layers, weights, biases)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *biases)):
        output: Tensor = _Encode.apply(frames, layers, scale, dtype, *weights, *biases)
        return output
    return _forward(frames, layers, scale, (*weights, *biases), dtype, None)


def _forward(
    frames: Tensor,
    layers: Sequence[Layer],
    scale: float,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    kept: _Kept | None,
) -> Tensor:
    last = layers[-1]
    y = frames.new_empty(len(frames), last.c * last.h * last.w, dtype=dtype)
    _run(frames, layers, scale, parameters, dtype, kept, y=y)
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


class _Kept:
    """Memory for what the gradient needs, reused: of a CNN's time a tenth would go to the pages of new memory."""

    free: ClassVar[deque[Tensor]] = deque()
    most_free: ClassVar[int] = 2

    def __init__(self, n: int) -> None:
        try:
            self.numbers = self.free.pop()
        except IndexError:
            self.numbers = torch.empty(0, dtype=torch.float32, device="cpu")
        if self.numbers.numel() < n:
            self.numbers = self.numbers.new_empty(n)

    def __del__(self) -> None:
        if len(self.free) < self.most_free:
            self.free.append(self.numbers)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, layers: Sequence[Layer], scale: float, dtype: torch.dtype, *parameters: Tensor
    ) -> Tensor:
        frames = frames.clone() if frames.is_inference() else frames.contiguous()
        ctx.kept = _Kept(len(frames) * _n_kept(layers)) if dtype == torch.float32 else None
        ctx.save_for_backward(frames, *parameters)
        ctx.layers, ctx.scale, ctx.dtype = layers, scale, dtype
        return _forward(frames, layers, scale, parameters, dtype, ctx.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        gradients = [parameter.new_empty(parameter.shape) for parameter in parameters]
        grad_y = grad.to(ctx.dtype).contiguous()
        outputs = {"grad_weights": _pointers(gradients[:half]), "grad_biases": _pointers(gradients[half:])}
        _run(frames, ctx.layers, ctx.scale, parameters, ctx.dtype, ctx.kept, grad_y=grad_y, **outputs)
        return None, None, None, None, *gradients


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _structs(layers: Sequence[Layer]) -> Any:
    structs, n_convs = (_Layer * len(layers))(), 0
    for struct, (kind, *sizes), layer in zip(structs, layers, layers, strict=True):
        for name, number in zip(_SIZES, (KINDS.index(kind), n_convs, *sizes), strict=True):
            setattr(struct, name, number)
        n_convs += layer.n_convs
    return structs


def _run(
    frames: Tensor,
    layers: Sequence[Layer],
    scale: float,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    kept: _Kept | None,
    **more: Any,
) -> None:
    kernel = load_kernel()
    assert not isinstance(kernel, str)
    n_convs = len(parameters) // 2
    frames, parameters = frames.contiguous(), [parameter.contiguous() for parameter in parameters]
    weights, biases = _pointers(parameters[:n_convs]), _pointers(parameters[n_convs:])
    inputs = {"layers": _structs(layers), "frames": frames, "weights": weights, "biases": biases, **more}
    cnn = _Cnn(len(frames), len(layers), n_convs, scale=scale, kept=kept and kept.numbers.data_ptr())
    for name, part in inputs.items():
        setattr(cnn, name, part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part))
    library = kernel.library
    run = library.srwm_cpu_tile_cnn if dtype == torch.bfloat16 else library.srwm_cpu_vector_cnn
    if run(ctypes.byref(cnn), kernel.level, torch.get_num_threads(), kernel.parallel):
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
