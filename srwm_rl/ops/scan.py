"""`srwm_scan`: check the arguments once, then hand them to a backend."""

from __future__ import annotations

from torch import Tensor

from srwm_rl.ops.reference import srwm_scan_reference

BACKENDS = ("auto", "reference")


def srwm_scan(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    episode_starts: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a self-referential weight matrix over a whole unroll, episode resets inside.

    One head, one step, with `W = weight + shift` (Irie et al., ICML 2022, eqs. 5-9, https://arxiv.org/abs/2202.05780):

        y, q, k, beta = split(x @ W);   q, k = softmax(q), softmax(k);   rate = sigmoid(beta)
        W <- W + k outer (rate * ((q - k) @ W)),   one rate for each of the four column groups y, q, k, beta

    Gradients flow through time to `x`, to all four column groups of `weight`, and to `shift`.

    Args:
        x: `[T, B, H, D]`, floating point, whatever the layer made of its input; T >= 1.
        weight: `[H, D, 3D+4]`, the slow weight; columns `y | q | k | beta`. Same dtype and device as `x`.
        shift: `[B, H, D, 3D+4]`, fast minus slow weight at the unroll's start; None: zeros, a new episode.
        episode_starts: `[T, B]`, bool or number: where non-zero the shift is zeroed *before* that step.
        backend: "auto" picks the fastest one that can run; "reference" is plain PyTorch.

    Returns:
        `y` `[T, B, H, D]` and the final `shift` `[B, H, D, 3D+4]`.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit; the message names the argument.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _check(x, weight, shift, episode_starts)
    return srwm_scan_reference(x, weight, shift, episode_starts)


def _check(x: Tensor, weight: Tensor, shift: Tensor | None, episode_starts: Tensor | None) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[0] < 1:
        raise ValueError(f"x must be floating point [T, B, H, D] with T >= 1, not {x.dtype} {list(x.shape)}")
    n_steps, batch, heads, head_size = x.shape
    columns = 3 * head_size + 4
    _check_tensor("weight", weight, x, (heads, head_size, columns))
    if shift is not None:
        _check_tensor("shift", shift, x, (batch, heads, head_size, columns))
    if episode_starts is not None:
        if episode_starts.shape != (n_steps, batch):
            raise ValueError(f"episode_starts must be [T, B] = {[n_steps, batch]}, not {list(episode_starts.shape)}")
        if episode_starts.device != x.device:
            raise ValueError(f"episode_starts is on {episode_starts.device}, x on {x.device}")


def _check_tensor(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, not {list(tensor.shape)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
