"""The CNN's Triton kernels in Triton's interpreter against plain PyTorch, and compiled ahead of time without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

# Read when triton is imported; see test_triton.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")
from srwm_rl.ops import cnn, triton_cnn, triton_launch

ROOT = Path(__file__).parents[3]
NAN, INF = float("nan"), float("inf")
HERE = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not triton_launch.INTERPRETED, reason="imported without the interpreter")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
pytestmark = pytest.mark.parametrize("device", HERE)
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-7, 2**-7)}


def images(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype).contiguous(memory_format=torch.channels_last)


def results(function: Callable[..., Any], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Return a function's outputs, then the gradients of its inputs."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.numel()]
    grads = [images(*y.shape, dtype=y.dtype, device=y.device.type, seed=seed + i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + [*torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "skip", "total", "relu"),
    [
        ((2, 16, 5, 3), False, False, True),
        ((3, 24, 4, 4), True, True, True),
        ((1, 5, 1, 1), True, True, False),
        ((2, 32, 7, 9), True, False, True),
        ((5, 4, 33, 31), False, True, True),
    ],
)
def test_epilogue(shape: tuple[int, ...], skip: bool, total: bool, relu: bool, dtype: torch.dtype, device: str) -> None:
    inputs = [images(*shape, dtype=dtype, device=device), torch.randn(shape[1], device=device)]
    inputs += [images(*shape, dtype=dtype, device=device, seed=7)] * skip

    def ours(x: Tensor, bias: Tensor, *skipped: Tensor) -> Any:
        return triton_cnn.epilogue(x, bias, *(skipped or (None,)), total, relu)

    def plain(x: Tensor, bias: Tensor, *skipped: Tensor) -> Any:
        return cnn.reference(x, bias, *(skipped or (None,)), total, relu)

    rtol, atol = TOLERANCES[dtype]
    outputs = total + relu
    for i, (mine, expected) in enumerate(zip(results(ours, inputs), results(plain, inputs), strict=True)):
        assert mine.dtype == expected.dtype
        if i < outputs:
            # Triton's interpreter truncates what a GPU rounds.
            torch.testing.assert_close(mine, expected, rtol=rtol * (dtype == torch.bfloat16), atol=0)
        elif i == outputs + 1:  # the bias's: a sum over all pixels
            torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol * (mine.numel() * 100) ** 0.5)
        else:
            torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)


def test_epilogue_keeps_nan_and_infinity(device: str) -> None:
    x = torch.tensor([NAN, INF, -INF, -1.0], device=device).view(1, 4, 1, 1)
    _, y = triton_cnn.epilogue(x, torch.zeros(4, device=device))
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([NAN, INF, 0.0, 0.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 24, 7, 5), (3, 4, 1, 6), (2, 3, 1, 1), (2, 32, 9, 10)])
def test_max_pool(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = images(*shape, dtype=dtype, device=device)
    x[0, :, ::2] = 1.0  # equal ones: the first gets the gradient
    (y, grad), (expected, expected_grad) = (
        results(function, [x]) for function in (triton_cnn.max_pool, lambda x: F.max_pool2d(x, 3, stride=2, padding=1))
    )
    assert torch.equal(y, expected)
    assert torch.equal(triton_cnn.max_pool(x), expected)  # without a gradient
    assert y.is_contiguous(memory_format=torch.channels_last)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=4 * atol)  # torch rounds after each of up to four


def test_max_pool_of_nan_and_infinity_is_torchs(device: str) -> None:
    x = images(1, 4, 6, 6, dtype=torch.float32, device=device)
    x[0, 0, 1, 1], x[0, 1, 2:4, 2:4], x[0, 2] = NAN, INF, -INF
    (y, grad), (expected, expected_grad) = (
        results(function, [x]) for function in (triton_cnn.max_pool, lambda x: F.max_pool2d(x, 3, stride=2, padding=1))
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad[:, :2], expected_grad[:, :2], rtol=0, atol=1e-6)


COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from srwm_rl.ops import triton_cnn as ours
from tests.srwm_rl.ops.triton_compile import resources

CASES = {
    "_epilogue_kernel": dict(SKIP=True, TOTAL=True, RELU=True),
    "_epilogue_backward_kernel": dict(TOTAL=True),
    "_pool_kernel": dict(KEEP=True),
    "_pool_backward_kernel": {},
}
figures = {}
for architecture in (80, 90, 100):
    for name, flags in CASES.items():
        kernel = getattr(ours, name)
        constants = ours.launch_sizes(int(sys.argv[1])) | flags
        kinds = dict.fromkeys(("n_rows", "stride", "h", "w"), "i32") | {"which": "*u8"}
        kinds |= dict.fromkeys(("bias", "grad_bias"), "*fp32")
        signature = {n: "constexpr" if n in constants else kinds.get(n, "*bf16") for n in kernel.arg_names}
        aligned = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if signature[p.name][0] == "*"}
        built = compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", architecture, 32))
        figures[f"{name} sm_{architecture}"] = resources(built)
print(json.dumps(figures))
"""


@pytest.mark.parametrize("channels", [16, pytest.param(24, marks=pytest.mark.slow)])
def test_compiles_without_spills_for_gpus(channels: int, device: str, tmp_path: Path) -> None:
    if device == "cuda":
        pytest.skip("needs no GPU")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(channels)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert len(figures) == 12
    for name, (registers, stack) in figures.items():
        assert stack == 0, name
        assert registers <= 96, (name, registers)  # five blocks of 128 threads fit on a multiprocessor
