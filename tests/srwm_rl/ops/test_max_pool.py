"""Max pooling in C against torch's: outputs to the last bit, and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from srwm_rl.ops import cpu
from srwm_rl.ops import max_pool as pool
from srwm_rl.ops.max_pool import max_pool
from tests.srwm_rl.ops.defaults import other_default, other_defaults

KERNEL = cpu.load_kernel()
pytestmark = pytest.mark.skipif(isinstance(KERNEL, str), reason=str(KERNEL))
LEVELS = () if isinstance(KERNEL, str) else range(KERNEL.level + 1)
DTYPES = [torch.float32, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=LEVELS, ids=lambda level: cpu.LEVELS[level])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pool, "load_kernel", lambda: KERNEL._replace(level=request.param))  # type: ignore[union-attr]
    return request.param


def images(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def plain(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def twins(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return output and gradient of the kernel, then torch's."""
    results = []
    for function in (max_pool, plain):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        y.backward(images(*y.shape, dtype=x.dtype, seed=1))
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    return results


def check(x: Tensor) -> None:
    assert pool._in_c(x)
    (y, grad), (expected, expected_grad) = twins(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(max_pool(x), expected, rtol=0, atol=0, equal_nan=True)  # without gradients
    assert grad.is_contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float32:
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6)
    else:  # torch rounds after each of up to four
        torch.testing.assert_close(grad.float(), expected_grad.float(), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4, 8, 12, 16, 24, 32, 48])
def test_every_width(level: int, channels: int, dtype: torch.dtype) -> None:
    check(images(3, channels, 6, 10, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 9), (7, 1), (3, 3), (5, 4), (4, 5), (7, 9), (64, 64)]
)
def test_every_shape(level: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    check(images(2, 16, *size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_maxima_the_first_gets_the_gradient(level: int, dtype: torch.dtype) -> None:
    check(images(4, 16, 9, 8, dtype=dtype).round())
    check(torch.zeros(2, 16, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_pooled_as_in_torch(level: int, dtype: torch.dtype) -> None:
    x = images(4, 16, 9, 8, dtype=dtype)
    where = images(4, 16, 9, 8, dtype=torch.float32, seed=2)
    for number, low in ((NAN, 1.2), (-NAN, 1.5), (INF, 1.0), (-INF, 0.5)):
        check(x.where(where < low, number).contiguous(memory_format=torch.channels_last))
    check(torch.full_like(x, -INF))


def test_a_nan_gradient_stays_nan(level: int) -> None:
    x = images(1, 16, 2, 2, dtype=torch.bfloat16).requires_grad_()  # one window
    y = max_pool(x)
    bits = torch.full((16,), 0xFFFF - 2**16, dtype=torch.int16)  # rounding its bits as a finite number's would give 0
    y.backward(bits.view(torch.bfloat16).reshape(y.shape))
    assert x.grad is not None
    assert x.grad.isnan().sum(dim=(2, 3)).tolist() == [[1] * 16]
    assert x.grad.nan_to_num().abs().sum() == 0


def test_a_gradient_is_added_up_before_it_is_rounded(level: int) -> None:
    x = torch.zeros(1, 16, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[:, :, 1, 1] = 1  # in all four windows
    x.requires_grad_()
    grad = torch.tensor([[256.0, 1.0], [1.0, 0.0]]).bfloat16().expand(1, 16, 2, 2)  # 256 + 1 is 256 in bfloat16
    max_pool(x).backward(grad)
    assert x.grad is not None
    assert (x.grad[0, :, 1, 1] == 258).all()


def test_the_same_bits_with_any_number_of_threads(level: int) -> None:
    x, n = images(40, 16, 64, 32, dtype=torch.bfloat16), torch.get_num_threads()
    assert x.numel() > pool._PIXELS_WORTH_THREADS
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(twins(x)[0])
    finally:
        torch.set_num_threads(n)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 16, 6, 6),  # channels first
        torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 16, 6, 6).double().contiguous(memory_format=torch.channels_last),
        torch.randn(0, 16, 6, 6).contiguous(memory_format=torch.channels_last),
    ],
)
def test_unsupported_tensors_are_pooled_by_torch(x: Tensor) -> None:
    assert not pool._in_c(x)
    assert torch.equal(max_pool(x), F.max_pool2d(x, 3, stride=2, padding=1))


def test_channels_not_divisible_by_the_vector_size_are_pooled_by_torch() -> None:
    assert [bool(KERNEL.library.srwm_cpu_can_max_pool(c, KERNEL.level)) for c in (1, 2, 4, 6, 12, 16)] == [
        0,
        0,
        1,
        0,
        1,
        1,
    ]  # type: ignore[union-attr]
    x = images(2, 6, 5, 5, dtype=torch.float32)
    assert torch.equal(max_pool(x), F.max_pool2d(x, 3, stride=2, padding=1))


def test_without_a_kernel_torch_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "load_kernel", lambda: "not built")
    x = images(2, 16, 6, 6, dtype=torch.float32)
    assert not pool._in_c(x)
    assert torch.equal(max_pool(x), F.max_pool2d(x, 3, stride=2, padding=1))


def test_a_gradient_in_another_layout() -> None:
    x = images(2, 16, 6, 6, dtype=torch.float32).requires_grad_()
    y = max_pool(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, grad.contiguous(memory_format=torch.channels_last))
    assert torch.equal(gradient, expected)


def test_forward_derivatives_are_those_of_torch() -> None:
    x, tangent = images(2, 16, 6, 6, dtype=torch.float32), images(2, 16, 6, 6, dtype=torch.float32, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        tangents = [forward_ad.unpack_dual(pool(dual)).tangent for pool in (max_pool, plain)]
    assert torch.equal(*tangents)


def test_an_exported_pool_has_the_same_output() -> None:
    x = images(2, 16, 6, 6, dtype=torch.float32)
    exported = torch.export.export(Pool(), (x,)).module()
    assert torch.equal(exported(x), max_pool(x))


class Pool(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x)


@other_defaults
@pytest.mark.parametrize("dtype", DTYPES)
def test_defaults_of_torch_do_not_matter(dtype: torch.dtype, kind: str) -> None:
    x = images(2, 16, 6, 7, dtype=dtype).requires_grad_()

    def results() -> list[Tensor]:
        y = max_pool(x)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))
