"""Controls: what else could explain that an agent with self-modification does well on a task.

Each row of `CONTROLS` takes one part away or puts another memory in its place. If an agent is as good without a part,
its success says nothing about that part: on bandits, for one, a modification that was never trained already serves as a
reservoir of the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from srwm_rl.agents.evaluation.statistics import mean_interval
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import make_core

SELECTION_SEED = 1_000_000  # learning rates are chosen on a seed that is never reported
WIDEST = 4096


@dataclass(frozen=True)
class Control:
    """One row of the comparison."""

    what: str
    """In a few words, for the table."""
    core: str | None = "srwm"
    """The core's name; None: no network at all."""
    core_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings beside the common ones."""
    bptt: int | None = None
    """Where the gradient through time is cut."""
    matched: bool = False
    """Choose `hidden_size` for as many parameters as the SRWM has, instead of the common sizes."""
    trained_as: str | None = None
    """Play with the weights of this row instead of training."""


CONTROLS: dict[str, Control] = {
    "srwm": Control("gradient through the whole unroll"),
    "cut": Control("gradient cut at every step", bptt=1),
    "frozen": Control("query, key and beta as drawn", core_kwargs={"frozen": "query,key,beta"}),
    "no_shift": Control("srwm's weights, shift zeroed while acting", trained_as="srwm"),
    "fake_sr": Control("the layers without modification", core="fake_sr"),
    "delta": Control("Delta Net: writes, but not its own rule", core="delta"),
    "lstm": Control("LSTM", core="lstm", matched=True),
    "gru": Control("GRU", core="gru", matched=True),
    "feedforward": Control("no memory", core="feedforward", matched=True),
    "random": Control("random actions", core=None),
}


def choose_controls(names: Iterable[str]) -> tuple[str, ...]:
    """Return the named controls in the table's order; all of them if none is named.

    Raises:
        UserError: an unknown name.
    """
    wanted = list(names) or list(CONTROLS)
    for name in wanted:
        if name not in CONTROLS:
            raise UserError(f"there is no control {name!r}{did_you_mean(name, CONTROLS)}")
    return tuple(name for name in CONTROLS if name in wanted)


def trainings(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each control that has to be trained (or played, if it is random) the rows that come of it."""
    result: dict[str, list[str]] = {}
    for name in names:
        result.setdefault(CONTROLS[name].trained_as or name, []).append(name)
    return result


def core_settings(control: Control, common: dict[str, Any], input_size: int) -> dict[str, Any]:
    """Return the core's settings: the common ones (the SRWM's) and its own, or a width for equal parameters."""
    if control.core is None:
        return {}
    if not control.matched:
        return {**common, **control.core_kwargs}
    target = parameter_count(make_core("srwm", input_size, **common))
    n_layers = common["n_layers"]
    return {"hidden_size": matched_width(control.core, input_size, n_layers, target), "n_layers": n_layers}


def matched_width(core: str, input_size: int, n_layers: int, target: int) -> int:
    """Return the `hidden_size` with which `core` comes nearest to `target` parameters."""

    def count(width: int) -> int:
        with torch.device("meta"):  # sizes without memory
            return parameter_count(make_core(core, input_size, hidden_size=width, n_layers=n_layers))

    width = next((width for width in range(1, WIDEST) if count(width) >= target), WIDEST)
    return min((max(width - 1, 1), width), key=lambda each: abs(count(each) - target))


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


@dataclass
class Row:
    """What was measured of one control: a score per seed."""

    name: str
    parameters: int = 0
    learning_rate: float | None = None
    scores: list[float] = field(default_factory=list)
    train_scores: list[float] = field(default_factory=list)
    """The same at the length of training, where the test is longer; else empty."""

    def add(self, test: float, at_training_length: float | None, parameters: int) -> None:
        """Add one training's scores."""
        self.scores.append(test)
        if at_training_length is not None:
            self.train_scores.append(at_training_length)
        self.parameters = parameters

    def summary(self, random: float, best: float, solved: float) -> dict[str, Any]:
        """Return the row in JSON's types.

        Args:
            random: the score of random actions.
            best: the highest possible score.
            solved: fraction of the way from `random` to `best` from which a seed counts as solved.
        """
        scores = np.array(self.scores, np.float64)
        interval = mean_interval(scores)
        enough = random + solved * (best - random)
        return {
            "control": self.name,
            "what": CONTROLS[self.name].what,
            "parameters": self.parameters,
            "learning_rate": self.learning_rate,
            "mean": interval.mean,
            "low": interval.low if len(scores) > 1 else None,
            "high": interval.high if len(scores) > 1 else None,
            "min": float(scores.min()),
            "max": float(scores.max()),
            "solved": int((scores >= enough).sum()),
            "seeds": len(scores),
            "scores": self.scores,
            "train_mean": float(np.mean(self.train_scores)) if self.train_scores else None,
        }


def best_rate(rates: Iterable[float], score: Callable[[float], float]) -> float:
    """Return the learning rate with the highest score, the highest of equal ones; a lone one is not tried."""
    candidates = sorted(rates, reverse=True)
    return candidates[0] if len(candidates) == 1 else max(candidates, key=score)
