"""Properties every core has, and the published SRWM core's own numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from srwm_rl import Core, UserError, core_names, make_core, register_core
from srwm_rl.cores import _CORES
from srwm_rl.cores.srwm import SRWMCore

GOLDEN = Path(__file__).parents[2] / "golden" / "core_srwm.npz"
SIZES = {"hidden_size": 16, "n_layers": 2}


def unroll(core: Core, n_steps: int = 11, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_steps, batch, core.input_size, generator=generator)
    state = 0.1 * torch.randn(core.initial_state(batch).shape, generator=generator)
    return x, state, torch.rand(n_steps, batch, generator=generator) < 0.2


@pytest.fixture(params=core_names())
def core(request: pytest.FixtureRequest) -> Core:
    torch.manual_seed(0)
    return make_core(request.param, 5, **SIZES)


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


def test_all_column_groups_of_each_srwm_weight_get_a_gradient() -> None:
    torch.manual_seed(0)
    core = make_core("srwm", 5, **SIZES)
    core(*unroll(core))[0].square().sum().backward()
    for layer in core.layers:  # type: ignore[union-attr]
        for columns in layer.weight.grad.split((2, 2, 2, 4), dim=-1):
            assert columns.abs().max() > 1e-8


def test_memory_remembers_and_feedforward_does_not() -> None:
    for name in core_names():
        torch.manual_seed(0)
        core = make_core(name, 5, **SIZES)
        x, state, _ = unroll(core)
        starts = torch.zeros(x.shape[:2])
        other = x.clone()
        other[0] += 1
        differs = not torch.allclose(core(x, state, starts)[0][-1], core(other, state, starts)[0][-1], atol=1e-7)
        assert differs == (name != "feedforward")


def test_published_core_matches_the_authors_outputs_and_states() -> None:
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    core = SRWMCore(20, hidden_size=32, n_layers=2, n_heads=4, ff_size=64, variant="paper")
    weights = {"project.weight": golden["param/input_proj.weight"], "project.bias": golden["param/input_proj.bias"]}
    for i in range(2):
        srwm, ff = f"param/fwm_layers.{i}.", f"param/ff_layers.{i}."
        weights[f"layers.{i}.weight"] = torch.cat([golden[srwm + n][0] for n in ("W_y", "W_q", "W_k", "w_b")], dim=-1)
        weights[f"layers.{i}.out.weight"] = golden[srwm + "out_linear.weight"]
        for ours, theirs in (("layer_norm", "layer_norm"), ("up", "ff_layers.0"), ("down", "ff_layers.3")):
            for kind in ("weight", "bias"):
                weights[f"blocks.{i}.{ours}.{kind}"] = golden[f"{ff}{theirs}.{kind}"]
    core.load_state_dict(weights)
    with torch.no_grad():
        y, state = core(golden["x"], core.initial_state(3), golden["done"])
    torch.testing.assert_close(y, golden["out"], rtol=1e-5, atol=1e-5)
    # Their order: W_y of both layers, W_q of both, W_k, w_b; each the shift from the slow weight.
    for layer, shift in enumerate(state.unflatten(-1, core.shift_shape)):
        theirs = torch.cat([golden[f"final_state/{2 * kind + layer}"][0] for kind in range(4)], dim=-1)
        torch.testing.assert_close(shift, theirs, rtol=1e-5, atol=1e-5)


def test_default_variant_starts_with_small_queries() -> None:
    default, paper = (SRWMCore(5, variant=v).layers[0].weight[..., 16:32].std() for v in ("default", "paper"))
    assert default < 0.02 * paper


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("srwn", {}, "did you mean 'srwm'"),
        ("srwm", {"n_head": 4}, "did you mean 'n_heads'"),
        ("srwm", {"n_heads": 0}, "n_heads must be"),
        ("srwm", {"hidden_size": 30, "n_heads": 4}, "multiple of n_heads"),
        ("srwm", {"variant": "papr"}, "did you mean 'paper'"),
        ("srwm", {"norm": "post"}, "norm must be one of"),
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
