"""Diagnostics equal the recurrence written out in NumPy, and do not change the step."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import Core, SRWMPolicy, core_names, make_core
from srwm_rl.nn.diagnostics import count_heads, head_norms, introspect, record_rates, state_columns, state_heads

B, STEPS, HIDDEN = 3, 6, 8


def reference(weight: Any, heads: Any, shift: Any) -> tuple[Any, Any, Any]:
    """One head, one step, as the paper writes it: `weight` and `shift` [D, 3D+4], `heads` [D]."""
    size = len(heads)
    fast = weight + shift
    read = heads @ fast
    query, key = (
        np.exp(logits) / np.exp(logits).sum() for logits in (read[size : 2 * size], read[2 * size : 3 * size])
    )
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
def test_diagnostics_are_those_of_the_recurrence_written_out(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    core = make_core("srwm", 5, hidden_size=HIDDEN, n_layers=2, n_heads=2, query_init=1.0, **settings).double()
    x = torch.randn(STEPS, B, 5, dtype=torch.float64)
    starts = torch.zeros(STEPS, B)
    starts[0], starts[3, 1] = 1, 1
    state = torch.randn(2, B, core.state_size, dtype=torch.float64)  # of the previous episode
    shifts = np.zeros((2, B, 2, 4, 16))
    with torch.no_grad():
        for t in range(STEPS):
            before = state.masked_fill(starts[t][:, None] != 0, 0)
            with record_rates(core) as rates:
                _, state = core(x[t : t + 1], state, starts[t : t + 1])
            shifts[:, starts[t].numpy() != 0] = 0
            features = core.project(x[t])  # type: ignore[operator]
            for index, (layer, block) in enumerate(zip(core.layers, core.blocks, strict=True)):  # type: ignore[arg-type]
                normed = layer.layer_norm(features)
                heads = (normed if layer.norm == "pre" else features).unflatten(-1, (2, 4))
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
                features = (normed if layer.norm == "residual" else features) + layer.out(
                    torch.from_numpy(y).flatten(1)
                )
                features = block(features)


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
    new = SRWMPolicy(OBS, action_space, lambda _: 0.0, core=core, core_kwargs={"hidden_size": HIDDEN, "n_layers": 2})
    new.set_training_mode(False)
    return new


def sample_obs(t: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return {key: torch.rand(B, *space.shape, generator=generator) for key, space in OBS.spaces.items()}  # type: ignore[misc]


def walk(acting: SRWMPolicy, deterministic: bool = False) -> Any:
    """Yield for each step the results of `act` and `introspect`, and the state before."""
    state = acting.initial_state(B)
    for t in range(STEPS):
        starts = torch.tensor([t == 0, t in (0, 3), t == 0])
        torch.manual_seed(t)
        with torch.no_grad():
            plain = acting.act(sample_obs(t), state, starts, deterministic)
        torch.manual_seed(t)
        step = introspect(acting, sample_obs(t), state, starts, deterministic)
        yield plain, step, state.masked_fill(starts[:, None], 0)
        state = plain.core_state


@pytest.mark.parametrize("core", core_names())
def test_introspection_does_not_change_the_step(core: str) -> None:
    acting = policy(core)
    for plain, step, before in walk(acting):
        torch.testing.assert_close(step.actions, plain.actions, rtol=0, atol=0)
        torch.testing.assert_close(step.values, plain.values, rtol=0, atol=0)
        torch.testing.assert_close(step.core_state, plain.core_state, rtol=0, atol=0)
        n_heads = {"lstm": 1, "gru": 1, "fake_sr": 0, "feedforward": 0}.get(core, 8)
        assert step.edit.shape == step.drift.shape == (acting.core.state_layers, B, n_heads)
        whole = plain.core_state - before
        if n_heads:
            torch.testing.assert_close(step.edit.square().sum(-1), whole.square().sum(-1))
            torch.testing.assert_close(step.drift.square().sum(-1), before.square().sum(-1))
        assert (step.rates is not None) == (core in ("srwm", "srwm_no_carry", "sr_delta"))
        if step.rates is not None:
            assert step.rates.shape == (2, B, 8, 4)
            assert ((step.rates > 0) & (step.rates < 1)).all()


@pytest.mark.parametrize(("space", "columns"), list(zip(ACTIONS, COLUMNS, strict=True)))
@pytest.mark.parametrize("deterministic", [False, True])
def test_choices_std_and_entropy_are_those_of_the_policy(space: Any, columns: int, deterministic: bool) -> None:
    for plain, step, _ in walk(policy("srwm", space), deterministic):
        assert torch.equal(step.actions, plain.actions)
        assert step.choices.shape == (B, columns)
        assert (step.std is not None) == isinstance(space, spaces.Box)
        if isinstance(space, spaces.Discrete):
            chance = step.choices.gather(1, plain.actions[:, None])[:, 0]
            torch.testing.assert_close(chance.log(), plain.log_probs)
            torch.testing.assert_close(-(step.choices * step.choices.log()).sum(-1), step.entropy)
        elif isinstance(space, spaces.Box):
            assert step.std is not None
            torch.testing.assert_close(step.entropy, (step.std.log() + 0.5 * np.log(2 * np.pi * np.e)).sum(-1))
            assert not deterministic or torch.equal(step.choices, plain.actions)
        elif isinstance(space, spaces.MultiDiscrete):
            torch.testing.assert_close(step.choices.sum(-1), torch.full((B,), 2.0))


@pytest.mark.parametrize(("name", "n_heads"), [("srwm", 2), ("sr_delta", 2), ("delta", 2), ("fake_sr", 0)])
def test_inputs_of_a_short_convolution_belong_to_no_head(name: str, n_heads: int) -> None:
    torch.manual_seed(0)
    plain, core = (make_core(name, 5, hidden_size=HIDDEN, n_layers=2, n_heads=2, short_conv=width) for width in (0, 3))
    size = plain.state_size
    assert torch.equal(state_heads(core)[:, :size], state_heads(plain))
    assert torch.equal(state_columns(core)[:, :size], state_columns(plain))
    for owners in (state_heads(core), state_columns(core)):
        assert owners[:, size:].eq(-1).all()
    assert count_heads(core) == n_heads
    state = torch.randn(2, B, core.state_size)
    torch.testing.assert_close(head_norms(core, state), head_norms(plain, state[:, :, :size]))


def test_both_blocks_of_an_sr_delta_state_belong_to_their_heads() -> None:
    core = make_core("sr_delta", 5, hidden_size=HIDDEN, n_layers=1, n_heads=2)
    shift = 4 * (5 * 4 + 5)  # of one head
    expected = [0] * shift + [1] * shift + [0] * 16 + [1] * 16
    assert state_heads(core).tolist() == [expected]
    assert count_heads(core) == 2


def test_recording_rates_is_undone_and_refuses_several_steps() -> None:
    core = make_core("srwm", 5, hidden_size=HIDDEN, n_layers=2)
    before = dict(vars(core.layers[0]))  # type: ignore[index]
    with pytest.raises(ValueError, match="one step at a time, not 2"), record_rates(core):
        core(torch.zeros(2, B, 5), core.initial_state(B), torch.zeros(2, B))
    assert dict(vars(core.layers[0])) == before  # type: ignore[index]
    core(torch.zeros(2, B, 5), core.initial_state(B), torch.zeros(2, B))


class TwoPasses(Core):
    """A user's own core that calls an SRWM layer twice per step and has `layers` that are not its state's rows."""

    def __init__(self, input_size: int) -> None:
        self_modifying = make_core("srwm", input_size, hidden_size=HIDDEN, n_layers=1)
        super().__init__(input_size, HIDDEN, 1, self_modifying.state_size)
        self.layers = torch.nn.ModuleList([self_modifying, torch.nn.Linear(HIDDEN, HIDDEN)])

    def forward(self, x: torch.Tensor, state: torch.Tensor, episode_starts: torch.Tensor) -> Any:
        _, state = self.layers[0](x, state, episode_starts)
        y, state = self.layers[0](x, state, torch.zeros_like(episode_starts))
        return self.layers[1](y), state


def test_a_users_core_has_one_head_per_layer_of_its_state() -> None:
    core = TwoPasses(5)
    state = torch.randn(1, B, core.state_size)
    with record_rates(core) as rates:
        core(torch.zeros(2, B, 5), state, torch.zeros(2, B))
    assert rates == []
    torch.testing.assert_close(head_norms(core, state)[..., 0], state.norm(dim=-1))
