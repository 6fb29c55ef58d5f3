"""A prototype network as a core: the memory of few-shot episodes that is written by hand, not learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.nn.cores.base import Core


class PrototypeCore(Core):
    """The mean feature of each class's examples in the episode; the output is minus the squared distances to these.

    Prototypical networks (Snell et al., 2017, https://arxiv.org/abs/1703.05175), for features of an image followed by
    its label `[n_classes]`, which is zero where it is not told. A class without an example has a learned prototype and
    bias, the same for all. The distances are divided by `sqrt(F)`, F being the width of the image's features.

    The state holds the sum of the features and the number of examples of each class, `S = n_classes * (F + 1)`; with
    delayed labels also the last image's features and whether there was one, `F + 1` more.

    Args:
        input_size: `F + n_classes`.
        n_classes: size of the label.
        delayed: the label belongs to the image of the step before.

    Raises:
        UserError: `n_classes` is left out, or leaves no room for features.
    """

    def __init__(self, input_size: int, n_classes: int = 0, delayed: bool = False) -> None:
        if not isinstance(n_classes, int) or not 1 <= n_classes < input_size:
            raise UserError(
                "core 'prototype' is for few-shot episodes: give it n_classes, the size of the label, the last of its "
                f"{input_size} inputs, not {n_classes!r}"
            )
        n_features, n_vectors = input_size - n_classes, n_classes + delayed
        super().__init__(input_size, n_classes, 1, n_vectors * (n_features + 1))
        self.n_features, self.n_classes, self.delayed = n_features, n_classes, delayed
        self.prior, self.bias = nn.Parameter(torch.zeros(n_features)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Core.forward`."""
        features, labels = x.split((self.n_features, self.n_classes), dim=-1)
        told = (labels == labels.amax(-1, keepdim=True)) & (labels != 0).any(-1, keepdim=True)
        examples = torch.cat((features, torch.ones_like(features[..., :1])), dim=-1)  # [T, B, F + 1]
        memory = state[0].unflatten(-1, (-1, self.n_features + 1))  # [B, C (+ 1), F + 1]
        outputs = []
        for t in range(len(x)):
            memory = memory.masked_fill((episode_starts[t] != 0)[:, None, None], 0)
            if self.delayed:
                classes, last = memory.split((self.n_classes, 1), dim=1)
                classes = classes + told[t][..., None] * last
                outputs.append(self._distances(features[t], classes))
                memory = torch.cat((classes, examples[t][:, None]), dim=1)
            else:
                outputs.append(self._distances(features[t], memory))
                memory = memory + told[t][..., None] * examples[t][:, None]
        return torch.stack(outputs), memory.flatten(1)[None]

    def _distances(self, features: Tensor, memory: Tensor) -> Tensor:
        """Return minus the squared distances `[B, C]` of features `[B, F]` to the prototypes."""
        sums, counts = memory[..., :-1], memory[..., -1:]
        prototypes = torch.where(counts > 0, sums / counts.clamp(min=1), self.prior)
        distances = (features[:, None] - prototypes).square().sum(-1) / self.n_features**0.5
        return torch.where(counts[..., 0] > 0, -distances, self.bias - distances)
