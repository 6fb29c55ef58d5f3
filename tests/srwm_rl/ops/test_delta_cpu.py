"""The C kernel of the delta rule against the float64 reference, at every instruction set this machine has."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srwm_rl import delta_scan
from srwm_rl.ops import backends, cpu
from tests.srwm_rl.ops.delta_cases import check, make_case, results

KERNEL = cpu.load_kernel()
pytestmark = pytest.mark.skipif(isinstance(KERNEL, str), reason=str(KERNEL))
LEVELS = () if isinstance(KERNEL, str) else range(KERNEL.level + 1)


@pytest.fixture(params=LEVELS, ids=lambda level: cpu.LEVELS[level])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=request.param))  # type: ignore[union-attr]
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 16, 17, 32, 64, 70])
def test_every_head_size(level: int, dtype: torch.dtype, size: int) -> None:
    for n_steps in (1, 37):
        check(make_case(n_steps, 2, 3, size, seed=size), "cpu", dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 2**20),
    st.sampled_from([None, 0.0, 0.02, 0.2, 1.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(LEVELS),
)
def test_random_cases(
    n_steps: int,
    batch: int,
    heads: int,
    size: int,
    seed: int,
    resets: float | None,
    with_weight: bool,
    contiguous: bool,
    dtype: torch.dtype,
    level: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=level))  # type: ignore[union-attr]
        case = make_case(n_steps, batch, heads, size, seed=seed, resets=resets, with_weight=with_weight)
        check(case, "cpu", dtype, contiguous)


def test_same_bits_with_any_number_of_threads_and_from_many_threads() -> None:
    case = make_case(40, 32, 4, 16)
    before = torch.get_num_threads()

    def run(_: int = 0) -> list[Tensor]:
        return list(results(case, "cpu", torch.float32).values())

    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        threaded = [run(), *ThreadPoolExecutor(4).map(run, range(4))]
    finally:
        torch.set_num_threads(before)
    for outputs in threaded:
        assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))


@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(plain: bool) -> None:
    case = make_case(18, 2, 2, 4)
    assert case.starts is not None
    inputs: list[Any] = [tensor.requires_grad_() for tensor in case.inputs.values()]
    arguments = (*inputs[:4], None, None, None) if plain else (*inputs, case.starts.view(torch.uint8), None)
    torch.library.opcheck(torch.ops.srwm_rl.delta_cpu.default, (*arguments, True))


def test_falls_back_with_one_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "load_kernel", lambda: "the C kernel is not built; build it")
    backends.log_fallback.cache_clear()
    case = make_case(3, 1, 1, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y, _ = delta_scan(**case.inputs)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["delta_scan"]
    assert torch.equal(y, delta_scan(**case.inputs, backend="reference")[0])
    with pytest.raises(ValueError, match="not built"):
        delta_scan(**case.inputs, backend="cpu")


def test_empty_batch() -> None:
    y, final = delta_scan(*[torch.zeros(3, 0, 2, 4)] * 3, torch.zeros(3, 0, 2), backend="cpu")
    assert (y.shape, final.shape) == ((3, 0, 2, 4), (0, 2, 4, 4))
