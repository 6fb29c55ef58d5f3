"""Cores with the authors' weights have the outputs of the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from srwm_rl import UserError
from srwm_rl.official.cores import load_core

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = ("srwm", "srwm_no_carry", "fake_sr", "deltanet", "sr_delta")


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"core_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def params(name: str) -> dict[str, Tensor]:
    return {key.removeprefix("param/"): value for key, value in golden(name).items() if key.startswith("param/")}


def final_states(name: str, data: dict[str, Tensor], layer: int) -> Tensor:
    """Return the authors' final state of one layer as ours is packed, `[B, S]`.

    Theirs: the first kind of state for both layers, then the second, and so on. Rows of their fast weights are values,
    of ours keys.
    """
    kinds = {"srwm": 4, "sr_delta": 5, "deltanet": 1}.get(name, 0)
    states = [data[f"final_state/{2 * kind + layer}"][0] for kind in range(kinds)]
    fast = [states.pop().mT.flatten(1)] if name in ("sr_delta", "deltanet") else []
    shift = [torch.cat(states, dim=-1).flatten(1)] if states else []
    return torch.cat((*shift, *fast), dim=-1)


@pytest.mark.parametrize("name", FILES)
def test_outputs_resets_and_final_states_are_the_authors(name: str) -> None:
    data = golden(name)
    core = load_core(name, data)
    state = core.initial_state(3)
    step = len(data["x"]) if core.carries_over else 1  # theirs runs step by step
    ys = []
    with torch.no_grad():
        for x, done in zip(data["x"].split(step), data["done"].split(step), strict=True):
            y, state = core(x, state, done)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys), data["out"], rtol=1e-5, atol=1e-5)
    if f"final_state/{0}" in data:
        for layer in range(2):
            torch.testing.assert_close(state[layer], final_states(name, data, layer), rtol=1e-5, atol=1e-5)


def test_golden_resets_matter() -> None:
    for name in ("srwm", "deltanet", "sr_delta"):
        data = golden(name)
        with torch.no_grad():
            y, _ = (core := load_core(name, data))(data["x"], core.initial_state(3), torch.zeros(24, 3))
        assert (y - data["out"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("prefix", ["", "param/", "core."])
def test_prefixed_names_and_numpy_arrays_are_read(name: str, prefix: str) -> None:
    arrays = {prefix + key: value.numpy() for key, value in params(name).items()}
    core = load_core(name, arrays)
    for ours, theirs in zip(
        core.state_dict().values(), load_core(name, golden(name)).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_lstm_takes_torchs_names() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(7, 12, 2)
    core = load_core("lstm", {f"core.{key}": value for key, value in lstm.state_dict().items()})
    x = torch.randn(5, 3, 7)
    torch.testing.assert_close(core(x, core.initial_state(3), torch.zeros(5, 3))[0], lstm(x)[0])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_weight_is_named(name: str) -> None:
    whole = params(name)
    unused = "" if name == "deltanet" else "fwm_layers"  # their self-modifying layers hold a layer norm without a use
    for key in whole:
        incomplete = {other_key: value for other_key, value in whole.items() if other_key != key}
        if unused and key.startswith(unused) and "layer_norm" in key:
            load_core(name, incomplete)
            continue
        with pytest.raises(UserError, match=f"{key}' is missing"):
            load_core(name, incomplete)


@pytest.mark.parametrize("name", FILES)
def test_surplus_and_misshapen_weights_are_named(name: str) -> None:
    whole = params(name)
    with pytest.raises(UserError, match="has no weight"):
        load_core(name, whole | {"fwm_layers.0.W_z": torch.zeros(2)})
    for key in ("fwm_layers.1.out_linear.weight", "ff_layers.1.ff_layers.3.bias", "input_proj.bias"):
        with pytest.raises(UserError, match=f"{key}' must"):
            load_core(name, whole | {key: whole[key][:-1]})
        with pytest.raises(UserError, match=f"{key}' must"):
            load_core(name, whole | {key: whole[key][None]})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    whole = params("deltanet")
    with pytest.raises(UserError, match=r"slow_net.weight' does not fit a core of width 32"):
        load_core("delta", whole | {"fwm_layers.0.slow_net.weight": torch.zeros(99, 32)})


def test_unknown_cores_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'srwm'"):
        load_core("srwn", {})
