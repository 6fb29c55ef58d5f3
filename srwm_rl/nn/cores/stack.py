"""`StackCore`: an input projection, perhaps a short convolution, then memory layers with feed-forward blocks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srwm_rl.errors import UserError, check_settings, did_you_mean
from srwm_rl.nn.cores.base import Core
from srwm_rl.nn.layers import FeedForwardBlock, MemoryLayer
from srwm_rl.nn.short_conv import ShortConv

MAX_CONV = 2**10  # steps, far above any useful width

NUMBERS = ("query_init", "key_init", "beta_init", "identity_init", "edit_lr_multiplier", "shift_bound")


class StackCore(Core):
    """Input projection, then memory layers, each followed by a feed-forward block; the state stacks the layers' states.

    A short convolution's earlier inputs are appended to the first layer's state, zeros to the others'.

    A subclass sets `layer_class` and `variants`.

    Args:
        input_size: I, width of the encoder's features.
        hidden_size: width of the layers and of the output.
        n_layers: L, number of memory layers.
        n_heads: H, number of heads in a layer; `D = hidden_size / H`.
        ff_size: inner width of the feed-forward blocks; None: four times `hidden_size`, as published.
        short_conv: width of a causal depthwise convolution between the projection and the first layer, at least 2:
            each channel weighs its last inputs of the episode; see `srwm_rl.nn.short_conv.ShortConv`. 0: none.
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
        short_conv: int = 0,
        variant: str = "default",
        **settings: Any,
    ) -> None:
        check_settings(type(self).__name__, settings, self.stack_settings())
        if variant not in self.variants:
            raise UserError(f"unknown variant {variant!r}{did_you_mean(variant, self.variants)}")
        _check_types(settings)
        is_width = isinstance(short_conv, int) and 2 <= short_conv <= MAX_CONV
        if not is_width and (short_conv != 0 or isinstance(short_conv, bool)):
            raise UserError(f"short_conv must be a width from 2 to {MAX_CONV}, or 0 for none, not {short_conv!r}")
        layer_settings = self.variants[variant] | {name: value for name, value in settings.items() if value is not None}
        project = nn.Linear(input_size, hidden_size)
        layers = [self.layer_class(hidden_size, n_heads, **layer_settings) for _ in range(n_layers)]
        conv = ShortConv(hidden_size, short_conv) if short_conv else None
        super().__init__(input_size, hidden_size, n_layers, layers[0].state_size + (conv.state_size if conv else 0))
        self.project, self.short_conv, self.layers = project, conv, nn.ModuleList(layers)
        self.blocks = nn.ModuleList(FeedForwardBlock(hidden_size, ff_size or 4 * hidden_size) for _ in range(n_layers))

    @classmethod
    def setting_defaults(cls) -> dict[str, Any] | None:
        """Return the settings and their defaults; None: a subclass has a constructor that takes any."""
        return cls.stack_settings() if cls.__init__ is StackCore.__init__ else super().setting_defaults()

    @classmethod
    def stack_settings(cls) -> dict[str, Any]:
        """Return the stack's own settings and its layers', with the defaults of the variant `default`."""
        own = inspect.signature(StackCore).parameters.values()
        layer = inspect.signature(cls.layer_class).parameters.values()
        parameters = (*own, *(parameter for parameter in layer if parameter.kind is parameter.KEYWORD_ONLY))
        defaults = {of.name: of.default for of in parameters if of.name not in ("input_size", "settings")}
        return defaults | cls.variants.get("default", {})

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`."""
        x = self.project(x)  # [T, B, hidden]
        states, finals = self.split_state(state), []
        if self.short_conv is not None:
            x, final = self.short_conv(x, states.pop(0), episode_starts)
            finals.append(final)
        for layer, block, layer_state in zip(self.layers, self.blocks, states, strict=True):
            x, final = layer(x, layer_state, episode_starts)
            x = block(x)
            finals.append(final)
        return x, self.join_state(finals)

    def recurrences(self) -> list[ShortConv | MemoryLayer]:
        """Return the modules that carry a state, in the order in which they run."""
        layers: list[Any] = [*self.layers]
        return layers if self.short_conv is None else [self.short_conv, *layers]

    def split_state(self, state: Tensor) -> list[Tensor]:
        """Split a core state `[L, B, S]` into that of each of `recurrences`, `[B, state_size]`."""
        rows = [*state.unbind(0)]
        if self.short_conv is None:
            return rows
        size = self.state_size - self.short_conv.state_size
        return [rows[0][:, size:], *(row[:, :size] for row in rows)]

    def join_state(self, states: Sequence[Tensor]) -> Tensor:
        """Invert `split_state`."""
        if self.short_conv is not None:
            inputs, first, *others = states
            states = [torch.cat((first, inputs), -1), *(F.pad(other, (0, inputs.shape[-1])) for other in others)]
        # A single layer's state needs no copy.
        return states[0][None] if len(states) == 1 else torch.stack([*states])  # [L, B, S]


def _check_types(settings: dict[str, Any]) -> None:
    """Raise a `UserError` for text where a flag or a number belongs: "False" would count as true."""
    for kind, expected, names in (
        (bool, "true or false", ("input_softmax", "retention")),
        ((int, float), "a number", NUMBERS),
    ):
        for name in names:
            if settings.get(name) is not None and not isinstance(settings[name], kind):
                raise UserError(f"{name} must be {expected}, not {settings[name]!r}")
