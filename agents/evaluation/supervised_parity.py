"""Supervised parity: a core learns, without rewards, a state that every 1 of a bit stream flips.

There is no exploration, so that a core that fails cannot represent the task or gets no gradient for it. Irie, Csordás
and Schmidhuber (2023, https://arxiv.org/abs/2310.16076) find that fast weights written by a fixed slow net fail where
self-referential ones and LSTMs succeed, streams of unseen lengths included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srwm_rl.errors import UserError
from srwm_rl.nn.cores import make_core
from srwm_rl.nn.cores.unroll import run_core
from srwm_rl.nn.optimizer_hooks import scale_edit_columns

EMBEDDING = 16
TEST_SEED = 10**9  # far from every training seed


@dataclass(frozen=True)
class ParitySettings:
    """How a core is trained on parity."""

    core: str = "srwm"  # a core's name, see `srwm_rl.core_names()`
    core_kwargs: dict[str, Any] = field(default_factory=dict)
    bptt: int | None = None  # cut the gradient through the core's state every so many steps; None: never
    learning_rate: float = 2e-2  # Adam's step size at first; it falls linearly to 0
    n_updates: int = 1000  # gradient steps
    batch: int = 64  # streams per gradient step
    longest: int = 40  # bits of the longest training stream; each batch has a length drawn evenly from 1 to this
    seed: int = 0  # of weights and streams

    def __post_init__(self) -> None:
        for name in ("n_updates", "batch", "longest"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


class ParityModel(nn.Module):
    """Embedding of a bit, core, and one logit per step: is the number of ones so far odd?"""

    def __init__(self, core: str, **core_kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, EMBEDDING)
        self.core = make_core(core, EMBEDDING, **core_kwargs)
        self.head = nn.Linear(self.core.output_size, 1)

    def forward(self, bits: Tensor, bptt: int | None = None, forget: bool = False) -> Tensor:
        """Map bits `[T, B]` to logits `[T, B]`, cutting the gradient through the state every `bptt` steps.

        `forget` zeroes the state before every step: an SRWM then acts with its slow weight throughout.
        """
        starts = torch.full(bits.shape, float(forget))
        starts[0] = 1.0
        y, _ = run_core(self.core, self.embed(bits), self.core.initial_state(bits.shape[1]), starts, bptt)
        logits: Tensor = self.head(y).squeeze(-1)
        return logits


def parity_streams(n_steps: int, n_streams: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random bits and the parity of the bits so far, each int64 `[T, B]`."""
    bits = torch.randint(0, 2, (n_steps, n_streams), generator=generator)
    return bits, bits.cumsum(0) % 2


def train_parity(settings: ParitySettings) -> ParityModel:
    """Train a model by the cross-entropy of every step's answer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ParityModel(settings.core, **settings.core_kwargs)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    scale_edit_columns(optimizer, model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.n_updates)
    for _ in range(settings.n_updates):
        n_steps = int(torch.randint(1, settings.longest + 1, (), generator=generator))
        bits, parity = parity_streams(n_steps, settings.batch, generator)
        loss = F.binary_cross_entropy_with_logits(model(bits, settings.bptt), parity.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def accuracy_by_step(model: ParityModel, n_steps: int, n_streams: int = 1000, forget: bool = False) -> Tensor:
    """Return the fraction of right answers at each step of fresh streams, `[T]`; 1/2 is chance."""
    bits, parity = parity_streams(n_steps, n_streams, torch.Generator().manual_seed(TEST_SEED))
    with torch.no_grad():
        logits: Tensor = model(bits, forget=forget)
    return ((logits > 0) == (parity == 1)).float().mean(1)
