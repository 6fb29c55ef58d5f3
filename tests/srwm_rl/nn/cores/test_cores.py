"""Properties of every core; the published cores' numbers are tested in tests/srwm_rl/official."""

from typing import Any

import pytest
import torch
from gymnasium import spaces

from srwm_rl import Core, SRWMPolicy, UserError, core_names, make_core, register_core
from srwm_rl.nn.cores import _CORES
from srwm_rl.nn.cores.srwm import SRWMCore

SIZES = {"hidden_size": 16, "n_layers": 2}


def unroll(core: Core, n_steps: int = 11, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random features and state, and resets at a fifth of the steps."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_steps, batch, core.input_size, generator=generator)
    state = 0.1 * torch.randn(core.initial_state(batch).shape, generator=generator)
    return x, state, torch.rand(n_steps, batch, generator=generator) < 0.2


STACKS = ("srwm", "srwm_no_carry", "sr_delta", "delta", "fake_sr")


@pytest.fixture(params=[*core_names(), *(f"{name} behind a convolution" for name in STACKS)])
def core(request: pytest.FixtureRequest) -> Core:
    torch.manual_seed(0)
    name, *conv = request.param.split(" behind ")
    return make_core(name, 5, **SIZES, **({"short_conv": 4} if conv else {}))


def test_shapes_and_zero_initial_state(core: Core) -> None:
    state = core.initial_state(3)
    assert state.shape == (core.state_layers, 3, core.state_size)
    assert not state.any()
    y, new = core(*unroll(core))
    assert y.shape == (11, 3, core.output_size)
    assert new.shape == state.shape


def test_step_by_step_equals_whole_unroll(core: Core) -> None:
    x, state, starts = unroll(core)
    whole, final = core(x, state, starts)
    if not core.carries_over:
        pytest.skip("starts anew at every call: test_no_carry_starts_every_call_from_the_slow_weight")
    ys = []
    for t in range(len(x)):
        y, state = core(x[t : t + 1], state, starts[t : t + 1])
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys), whole)
    torch.testing.assert_close(state, final)


def test_episode_start_equals_fresh_episode(core: Core) -> None:
    x, state, _ = unroll(core)
    starts = torch.zeros(x.shape[:2])
    starts[4] = 1
    y, final = core(x, state, starts)
    fresh, fresh_final = core(x[4:], core.initial_state(3), torch.zeros(7, 3))
    torch.testing.assert_close(y[4:], fresh)
    torch.testing.assert_close(final, fresh_final)


def test_no_core_reads_values_from_the_device(core: Core) -> None:
    expected = [tensor.shape for tensor in core(*unroll(core))]
    on_meta = [tensor.to("meta") for tensor in unroll(core)]  # any read of a value raises there
    assert [tensor.shape for tensor in core.to("meta")(*on_meta)] == expected


def test_environments_do_not_mix(core: Core) -> None:
    x, state, starts = unroll(core)
    y, final = core(x, state, starts)
    alone, alone_final = core(x[:, 1:2], state[:, 1:2], starts[:, 1:2])
    torch.testing.assert_close(y[:, 1:2], alone)
    torch.testing.assert_close(final[:, 1:2], alone_final)


def test_every_parameter_gets_a_gradient(core: Core) -> None:
    y, _ = core(*unroll(core))
    y.square().sum().backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["srwm", "srwm_no_carry", "sr_delta"])
def test_all_column_groups_of_each_srwm_weight_get_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    core = make_core(name, 5, **SIZES)
    core(*unroll(core))[0].square().sum().backward()
    for layer in core.layers:  # type: ignore[union-attr]
        groups = layer.weight.grad.split(layer.widths, dim=-1)
        read = groups[0].split(2, dim=-1) if name == "sr_delta" else ()  # its queries, keys, values; rate
        for columns in (*groups, *read):
            assert columns.abs().max() > 1e-8


def test_memory_remembers_and_feedforward_does_not() -> None:
    for name in core_names():
        torch.manual_seed(0)
        core = make_core(name, 5, **SIZES)
        x, state, _ = unroll(core)
        starts = torch.zeros(x.shape[:2])
        changed = x.clone()
        changed[0] += 1
        differs = not torch.allclose(core(x, state, starts)[0][-1], core(changed, state, starts)[0][-1], atol=1e-7)
        assert differs == (name not in ("feedforward", "fake_sr"))


def test_no_carry_starts_every_call_from_the_slow_weight() -> None:
    torch.manual_seed(0)
    core, carries = make_core("srwm_no_carry", 5, **SIZES), make_core("srwm", 5, **SIZES)
    carries.load_state_dict(core.state_dict())
    x, state, starts = unroll(core)
    y, final = core(x, state, starts)
    zeros = core.initial_state(3)
    torch.testing.assert_close(y, carries(x, zeros, starts)[0])
    assert not torch.allclose(y, carries(x, state, starts)[0])
    assert torch.equal(final, zeros)
    for t in range(len(x)):  # one step at a time it is memoryless: the slow weight's own answer
        alone = core(x[t : t + 1], core(x[:t], state, starts[:t])[1] if t else state, starts[t : t + 1])[0]
        torch.testing.assert_close(alone, carries(x[t : t + 1], zeros, starts[t : t + 1])[0])


def test_fake_sr_is_srwm_that_never_edits() -> None:
    torch.manual_seed(0)
    srwm, fake = make_core("srwm", 5, **SIZES), make_core("fake_sr", 5, **SIZES)
    weights = srwm.state_dict()
    fake.load_state_dict(weights | {f"layers.{i}.weight": weights[f"layers.{i}.weight"][..., :2] for i in range(2)})
    x, _, starts = unroll(srwm)
    first = [srwm(x[t : t + 1], srwm.initial_state(3), starts[t : t + 1])[0] for t in range(len(x))]
    torch.testing.assert_close(fake(x, fake.initial_state(3), starts)[0], torch.cat(first))


@pytest.mark.parametrize("name", ["srwm", "srwm_no_carry", "sr_delta", "fake_sr", "delta"])
@pytest.mark.parametrize("variant", ["default", "paper"])
@pytest.mark.parametrize("norm", ["none", "residual", "pre"])
def test_every_norm_and_softmax_is_another_function(name: str, variant: str, norm: str) -> None:
    outputs = []
    for softmax in (False, True):
        torch.manual_seed(0)
        core = make_core(name, 5, variant=variant, norm=norm, input_softmax=softmax, **SIZES)
        outputs.append(core(*unroll(core))[0])
    assert torch.isfinite(torch.stack(outputs)).all()
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize(
    ("frozen", "groups"),
    [
        (("query", "key", "beta"), ["query", "key", "beta"]),
        (["key"], ["key"]),
        ("key, query", ["key", "query"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("name", ["srwm", "sr_delta"])
def test_frozen_columns_stay_as_drawn(name: str, frozen: object, groups: list[str]) -> None:
    torch.manual_seed(0)
    core = make_core(name, 5, frozen=frozen, **SIZES)
    torch.manual_seed(0)
    free = make_core(name, 5, **SIZES)
    for ours, theirs in zip(core.layers, free.layers, strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours.slow_weight(), theirs.weight)  # the same draw, and every column in its place
    torch.testing.assert_close(core(*unroll(core)), free(*unroll(core)))
    before = [layer.slow_weight().detach().clone() for layer in core.layers]  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(core.parameters(), lr=0.1, weight_decay=0.5)
    core(*unroll(core))[0].square().sum().backward()
    optimizer.step()
    for layer, old in zip(core.layers, before, strict=True):  # type: ignore[arg-type]
        new = layer.slow_weight().detach()
        for group, was, now in zip(
            ("y", "query", "key", "beta"), old.split(layer.widths, -1), new.split(layer.widths, -1), strict=True
        ):
            assert torch.equal(was, now) == (group in groups), group
    loaded = make_core(name, 5, frozen=frozen, **SIZES)
    loaded.load_state_dict(core.state_dict())
    torch.testing.assert_close(loaded(*unroll(core)), core(*unroll(core)))


@pytest.mark.parametrize("name", ["srwm", "sr_delta"])
def test_retention_lets_the_shift_fade(name: str) -> None:
    torch.manual_seed(0)
    core = make_core(name, 5, retention=True, **SIZES)
    state = core(*unroll(core))[1]
    ys, finals = [], []
    for bias in (40.0, -40.0):  # keeps all; keeps nothing but the last edit
        for layer in core.layers:  # type: ignore[union-attr]
            layer.gate.bias.data.fill_(bias)
        y, final = core(*unroll(core))
        ys.append(y)
        finals.append(final)
    torch.manual_seed(0)
    plain = make_core(name, 5, **SIZES)
    plain.load_state_dict(core.state_dict(), strict=False)
    torch.testing.assert_close((ys[0], finals[0]), plain(*unroll(core)))
    size = core.layers[0].shift_shape  # type: ignore[index,union-attr]
    shifts = [s[..., : size[0] * size[1] * size[2]] for s in (finals[1], state, finals[0])]
    assert shifts[0].norm() < 0.7 * shifts[1].norm() < shifts[2].norm()


def test_retention_starts_near_one_and_learns() -> None:
    torch.manual_seed(0)
    core = make_core("srwm", 5, retention=True, **SIZES)
    gate = core.layers[0].gate  # type: ignore[index,union-attr]
    alphas = gate.bias.sigmoid()
    assert 0.979 < alphas.min() < alphas.max() < 0.9991
    core(*unroll(core))[0].square().sum().backward()
    assert gate.weight.grad.abs().max() > 0
    assert gate.bias.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["srwm", "srwm_no_carry", "sr_delta"])
def test_a_bound_limits_every_heads_shift_and_leaves_smaller_ones_unchanged(name: str) -> None:
    cores = []
    for bound in (None, 1e6, 0.3):
        torch.manual_seed(0)
        cores.append(make_core(name, 5, shift_bound=bound, query_init=1.0, **SIZES))
    free, loose, tight = cores
    torch.testing.assert_close(loose(*unroll(free)), free(*unroll(free)))
    assert not torch.allclose(tight(*unroll(free))[0], free(*unroll(free))[0])
    if not free.carries_over:
        return
    heads, size, columns = tight.layers[0].shift_shape  # type: ignore[index,union-attr,misc]
    norms = [
        core(*unroll(core))[1][..., : heads * size * columns].unflatten(-1, (heads, -1)).norm(dim=-1)
        for core in (free, tight)
    ]
    assert norms[0].max() > 0.31
    assert 0.29 < norms[1].max() < 0.3001


def test_a_bound_is_trained_through() -> None:
    torch.manual_seed(0)
    core = make_core("srwm", 5, shift_bound=0.1, retention=True, query_init=1.0, **SIZES)
    core(*unroll(core))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in core.parameters())
    assert all(layer.weight.grad[..., 2:].abs().max() > 0 for layer in core.layers)  # type: ignore[union-attr]


def test_delta_rates_start_where_beta_init_says() -> None:
    rates = []
    for beta_init in (0.0, -9.0):
        torch.manual_seed(0)
        core = make_core("delta", 5, beta_init=beta_init, **SIZES)
        rates.append(core(unroll(core)[0], core.initial_state(3), torch.zeros(11, 3))[1].abs().max())
    assert rates[1] < 0.01 * rates[0]


def test_small_query_init_makes_the_first_queries_of_delta_uniform() -> None:
    torch.manual_seed(0)
    layer = make_core("delta", 5, hidden_size=16, n_heads=2, query_init=0.01).layers[0]  # type: ignore[index,union-attr]
    rows = layer.slow_net.weight.unflatten(0, (2, 25))
    assert rows[:, :8].std() < 0.02 * rows[:, 8:].std()


@pytest.mark.parametrize("variant", ["default", "paper"])
@pytest.mark.parametrize(("name", "n_read"), [("srwm", 8), ("sr_delta", 25), ("srwm_no_carry", 8)])
def test_key_init_scales_the_initial_key_columns_alone(name: str, n_read: int, variant: str) -> None:
    weights = []
    for settings in ({}, {"key_init": 1.0}, {"key_init": 2.0}, {"key_init": 2.0, "frozen": "key"}):
        torch.manual_seed(0)
        core = make_core(name, 5, hidden_size=16, n_heads=2, variant=variant, **settings)  # type: ignore[arg-type]
        weights.append(core.layers[1].slow_weight())  # type: ignore[index,union-attr]
    plain, same, scaled, frozen = weights
    factors = torch.ones(plain.shape[-1])
    factors[n_read + 8 : n_read + 16] = 2  # behind the y and query columns
    assert torch.equal(plain, same)
    assert torch.equal(scaled, factors * plain)
    assert torch.equal(frozen, scaled)


@pytest.mark.parametrize(("name", "n_read"), [("srwm", 8), ("sr_delta", 25)])
def test_identity_init_adds_the_identity_to_keys_and_subtracts_it_from_queries(name: str, n_read: int) -> None:
    weights = []
    for c in (0.0, 3.0):
        torch.manual_seed(0)
        core = make_core(name, 5, hidden_size=16, n_heads=2, identity_init=c, frozen="query")
        weights.append(core.layers[1].slow_weight())  # type: ignore[index,union-attr]
    expected = torch.zeros_like(weights[0])
    expected[..., n_read : n_read + 8] = -3 * torch.eye(8)
    expected[..., n_read + 8 : n_read + 16] = 3 * torch.eye(8)
    torch.testing.assert_close(weights[1] - weights[0], expected)


def test_key_init_scales_the_initial_keys_of_delta() -> None:
    rows = []
    for key_init in (1.0, 2.0):
        torch.manual_seed(0)
        layer = make_core("delta", 5, hidden_size=16, n_heads=2, key_init=key_init).layers[0]  # type: ignore[index,union-attr]
        rows.append(layer.slow_net.weight.unflatten(0, (2, 25)))
    factors = torch.ones(25, 1)
    factors[8:16] = 2
    assert torch.equal(rows[1], factors * rows[0])


def test_identity_init_adds_the_identity_to_queries_and_keys_of_delta() -> None:
    rows = []
    for c in (0.0, 3.0):
        torch.manual_seed(0)
        layer = make_core("delta", 5, hidden_size=16, n_heads=2, identity_init=c).layers[0]  # type: ignore[index,union-attr]
        rows.append(layer.slow_net.weight.unflatten(0, (2, 25)))
    expected = torch.zeros(2, 25, 16)
    for head in range(2):
        for i in range(8):
            expected[head, i, 8 * head + i] = expected[head, 8 + i, 8 * head + i] = 3
    torch.testing.assert_close(rows[1] - rows[0], expected)


@pytest.mark.parametrize("name", STACKS)
def test_short_conv_weighs_the_last_inputs_of_the_episode(name: str) -> None:
    torch.manual_seed(0)
    plain = make_core(name, 5, **SIZES)
    core = make_core(name, 5, **SIZES, short_conv=3)
    core.load_state_dict(plain.state_dict(), strict=False)
    weight = core.short_conv.weight  # type: ignore[union-attr]
    assert weight.shape == (3, 16)
    assert weight[0].eq(1).all()
    assert 0.15 < weight[1:].std() < 0.45
    x, _, starts = unroll(core)
    with torch.no_grad():
        weight[1:] = 0
    for run in (slice(0, 1), slice(None)):  # the present input alone: nothing changes
        y, _ = core(x[run], core.initial_state(3), starts[run])
        torch.testing.assert_close(y, plain(x[run], plain.initial_state(3), starts[run])[0])
    assert core.state_size == plain.state_size + 32
    _, state = core(x, core.initial_state(3), torch.zeros_like(starts))
    inputs = state[0, :, plain.state_size :] if core.carries_over else core.project(x[[-1, -2]]).transpose(0, 1)
    torch.testing.assert_close(inputs.reshape(3, 2, 16), core.project(x[[-1, -2]]).transpose(0, 1))  # type: ignore[operator]
    assert not state[1, :, plain.state_size :].any()


def test_no_short_conv_draws_no_random_numbers() -> None:
    states = []
    for settings in ({}, {"short_conv": 0}):
        torch.manual_seed(0)
        make_core("srwm", 5, **SIZES, **settings)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_default_variant_starts_with_small_queries() -> None:
    default, paper = (SRWMCore(5, variant=v).layers[0].weight for v in ("default", "paper"))
    assert default[..., 16:32].std() < 0.02 * paper[..., 16:32].std()
    assert 0.5 < default[..., 32:].std() / paper[..., 32:].std() < 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("srwn", {}, "did you mean 'srwm'"),
        ("srwm", {"n_head": 4}, "did you mean 'n_heads'"),
        ("srwm", {"n_heads": 0}, "n_heads must be"),
        ("srwm", {"hidden_size": 30, "n_heads": 4}, "multiple of n_heads"),
        ("srwm", {"variant": "papr"}, "did you mean 'paper'"),
        ("srwm", {"norm": "post"}, "norm must be one of"),
        ("srwm", {"retention": "False"}, "retention must be true or false, not 'False'"),
        ("srwm", {"shift_bound": 0}, "shift_bound must be a number above 0"),
        ("sr_delta", {"shift_bound": -2.0}, "shift_bound must be a number above 0"),
        ("srwm", {"shift_bound": True}, "shift_bound must be a number above 0"),
        ("srwm_no_carry", {"shift_bound": "big"}, "shift_bound must be a number, not 'big'"),
        ("fake_sr", {"shift_bound": 1.0}, "has no setting 'shift_bound'"),
        ("delta", {"query_init": "small"}, "query_init must be a number"),
        ("sr_delta", {"key_init": "2"}, "key_init must be a number, not '2'"),
        ("srwm", {"identity_init": "2"}, "identity_init must be a number, not '2'"),
        ("srwm", {"edit_lr_multiplier": [3.0]}, r"edit_lr_multiplier must be a number, not \[3.0\]"),
        ("srwm", {"edit_lr_multiplier": -1.0}, "edit_lr_multiplier must be a finite number of at least 0, not -1.0"),
        ("srwm_no_carry", {"edit_lr_multiplier": float("nan")}, "edit_lr_multiplier must be a finite number"),
        ("srwm", {"edit_lr_multiplyer": 3.0}, "did you mean 'edit_lr_multiplier'"),
        ("delta", {"edit_lr_multiplier": 3.0}, "has no setting 'edit_lr_multiplier'"),
        ("srwm", {"short_conv": 1}, "short_conv must be a width from 2 to 1024, or 0 for none, not 1"),
        ("delta", {"short_conv": True}, "short_conv must be a width from 2 to 1024, or 0 for none, not True"),
        ("fake_sr", {"short_conv": "wide"}, "short_conv must be a width from 2 to 1024, or 0 for none, not 'wide'"),
        ("gru", {"short_conv": 4}, "has no setting 'short_conv'"),
        ("srwm", {"frozen": "querry"}, "did you mean 'query'"),
        ("srwm", {"frozen": ["y"]}, "unknown column group 'y'"),
        ("fake_sr", {"query_init": 1.0}, "has no setting 'query_init'"),
        ("delta", {"retention": True}, "has no setting 'retention'"),
        ("delta", {"variant": "papr"}, "did you mean 'paper'"),
        ("gru", {"n_layers": 0}, "n_layers must be"),
        ("lstm", {"hidden_size": True}, "from 1 to 65536, not True"),
        ("srwm", {"hidden_size": 10**9}, "from 1 to 65536, not 1000000000"),
        ("srwm", {"short_conv": 10**9}, "from 2 to 1024"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_core(name, 5, **settings)


def test_a_users_core_is_made_by_name_and_names_are_unique() -> None:
    class Mine(Core):
        def __init__(self, input_size: int, gain: float = 1.0) -> None:
            super().__init__(input_size, input_size, 1, 1)
            self.gain = torch.nn.Parameter(torch.tensor(gain))

        def forward(
            self, x: torch.Tensor, state: torch.Tensor, episode_starts: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return x * self.gain, state

    try:
        register_core("mine")(Mine)
        assert make_core("mine", 4, gain=2.0).output_size == 4
        with pytest.raises(UserError, match="exists already"):
            register_core("mine")(Mine)
        with pytest.raises(UserError, match="subclass"):
            register_core("other")(dict)  # type: ignore[type-var]
    finally:
        _CORES.pop("mine", None)


class MySRWM(SRWMCore):
    """Takes a setting of its own, and passes all others on."""

    def __init__(self, input_size: int, extra: int = 0, **others: Any) -> None:
        self.hidden = others.pop("hidden", 1)
        super().__init__(input_size, **others)
        self.extra = extra


def test_a_constructor_with_kwargs_gets_its_settings() -> None:
    try:
        register_core("my_srwm")(MySRWM)
        core: Any = make_core("my_srwm", 4, extra=5, hidden=2, hidden_size=8, n_heads=2, key_init=2)
        assert (core.extra, core.hidden, core.output_size) == (5, 2, 8)
        with pytest.raises(UserError, match="did you mean 'hidden_size'"):
            make_core("my_srwm", 4, hidden_siz=8)
        space: Any = spaces.Box(-1, 1, (3,))
        policy: Any = SRWMPolicy(space, spaces.Discrete(2), lambda _: 0.1, "my_srwm", {"extra": 3})
        assert policy.core.extra == 3
    finally:
        _CORES.pop("my_srwm", None)
