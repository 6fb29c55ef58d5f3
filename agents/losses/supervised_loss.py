"""The loss of learning from right answers, and the prototype loss on an encoder's features, of `[T, B]` tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SupervisedLossSums(NamedTuple):
    """The loss's terms, scalars `[]` summed over the positions that they are defined at."""

    cross_entropy: Tensor
    right: Tensor  # number of answers that have the highest probability
    prototype_loss: Tensor


def answer_loss(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the number of right guesses, each `[]`, summed over the answered positions.

    Args:
        logits: `[T, B, A]`.
        answers: `[T, B]`, int64; -1 where no answer is asked for.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=-1, reduction="sum")
    return losses, (logits.argmax(-1) == answers).sum().float()


def prototype_logits(features: Tensor, classes: Tensor, episode_starts: Tensor, n_classes: int) -> Tensor:
    """Return minus the squared distances of features to the classes' prototypes, `[T, B, n_classes]`.

    A prototype is the mean feature of a class's earlier images in the same episode (Snell et al., 2017,
    https://arxiv.org/abs/1703.05175); -inf where there is none yet. Distances are divided by `sqrt(F)`.

    Args:
        features: `[T, B, F]`.
        classes: `[T, B]`, int64, the images' classes within their episodes; -1 for an image of no class.
        episode_starts: `[T, B]`.
        n_classes: number of classes in an episode.
    """
    n_steps, batch, width = features.shape
    members = (F.one_hot(classes.clamp(min=0), n_classes) * (classes >= 0)[..., None]).to(features.dtype)  # [T, B, C]
    entries = torch.cat((members[..., None], members[..., None] * features[:, :, None]), -1)  # [T, B, C, 1 + F]
    before = F.pad(entries.cumsum(0)[:-1], (0, 0) * 3 + (1, 0))  # sums over the steps before t
    steps = torch.arange(n_steps, device=features.device)[:, None]
    start = torch.where(episode_starts != 0, steps, 0).cummax(0).values  # [T, B], of the step's episode
    sums = before - before[start, torch.arange(batch, device=features.device)]  # over the episode's steps before t
    counts = sums[..., 0].round()
    prototypes = sums[..., 1:] / counts.clamp(min=1)[..., None]
    distances = (features[:, :, None] - prototypes).square().sum(-1) / width**0.5
    logits: Tensor = (-distances).masked_fill(counts == 0, -torch.inf)
    return logits


def prototype_loss(
    features: Tensor, classes: Tensor, answers: Tensor, episode_starts: Tensor, n_classes: int
) -> Tensor:
    """Return the cross-entropy of a prototype network, `[]`, summed over the answers of which an example was seen.

    Arguments as of `prototype_logits`; `answers` as of `answer_loss`.
    """
    logits = prototype_logits(features, classes, episode_starts, n_classes)
    known = logits.gather(-1, answers.clamp(min=0)[..., None]).squeeze(-1).isfinite() & (answers >= 0)
    targets = torch.where(known, answers, -1)
    logits = logits.masked_fill(~known[..., None], 0.0)  # rows without a prototype have no finite entry
    return answer_loss(logits, targets)[0]
