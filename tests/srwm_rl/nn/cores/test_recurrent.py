"""LSTM and GRU over unrolls in which episodes begin: as fused calls, against one call per step."""

import pytest
import torch
from torch import Tensor

from srwm_rl import make_core
from srwm_rl.nn.cores.recurrent import RecurrentCore

N_STEPS, BATCH = 13, 4


def make(name: str, n_layers: int, dtype: torch.dtype) -> RecurrentCore:
    torch.manual_seed(0)
    core = make_core(name, 5, hidden_size=6, n_layers=n_layers).to(dtype)
    assert isinstance(core, RecurrentCore)
    return core


def starts_at(*resets: tuple[int, int]) -> Tensor:
    """Return `[T, B]` flags with ones at these steps and environments."""
    starts = torch.zeros(N_STEPS, BATCH)
    for step, environment in resets:
        starts[step, environment] = 1
    return starts


def step_by_step(core: RecurrentCore, x: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(len(x)):
        y, state = core.forward_segment(x[t : t + 1], state.masked_fill(starts[t, :, None] != 0, 0))
        outputs.append(y)
    return torch.cat(outputs), state


IRREGULAR = {
    "one here, two there": starts_at((3, 1), (3, 2), (4, 0), (7, 2)),
    "at the first and the last step": starts_at((0, 0), (0, 3), (12, 1), (5, 1), (12, 2), (11, 3)),
    "at every step": starts_at(*((t, t % 3) for t in range(N_STEPS)), *((t, 2) for t in range(5, 9))),
    "at random": (torch.rand(N_STEPS, BATCH, generator=torch.Generator().manual_seed(1)) < 0.3).float(),
}
REGULAR = {
    "none": starts_at(),
    "at the first step": starts_at((0, 1), (0, 2)),
    "together": starts_at(*((t, b) for t in (4, 8) for b in range(BATCH))),
}


@pytest.mark.parametrize("where", [*IRREGULAR, *REGULAR])
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_an_unroll_equals_one_call_per_step(
    name: str, n_layers: int, where: str, dtype: torch.dtype, tolerance: float
) -> None:
    core = make(name, n_layers, dtype)
    starts = (IRREGULAR | REGULAR)[where].to(dtype)
    x = torch.randn(N_STEPS, BATCH, 5, dtype=dtype, requires_grad=True)
    state = torch.randn(n_layers, BATCH, core.state_size, dtype=dtype, requires_grad=True)
    weights = torch.randn(N_STEPS, BATCH, 6, dtype=dtype), torch.randn_like(state)
    results = []
    for run in (core, lambda *inputs: step_by_step(core, *inputs)):
        y, final = run(x, state, starts)
        loss = (y * weights[0]).sum() + (final * weights[1]).sum()
        results.append((y, final, *torch.autograd.grad(loss, [x, state, *core.parameters()])))
    for fused, slow in zip(*results, strict=True):
        torch.testing.assert_close(fused, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("where", "calls"), [*((where, 0) for where in IRREGULAR), ("none", 1), ("together", 3)])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_segments_are_called_one_by_one_only_where_episodes_begin_together(
    name: str, where: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make(name, 1, torch.float32)
    lengths, whole = [], core.forward_segment
    monkeypatch.setattr(core, "forward_segment", lambda x, state: (lengths.append(len(x)), whole(x, state))[1])
    x, state = torch.randn(N_STEPS, BATCH, 5), core.initial_state(BATCH)
    core(x, state, (IRREGULAR | REGULAR)[where])
    assert len(lengths) == calls


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_reset_is_exact_whatever_the_weights_are(name: str, dtype: torch.dtype, scale: float) -> None:
    core = make(name, 2, dtype)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.mul_(scale)
        x = 100 * torch.randn(N_STEPS, BATCH, 5, dtype=dtype)
        starts = IRREGULAR["at random"]
        y, final = core(x, torch.ones(2, BATCH, core.state_size, dtype=dtype), starts)
        last = int(starts[:, 1].nonzero().max())
        alone, alone_final = core(x[last:, 1:2], core.initial_state(1), torch.zeros(N_STEPS - last, 1))
    torch.testing.assert_close(y[last:, 1:2], alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(final[:, 1:2], alone_final, rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "state"])
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_numbers_that_are_not_finite_end_with_their_episode(
    name: str, n_layers: int, where: str, number: float
) -> None:
    core = make(name, n_layers, torch.float32)
    starts = IRREGULAR["one here, two there"]
    x, state = torch.randn(N_STEPS, BATCH, 5), torch.randn(n_layers, BATCH, core.state_size)
    (x[1] if where == "x" else state)[..., 2, :] = number
    y, final = core(x, state, starts)
    slow, slow_final = step_by_step(core, x, state, starts)
    assert not slow[1:3, 2].isfinite().all()
    torch.testing.assert_close(y, slow, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(final, slow_final, rtol=2e-6, atol=2e-6)
