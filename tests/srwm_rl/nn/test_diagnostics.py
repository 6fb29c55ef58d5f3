"""Introspection: what is shown is what the mathematics says, and showing it changes nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import Core, SRWMPolicy, core_names, make_core
from srwm_rl.nn.diagnostics import count_heads, head_norms, introspect, record_rates, state_heads

B, STEPS, HIDDEN = 3, 6, 8


def reference(weight: Any, heads: Any, shift: Any) -> tuple[Any, Any, Any]:
    """One head, one step, as the paper writes it: `weight` and `shift` [D, 3D+4], `heads` [D]."""
    size = len(heads)
    fast = weight + shift
    read = heads @ fast
    query, key = (np.exp(each) / np.exp(each).sum() for each in (read[size : 2 * size], read[2 * size : 3 * size]))
    rates = 1 / (1 + np.exp(-read[3 * size :]))
    edit = np.outer(key, (query - key) @ fast)
    for rate, columns in zip(rates, np.split(np.arange(3 * size + 4), [size, 2 * size, 3 * size]), strict=True):
        edit[:, columns] *= rate
    return read[:size], rates, edit


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "paper"},
        {"frozen": "query,beta"},
        {"retention": True},
        {"shift_bound": 0.5},
        {"norm": "residual"},
    ],
)
def test_it_is_the_recurrence_written_out(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    core = make_core("srwm", 5, hidden_size=HIDDEN, n_layers=2, n_heads=2, query_init=1.0, **settings).double()
    x = torch.randn(STEPS, B, 5, dtype=torch.float64)
    starts = torch.zeros(STEPS, B)
    starts[0], starts[3, 1] = 1, 1
    state = torch.randn(2, B, core.state_size, dtype=torch.float64)  # of an episode before
    shifts = np.zeros((2, B, 2, 4, 16))
    with torch.no_grad():
        for t in range(STEPS):
            before = state.masked_fill(starts[t][:, None] != 0, 0)
            with record_rates(core) as rates:
                _, state = core(x[t : t + 1], state, starts[t : t + 1])
            shifts[:, starts[t].numpy() != 0] = 0
            fed = core.project(x[t])  # type: ignore[operator]
            for index, (layer, block) in enumerate(zip(core.layers, core.blocks, strict=True)):  # type: ignore[arg-type]
                normed = layer.layer_norm(fed)
                heads = (normed if layer.norm == "pre" else fed).unflatten(-1, (2, 4))
                heads = heads.softmax(-1) if layer.input_softmax else heads
                y = np.zeros((B, 2, 4))
                for b in range(B):
                    kept = 1.0 if layer.gate is None else layer.gate(heads[b].flatten()).sigmoid().numpy()
                    for h in range(2):
                        weight, old = layer.slow_weight()[h].numpy(), shifts[index, b, h].copy()
                        y[b, h], expected, edit = reference(weight, heads[b, h].numpy(), old)
                        new = (kept if layer.gate is None else kept[h]) * old + edit
                        new *= min(1, (layer.shift_bound or np.inf) / np.linalg.norm(new))
                        drifts = head_norms(core, before)[index, b, h], head_norms(core, state - before)[index, b, h]
                        np.testing.assert_allclose(drifts[0], np.linalg.norm(old), atol=1e-12)
                        np.testing.assert_allclose(drifts[1], np.linalg.norm(new - old), atol=1e-12)
                        np.testing.assert_allclose(rates[index][b, h], expected, atol=1e-12)
                        shifts[index, b, h] = new
                fed = (normed if layer.norm == "residual" else fed) + layer.out(torch.from_numpy(y).flatten(1))
                fed = block(fed)


OBS = spaces.Dict({"observation": spaces.Box(-1, 1, (4,), np.float32), "previous_reward": spaces.Box(-1, 1, (1,))})
ACTIONS = (
    spaces.Discrete(5),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(3),
    spaces.Box(-1.0, 1.0, (2,), np.float32),
)
COLUMNS = (5, 5, 3, 2)


def policy(core: str, action_space: Any = ACTIONS[0]) -> SRWMPolicy:
    torch.manual_seed(1)
    made = SRWMPolicy(OBS, action_space, lambda _: 0.0, core=core, core_kwargs={"hidden_size": HIDDEN, "n_layers": 2})
    made.set_training_mode(False)
    return made


def observed(t: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return {key: torch.rand(B, *each.shape, generator=generator) for key, each in OBS.spaces.items()}  # type: ignore[misc]


def walk(made: SRWMPolicy, deterministic: bool = False) -> Any:
    """Yield each step's acting, seen and unseen, and the state before."""
    state = made.initial_state(B)
    for t in range(STEPS):
        starts = torch.tensor([t == 0, t in (0, 3), t == 0])
        torch.manual_seed(t)
        with torch.no_grad():
            plain = made.act(observed(t), state, starts, deterministic)
        torch.manual_seed(t)
        insight = introspect(made, observed(t), state, starts, deterministic)
        yield plain, insight, state.masked_fill(starts[:, None], 0)
        state = plain.core_state


@pytest.mark.parametrize("core", core_names())
def test_seeing_changes_nothing(core: str) -> None:
    made = policy(core)
    for plain, insight, before in walk(made):
        torch.testing.assert_close(insight.actions, plain.actions, rtol=0, atol=0)
        torch.testing.assert_close(insight.values, plain.values, rtol=0, atol=0)
        torch.testing.assert_close(insight.core_state, plain.core_state, rtol=0, atol=0)
        n_heads = {"lstm": 1, "gru": 1, "fake_sr": 0, "feedforward": 0}.get(core, 8)
        assert insight.edit.shape == insight.drift.shape == (made.core.state_layers, B, n_heads)
        whole = plain.core_state - before
        if n_heads:
            torch.testing.assert_close(insight.edit.square().sum(-1), whole.square().sum(-1))
            torch.testing.assert_close(insight.drift.square().sum(-1), before.square().sum(-1))
        assert (insight.rates is not None) == (core in ("srwm", "srwm_no_carry", "sr_delta"))
        if insight.rates is not None:
            assert insight.rates.shape == (2, B, 8, 4)
            assert ((insight.rates > 0) & (insight.rates < 1)).all()


@pytest.mark.parametrize(("space", "columns"), list(zip(ACTIONS, COLUMNS, strict=True)))
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_policy_is_told(space: Any, columns: int, deterministic: bool) -> None:
    for plain, insight, _ in walk(policy("srwm", space), deterministic):
        assert torch.equal(insight.actions, plain.actions)
        assert insight.choices.shape == (B, columns)
        assert (insight.std is not None) == isinstance(space, spaces.Box)
        if isinstance(space, spaces.Discrete):
            chance = insight.choices.gather(1, plain.actions[:, None])[:, 0]
            torch.testing.assert_close(chance.log(), plain.log_probs)
            torch.testing.assert_close(-(insight.choices * insight.choices.log()).sum(-1), insight.entropy)
        elif isinstance(space, spaces.Box):
            assert insight.std is not None
            torch.testing.assert_close(insight.entropy, (insight.std.log() + 0.5 * np.log(2 * np.pi * np.e)).sum(-1))
            assert not deterministic or torch.equal(insight.choices, plain.actions)
        elif isinstance(space, spaces.MultiDiscrete):
            torch.testing.assert_close(insight.choices.sum(-1), torch.full((B,), 2.0))


def test_the_heads_of_sr_deltas_two_weights() -> None:
    core = make_core("sr_delta", 5, hidden_size=HIDDEN, n_layers=1, n_heads=2)
    shift = 4 * (5 * 4 + 5)  # of one head
    expected = [0] * shift + [1] * shift + [0] * 16 + [1] * 16
    assert state_heads(core).tolist() == [expected]
    assert count_heads(core) == 2


def test_listening_ends_and_is_for_single_steps() -> None:
    core = make_core("srwm", 5, hidden_size=HIDDEN, n_layers=2)
    before = dict(vars(core.layers[0]))  # type: ignore[index]
    with pytest.raises(ValueError, match="one step at a time, not of 2"), record_rates(core):
        core(torch.zeros(2, B, 5), core.initial_state(B), torch.zeros(2, B))
    assert dict(vars(core.layers[0])) == before  # type: ignore[index]
    core(torch.zeros(2, B, 5), core.initial_state(B), torch.zeros(2, B))


class Pondering(Core):
    """A user's own core that calls an SRWM layer twice per step and has `layers` that are not its state's rows."""

    def __init__(self, input_size: int) -> None:
        self_modifying = make_core("srwm", input_size, hidden_size=HIDDEN, n_layers=1)
        super().__init__(input_size, HIDDEN, 1, self_modifying.state_size)
        self.layers = torch.nn.ModuleList([self_modifying, torch.nn.Linear(HIDDEN, HIDDEN)])

    def forward(self, x: torch.Tensor, state: torch.Tensor, episode_starts: torch.Tensor) -> Any:
        _, state = self.layers[0](x, state, episode_starts)
        y, state = self.layers[0](x, state, torch.zeros_like(episode_starts))
        return self.layers[1](y), state


def test_a_core_of_ones_own_has_one_row_per_layer_of_its_state() -> None:
    core = Pondering(5)
    state = torch.randn(1, B, core.state_size)
    with record_rates(core) as rates:
        core(torch.zeros(2, B, 5), state, torch.zeros(2, B))
    assert rates == []
    torch.testing.assert_close(head_norms(core, state)[..., 0], state.norm(dim=-1))
