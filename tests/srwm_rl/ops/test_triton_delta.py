"""The delta rule's Triton kernel: its numbers through Triton's interpreter on the CPU, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.srwm_rl.ops.delta_cases import check, make_case

# Read when triton is imported, so it stays set for this process; not beside a GPU, whose tests need the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")
from srwm_rl.ops import triton_launch

interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="imported without Triton's interpreter")


@interpreted
@pytest.mark.parametrize(
    ("n_steps", "size", "resets", "with_weight"),
    [
        (1, 4, None, False),
        (3, 4, None, True),
        (20, 4, 0.2, True),
        (35, 8, 0.1, True),
        (18, 5, 1.0, False),
        (17, 16, 0.0, False),
        (18, 1, 0.3, True),
        (2, 32, 0.3, True),
        (2, 64, 0.3, True),
    ],
)
def test_matches_the_reference(n_steps: int, size: int, resets: float | None, with_weight: bool) -> None:
    check(make_case(n_steps, 2, 2, size, resets=resets, with_weight=with_weight), "triton", torch.float32)


@interpreted
@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 8),
    st.integers(0, 2**20),
    st.sampled_from([None, 0.0, 0.1, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_random_cases(
    n_steps: int, batch: int, heads: int, size: int, seed: int, resets: float | None, weight: bool, contiguous: bool
) -> None:
    case = make_case(n_steps, batch, heads, size, seed=seed, resets=resets, with_weight=weight)
    check(case, "triton", torch.float32, contiguous)


@interpreted
def test_opcheck() -> None:
    case = make_case(2, 1, 1, 4)
    assert case.starts is not None
    inputs = [tensor.float().requires_grad_() for tensor in case.inputs.values()]
    torch.library.opcheck(torch.ops.srwm_rl.delta_triton.default, (*inputs, case.starts.view(torch.uint8), None, True))


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_matches_the_reference_and_can_be_captured() -> None:
    code = """
import torch
from srwm_rl import delta_scan
from tests.srwm_rl.ops.delta_cases import Case, make_case, results
for size in (1, 4, 8, 16, 24, 32, 64):
    case = make_case(200, 3, 2, size)
    truth = results(case, "reference", torch.float64)
    inputs = {name: tensor.cuda() for name, tensor in case.inputs.items()}
    case = Case(inputs, case.starts.cuda(), tuple(tensor.cuda() for tensor in case.upstream))
    ours = {name: value.cpu() for name, value in results(case, "triton", torch.float32).items()}
    for name, right in truth.items():
        error = (ours[name].double() - right).abs().max() / right.abs().max()
        assert error < 1e-4, (size, name, error)
    again = results(case, "triton", torch.float32)
    assert all(torch.equal(value, again[name].cpu()) for name, value in ours.items()), "not deterministic"
inputs = [tensor.float().cuda() for tensor in make_case(8, 4, 2, 16).inputs.values()]
delta_scan(*inputs)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y, _ = delta_scan(*inputs)
graph.replay()
torch.testing.assert_close(y, delta_scan(*inputs, backend="reference")[0])
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    assert result.returncode == 0, result.stderr
