"""SB3's settings of policies: taken where they ask for what `SRWMPolicy` does, refused with the reason otherwise."""

import inspect
from typing import Any

import pytest
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import nn

from srwm_rl import SRWMPolicy, UserError
from srwm_rl.nn.policy_settings import (
    ACTIVATIONS,
    activation_class,
    checked_net_arch,
    encoder_settings,
    refuse_unsupported,
)

OURS = inspect.signature(SRWMPolicy).parameters.keys() - {"unsupported"}
THEIRS = inspect.signature(RecurrentActorCriticPolicy).parameters


@pytest.mark.parametrize("name", sorted(THEIRS.keys() - OURS))
def test_a_setting_of_the_recurrent_policy_is_refused_with_a_reason(name: str) -> None:
    other = {bool: name not in ("share_features_extractor", "full_std")}.get(type(THEIRS[name].default), 7)
    with pytest.raises(UserError, match=f"^{name}={other!r}: .*(leave it out|is a core here)") as error:
        refuse_unsupported({name: other}, OURS)
    assert "\n" not in str(error.value)


def test_settings_that_ask_for_what_the_policy_does_are_taken() -> None:
    refuse_unsupported(
        {"use_sde": False, "share_features_extractor": True, "full_std": True, "lstm_kwargs": None}, OURS
    )


@pytest.mark.parametrize(
    ("net_arch", "expected"),
    [
        (None, []),
        ([8, 4], [8, 4]),
        ({"pi": [8], "vf": []}, {"pi": [8], "vf": []}),
        ([{"pi": [8], "vf": [4]}], {"pi": [8], "vf": [4]}),  # SB3's former spelling
    ],
)
def test_layers_before_the_heads(net_arch: Any, expected: Any) -> None:
    assert checked_net_arch(net_arch) == expected


@pytest.mark.parametrize("net_arch", [[0], "8", {"pi": [8], "q": [8]}, {"vf": [-1]}, [8, {"pi": [8]}]])
def test_wrong_layers_before_the_heads_are_refused(net_arch: Any) -> None:
    with pytest.raises(UserError, match="net_arch"):
        checked_net_arch(net_arch)


def test_an_activation_is_a_name_or_a_class() -> None:
    assert [activation_class(name) for name in ACTIVATIONS] == list(ACTIVATIONS.values())
    assert activation_class(nn.SiLU) is nn.SiLU
    for wrong in ("swish", nn.SiLU(), int):
        with pytest.raises(UserError, match="activation_fn must be one of tanh, relu, elu, gelu"):
            activation_class(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["features_dim", "cnn_output_dim"])
def test_a_width_of_sb3s_encoders_is_the_width_of_the_cnn(name: str) -> None:
    settings = {name: 64, "cnn": {"channels": [4]}, "mlp": [8]}
    assert encoder_settings(settings, has_images=True) == {"cnn": {"channels": [4], "features": 64}, "mlp": [8]}
    assert settings["cnn"] == {"channels": [4]}
    with pytest.raises(UserError, match=f"{name} is the width of a CNN"):
        encoder_settings(settings, has_images=False)
