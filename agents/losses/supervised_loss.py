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
    episodes = episode_starts.cumsum(0)  # [T, B]
    n_steps = len(classes)
    earlier = torch.ones(n_steps, n_steps, dtype=torch.bool, device=classes.device).tril(-1)
    same = (episodes[:, None] == episodes[None]) & earlier[..., None]  # [T, T, B], of steps t and s < t
    members = F.one_hot(classes.clamp(min=0), n_classes) * (classes >= 0)[..., None]  # [T, B, C]
    weights = torch.einsum("tsb,sbc->btcs", same.to(features.dtype), members.to(features.dtype))
    counts = weights.sum(-1)  # [B, T, C]
    prototypes = weights @ features.transpose(0, 1)[:, None] / counts.clamp(min=1)[..., None]  # [B, T, C, F]
    distances = (features.transpose(0, 1)[:, :, None] - prototypes).square().sum(-1) / features.shape[-1] ** 0.5
    logits: Tensor = (-distances).masked_fill(counts == 0, -torch.inf).transpose(0, 1)
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
