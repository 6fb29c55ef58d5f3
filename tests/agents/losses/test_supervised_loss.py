"""The supervised loss against loops that read like its definition."""

import torch
from torch.nn import functional

from srwm_rl.agents.losses.supervised_loss import answer_loss, prototype_logits, prototype_loss

T, B, C, F = 20, 3, 4, 5


def episodes():
    """Return features, classes, answers and episode starts of `[T, B]` steps; an episode starts within each row."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(T, B, F, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(-1, C, (T, B), generator=generator)
    asked = torch.rand(T, B, generator=generator) < 0.6
    starts = torch.zeros(T, B)
    starts[4] = 1.0
    starts[6, 1] = 1.0
    return features, classes, torch.where(asked, classes, -1), starts


def slow_logits(features, classes, starts):
    """Return the logits of prototypes step by step; None where a class has none."""
    logits = [[[None] * C for _ in range(B)] for _ in range(T)]
    for b in range(B):
        first = 0
        for t in range(T):
            first = t if starts[t, b] else first
            for c in range(C):
                members = [features[s, b] for s in range(first, t) if classes[s, b] == c]
                if members:
                    prototype = torch.stack(members).mean(0)
                    logits[t][b][c] = -(features[t, b] - prototype).square().sum() / F**0.5
    return logits


def slow_prototype_loss(features, classes, answers, starts):
    loss = torch.zeros((), dtype=features.dtype)
    for rows, told in zip(slow_logits(features, classes, starts), answers, strict=True):
        for row, answer in zip(rows, told.tolist(), strict=True):
            if answer >= 0 and row[answer] is not None:
                loss = loss + torch.stack([x for x in row if x is not None]).logsumexp(0) - row[answer]
    return loss


def test_prototype_logits_are_those_of_the_loop():
    features, classes, _, starts = episodes()
    result = prototype_logits(features, classes, starts, C)
    assert result.shape == (T, B, C)
    for t, rows in enumerate(slow_logits(features, classes, starts)):
        for b, row in enumerate(rows):
            for c, expected in enumerate(row):
                if expected is None:
                    assert result[t, b, c] == -torch.inf
                else:
                    torch.testing.assert_close(result[t, b, c], expected)


def test_prototype_loss_and_its_gradient_are_those_of_the_loop():
    features, classes, answers, starts = episodes()
    loss, slow = (f(features, classes, answers, starts) for f in (
        lambda *args: prototype_loss(*args, n_classes=C), slow_prototype_loss
    ))  # fmt: skip
    assert slow > 1
    torch.testing.assert_close(loss, slow)
    expected, actual = (torch.autograd.grad(value, features)[0] for value in (slow, loss))
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected)


def test_answer_loss_counts_answered_positions_alone():
    logits = torch.randn(T, B, C, generator=torch.Generator().manual_seed(1))
    _, _, answers, _ = episodes()
    losses = [
        functional.cross_entropy(logits[t, b], answers[t, b]) for t in range(T) for b in range(B) if answers[t, b] >= 0
    ]
    right = sum(int(logits[t, b].argmax() == answers[t, b]) for t in range(T) for b in range(B))
    loss, n_right = answer_loss(logits, answers)
    torch.testing.assert_close(loss, torch.stack(losses).sum())
    assert n_right == right
