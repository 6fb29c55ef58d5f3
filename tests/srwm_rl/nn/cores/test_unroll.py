"""Unrolls of a core: the gradient through the state is cut where it should be."""

import torch

from srwm_rl.nn.cores import make_core
from srwm_rl.nn.cores.unroll import run_core


def test_a_cut_unroll_has_the_same_values_and_no_gradient_across_the_cut() -> None:
    core = make_core("srwm", 5, hidden_size=8, n_layers=1, n_heads=2)
    x = torch.randn(6, 2, core.input_size, requires_grad=True)
    starts = torch.zeros(6, 2)
    whole, _ = run_core(core, x, core.initial_state(2), starts)
    cut, _ = run_core(core, x, core.initial_state(2), starts, bptt=3)
    torch.testing.assert_close(cut, whole)
    (through,) = torch.autograd.grad(whole[-1].sum(), x, retain_graph=True)
    (stopped,) = torch.autograd.grad(cut[-1].sum(), x)
    assert through[0].abs().max() > 0
    assert not stopped[:3].any()


def test_a_core_without_carry_over_takes_every_step_from_zeros() -> None:
    core = make_core("srwm_no_carry", 5, hidden_size=8, n_layers=1, n_heads=2)
    x, starts = torch.randn(4, 3, 5), torch.zeros(4, 3)
    y, state = run_core(core, x, core.initial_state(3), starts)
    steps = [core(x[t : t + 1], core.initial_state(3), starts[t : t + 1])[0] for t in range(4)]
    torch.testing.assert_close(y, torch.cat(steps))
    assert state.shape == core.initial_state(3).shape
