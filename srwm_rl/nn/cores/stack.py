"""`StackCore`: an input projection, then memory layers with feed-forward blocks."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.nn.cores.base import Core
from srwm_rl.nn.layers import FeedForwardBlock, MemoryLayer


class StackCore(Core):
    """Input projection, then memory layers, each followed by a feed-forward block; the state stacks the layers' states.

    A subclass sets `layer_class` and `variants`.

    Args:
        input_size: I.
        hidden_size: width of the layers and of the output.
        n_layers: L.
        n_heads: H; `D = hidden_size / H`.
        ff_size: inner width of the feed-forward blocks; None: four times `hidden_size`, as published.
        variant: the layer's default settings: "default", or "paper" for the published layer exactly.
        settings: of the layer, see `layer_class`, by name; None: the variant's.

    Raises:
        UserError: an unknown variant or setting, a setting of the wrong type, or one that the layer refuses.
    """

    layer_class: ClassVar[type[MemoryLayer]]
    variants: ClassVar[dict[str, dict[str, Any]]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        n_layers: int = 2,
        n_heads: int = 8,
        ff_size: int | None = None,
        variant: str = "default",
        **settings: Any,
    ) -> None:
        check_settings(type(self).__name__, settings, self.setting_names())
        if variant not in self.variants:
            raise UserError(f"unknown variant {variant!r}{did_you_mean(variant, self.variants)}")
        _check_types(settings)
        layer_settings = self.variants[variant] | {name: value for name, value in settings.items() if value is not None}
        project = nn.Linear(input_size, hidden_size)
        layers = [self.layer_class(hidden_size, n_heads, **layer_settings) for _ in range(n_layers)]
        super().__init__(input_size, hidden_size, n_layers, layers[0].state_size)
        self.project, self.layers = project, nn.ModuleList(layers)
        self.blocks = nn.ModuleList(FeedForwardBlock(hidden_size, ff_size or 4 * hidden_size) for _ in range(n_layers))

    @classmethod
    def setting_names(cls) -> set[str]:
        """Return the names of the core's own settings, then the layer's."""
        layer = inspect.signature(cls.layer_class).parameters.values()
        own = inspect.signature(StackCore).parameters.keys() - {"input_size", "settings"}
        return own | {parameter.name for parameter in layer if parameter.kind is parameter.KEYWORD_ONLY}

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`."""
        x = self.project(x)  # [T, B, hidden]
        finals = []
        for layer, block, layer_state in zip(self.layers, self.blocks, state.unbind(0), strict=True):
            x, final = layer(x, layer_state, episode_starts)
            x = block(x)
            finals.append(final)
        # A single layer's state needs no copy.
        return x, finals[0][None] if len(finals) == 1 else torch.stack(finals)  # [L, B, S]


def _check_types(settings: dict[str, Any]) -> None:
    """Raise a `UserError` for text where a flag or a number belongs: "False" would count as true."""
    for kind, expected, names in (
        (bool, "true or false", ("input_softmax", "retention")),
        ((int, float), "a number", ("query_init", "key_init", "beta_init", "edit_lr_multiplier", "shift_bound")),
    ):
        for name in names:
            if settings.get(name) is not None and not isinstance(settings[name], kind):
                raise UserError(f"{name} must be {expected}, not {settings[name]!r}")
