"""Cores under `torch.autocast` and `torch.jit.trace`, and cores that take any setting."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from srwm_rl import Core, UserError, core_names, delta_scan, make_core, register_core, srwm_scan
from srwm_rl.nn import cores

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in core_names() if ":" not in name),
    ("srwm", {"short_conv": 3}),
    ("srwm", {"retention": True}),
    ("srwm", {"shift_bound": 2.0}),
    ("delta", {"short_conv": 3}),
]


def core_and_inputs(name: str, settings: dict[str, Any]) -> tuple[Core, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    core = make_core(name, 6, hidden_size=16, **settings)
    starts = torch.zeros(7, 3)
    starts[3, 1] = 1
    return core, (torch.randn(7, 3, 6), core.initial_state(3), starts)


@pytest.mark.parametrize(("name", "settings"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_and_keeps_the_state_in_float32(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    core, (x, state, starts) = core_and_inputs(name, settings)
    expected, expected_state = core(x, state, starts)
    with torch.autocast("cpu", dtype):
        y, after = core(x, state, starts)
        core(x, after, starts)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(after, expected_state, atol=0.1, rtol=0.1)
    assert after.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in core.parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scans_compute_in_float32_under_autocast(backend: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 2, 1, 4), torch.randn(1, 4, 16)
    expected, _ = srwm_scan(x.bfloat16().float(), weight)
    key, rate = torch.rand(5, 2, 1, 4), torch.rand(5, 2, 1)
    expected_delta, _ = delta_scan(key.bfloat16().float(), key, key, rate)
    with torch.autocast("cpu", torch.bfloat16):
        y, shift = srwm_scan(x.bfloat16(), weight, backend=backend)
        delta_y, _ = delta_scan(key.bfloat16(), key, key, rate, backend=backend)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(delta_y, expected_delta)
    assert shift.dtype == torch.float32


@pytest.mark.parametrize(("name", "settings"), OPTIONS)
def test_a_trace_is_right_or_refused(name: str, settings: dict[str, Any]) -> None:
    core, inputs = core_and_inputs(name, settings)
    if name in ("feedforward", "fake_sr") and not settings:  # without a recurrence: right at any length
        traced = torch.jit.trace(core, inputs, check_trace=False)
        others = torch.randn(9, 2, 6), core.initial_state(2), torch.ones(9, 2)
        torch.testing.assert_close(traced(*others), core(*others))
        return
    with pytest.raises(UserError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(core, inputs)


class AnyCore(Core):
    """A core whose constructor takes any setting."""

    def __init__(self, input_size: int, **settings: Any) -> None:
        super().__init__(input_size, settings["width"], 0, 0)
        self.project = torch.nn.Linear(input_size, settings["width"])

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(x), state


def test_a_core_may_take_any_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_CORES", dict(cores._CORES))
    register_core("any")(AnyCore)
    assert make_core("any", 3, width=5, k=1).output_size == 5


@pytest.mark.parametrize(("name", "settings"), OPTIONS)
def test_make_fx_records_every_operation(name: str, settings: dict[str, Any]) -> None:
    core, (x, state, starts) = core_and_inputs(name, settings)
    with torch.no_grad():
        traced = make_fx(core)(x, state, starts)
        others = torch.randn_like(x), state + 0.1, starts
        torch.testing.assert_close(traced(*others), core(*others))


def scan(x: Tensor, backend: str = "auto") -> Tensor:
    weight = torch.linspace(-1, 1, 2 * 4 * 16, dtype=x.dtype).view(2, 4, 16)
    return srwm_scan(x, weight, backend=backend)[0] + delta_scan(x, x, x, x[..., 0], backend=backend)[0]


def test_function_transforms_are_right_or_refused() -> None:
    torch.manual_seed(0)
    x, tangent = torch.rand(3, 5, 2, 2, 4), torch.rand(5, 2, 2, 4)
    torch.testing.assert_close(torch.func.vmap(scan)(x), torch.stack([scan(row) for row in x]))
    y, derivative = torch.func.jvp(scan, (x[0],), (tangent,))
    torch.testing.assert_close(y, scan(x[0]))
    point, step = x[0].double(), 1e-6 * tangent.double()
    numeric = (scan(point + step) - scan(point - step)) / 2e-6
    torch.testing.assert_close(derivative, numeric.float(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no forward-mode derivatives"):
        torch.func.jvp(partial(scan, backend="cpu"), (x[0],), (tangent,))
