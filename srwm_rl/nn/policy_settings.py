"""Settings of `SRWMPolicy`: SB3's spellings, and those of SB3's policies that it has not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.nn.encoders import check_widths

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}
_NO_SDE = "SRWMPolicy has no state-dependent exploration; leave it out"
_OWN_CORE = 'the memory is a core here: core="lstm", core_kwargs={"hidden_size": 64, "n_layers": 1}'
_SHARED = "actor and critic share encoder and core; leave it out"
# Settings of SB3's and sb3-contrib's policies that this one has not, and why.
_UNSUPPORTED = {
    "use_sde": _NO_SDE, "full_std": _NO_SDE, "use_expln": _NO_SDE, "squash_output": _NO_SDE,
    "lstm_hidden_size": _OWN_CORE, "n_lstm_layers": _OWN_CORE, "lstm_kwargs": _OWN_CORE,
    "shared_lstm": _SHARED, "enable_critic_lstm": _SHARED, "share_features_extractor": _SHARED,
}  # fmt: skip
_DEFAULTS = {"share_features_extractor": True, "full_std": True}  # of those that are not False
# SB3's names of the width that its encoders of images have.
_CNN_WIDTHS = ("features_dim", "cnn_output_dim")


def checked_net_arch(net_arch: Any) -> Any:
    """Return layers between core and heads, checked; None: none.

    Raises:
        UserError: other than a list of widths, or a dict of such lists by "pi" and "vf".
    """
    if isinstance(net_arch, list) and len(net_arch) == 1 and isinstance(net_arch[0], dict):
        net_arch = net_arch[0]  # SB3's former spelling
    if isinstance(net_arch, dict):
        check_settings("net_arch", net_arch, ("pi", "vf"))
        for name, widths in net_arch.items():
            check_widths(f"net_arch[{name!r}]", widths, may_be_empty=True)
    else:
        check_widths("net_arch, a list or {'pi': [...], 'vf': [...]},", net_arch or [], may_be_empty=True)
    return net_arch or []


def activation_class(activation_fn: str | type[nn.Module]) -> type[nn.Module]:
    """Return an activation's class, by its name in `ACTIVATIONS` or as it is.

    Raises:
        UserError: another name.
    """
    if isinstance(activation_fn, type) and issubclass(activation_fn, nn.Module):
        return activation_fn
    if activation_fn not in ACTIVATIONS:
        raise UserError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}, or a class, not {activation_fn!r}")
    return ACTIVATIONS[activation_fn]


def refuse_unsupported(settings: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse settings that the policy has not, unless they ask for what it does anyway.

    Args:
        settings: by name.
        known: names of the policy's settings.

    Raises:
        UserError: an unknown name, or a value that asks for something else.
    """
    for name, value in settings.items():
        if name not in _UNSUPPORTED:
            raise UserError(f"SRWMPolicy has no setting {name!r}{did_you_mean(name, known)}")
        if value is not None and value != _DEFAULTS.get(name, False):
            raise UserError(f"{name}={value!r}: {_UNSUPPORTED[name]}")


def encoder_settings(settings: dict[str, Any], has_images: bool) -> dict[str, Any]:
    """Return `features_extractor_kwargs` as settings of `Encoder`; SB3's widths are those of its CNN.

    Raises:
        UserError: a width of a CNN, and the observations hold no image.
    """
    result = {name: value for name, value in settings.items() if name not in _CNN_WIDTHS}
    for name in _CNN_WIDTHS:
        if name in settings:
            if not has_images:
                raise UserError(
                    f"{name} is the width of a CNN, and the observations hold no image: for others give "
                    f"encoder_kwargs={{'mlp': [{settings[name]}]}}"
                )
            result["cnn"] = {**result.get("cnn", {}), "features": settings[name]}
    return result
