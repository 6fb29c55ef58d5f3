"""The Triton kernel: its numbers through Triton's interpreter on the CPU, and its compilation for GPUs without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.srwm_rl.ops import cases

# Read when triton and its parts are imported, some of them during a test: so it stays set for this process. Where there
# is a GPU to test on it must not be: all other tests in this process would go without the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")
from srwm_rl.ops import triton_launch

interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="imported without Triton's interpreter")


@interpreted
@pytest.mark.parametrize(
    ("n_steps", "size", "resets", "with_shift"),
    [
        (1, 4, None, False),
        (3, 4, None, True),
        (20, 4, 0.2, True),
        (35, 8, 0.1, True),
        (18, 5, 1.0, True),
        (17, 16, 0.0, False),
        (2, 32, 0.3, True),
        (2, 64, 0.3, True),
    ],
)
def test_matches_the_reference(n_steps: int, size: int, resets: float | None, with_shift: bool) -> None:
    case = cases.make_case(n_steps, 2, 1, size, resets=resets, with_shift=with_shift)
    cases.check(case, "triton", torch.float32)


@interpreted
@pytest.mark.parametrize(
    ("n_steps", "size", "read", "retained", "bound"),
    [(18, 3, 10, False, None), (5, 4, 4, True, None), (19, 4, 1, False, 0.5), (18, 5, 5, True, 1.0)],
)
def test_options_match_the_reference(n_steps: int, size: int, read: int, retained: bool, bound: float | None) -> None:
    case = cases.make_case(n_steps, 2, 1, size, resets=0.15, read=read, retained=retained, bound=bound)
    cases.check(case, "triton", torch.float32)


@interpreted
@settings(max_examples=4, deadline=None)
@given(cases.cases(18, 8), st.booleans())
def test_random_cases(case: object, contiguous: bool) -> None:
    cases.check(case, "triton", torch.float32, contiguous=contiguous)


@interpreted
def test_opcheck() -> None:
    case = cases.make_case(2, 1, 1, 4, read=5, retained=True)
    inputs = (case.x, case.weight, case.retention, case.shift)
    arguments = (*(tensor.float().requires_grad_() for tensor in inputs), case.starts.view(torch.uint8), 0.5, True)
    torch.library.opcheck(torch.ops.srwm_rl.scan_triton.default, arguments)


def test_unsupported_arguments_are_named() -> None:
    device = "cpu" if triton_launch.INTERPRETED else "cuda"
    assert "float64" in triton_launch.why_not(device, torch.float64, 16)
    assert "head size 65" in triton_launch.why_not(device, torch.float32, 65)
    assert "mps" in triton_launch.why_not("mps", torch.float32, 16)
    assert triton_launch.why_not(device, torch.float32, 32, 97) is None
    assert "y is 193 wide" in triton_launch.why_not(device, torch.float32, 64, 193)


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from srwm_rl.ops import triton_scan as ours

def build(kernel, width, flags):
    sizes = ours.launch_sizes(int(sys.argv[1]), width)
    warps = sizes.pop("num_warps")
    constants = sizes | flags
    kinds = {"starts": "*u8", "T": "i32", "B": "i32", "H": "i32", "bound": "fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in kernel.arg_names}
    built = compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 80, 32), {"num_warps": warps})
    assert len(built.asm["cubin"])
    return built

size = int(sys.argv[1])
for on, width, held in ((False, size, 0), (True, size, 0), (True, size, 3), (True, 2 * size, 1), (False, 1, 2)):
    flags = dict(SHIFT=on, STARTS=on, RETENTION=bool(held & 1), BOUND=bool(held & 2))
    build(ours._forward_kernel, width, dict(KEEP=on) | flags)
    ahead = ours.loads_ahead(ours.launch_sizes(size, width), held > 0)
    build(ours._backward_kernel, width, dict(GRAD_Y=True, GRAD_FINAL=on, AHEAD=ahead) | flags)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 16, 24, 64])
def test_compiles_for_a_gpu_without_one(size: int, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE, str(size)], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_matches_the_reference_and_can_be_captured() -> None:
    code = """
import torch
from srwm_rl import srwm_scan
from tests.srwm_rl.ops import cases
for size, options in [(n, {}) for n in (4, 8, 16, 24, 32, 64)] + [
    (16, dict(read=49)), (24, dict(retained=True)), (16, dict(bound=1.0)),
    (64, dict(read=70, retained=True, bound=2.0)),
]:
    case = cases.make_case(200, 3, 2, size, **options)
    truth = cases.results(case, "reference", torch.float64)
    case = cases.Case(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in case))
    ours = {name: value.cpu() for name, value in cases.results(case, "triton", torch.float32).items()}
    errors = cases.relative_errors(ours, truth)
    assert max(errors.values()) < 1e-4, (size, errors)
    again = cases.results(case, "triton", torch.float32)
    assert all(torch.equal(value, again[name].cpu()) for name, value in ours.items()), "not deterministic"
x = torch.randn(8, 4, 2, 16, device="cuda").softmax(-1)
weight = torch.randn(2, 16, 52, device="cuda") / 4
side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
with torch.cuda.stream(side):
    srwm_scan(x, weight)
torch.cuda.synchronize()
with torch.cuda.graph(graph):
    y, _ = srwm_scan(x, weight)
graph.replay()
torch.testing.assert_close(y, srwm_scan(x, weight, backend="reference")[0])
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert result.returncode == 0, result.stderr
