"""Controls: agents that lack one part each, to find what an agent with self-modification owes its success to.

Each row of `CONTROLS` removes a part or replaces the memory. An agent that is as good without a part does not owe its
success to that part: on bandits, for example, even a modification that was never trained is a reservoir of the past.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from srwm_rl.agents.evaluation.statistics import mean_interval
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import make_core

SELECTION_SEED = 1_000_000  # learning rates are chosen on a seed that is never reported
MAX_WIDTH = 4096


@dataclass(frozen=True)
class Control:
    """One row of the comparison."""

    what: str
    """Short description for the table."""
    core: str | None = "srwm"
    """The core's name; None: random actions."""
    core_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings beside the common ones."""
    bptt: int | None = None
    """Steps after which the gradient through time is cut."""
    matched: bool = False
    """Choose `hidden_size` for as many parameters as the SRWM has, instead of the common sizes."""
    trained_as: str | None = None
    """Use the weights of this row instead of training."""


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
    """Return the named controls in the table's order; all of them if none is named."""
    chosen = list(names) or list(CONTROLS)
    for name in chosen:
        if name not in CONTROLS:
            raise UserError(f"there is no control {name!r}{did_you_mean(name, CONTROLS)}")
    return tuple(name for name in CONTROLS if name in chosen)


def trainings(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each control to train (or, without a network, to play) the rows that use its weights."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(CONTROLS[name].trained_as or name, []).append(name)
    return rows


def core_settings(control: Control, common: dict[str, Any], input_size: int) -> dict[str, Any]:
    """Return the core's settings: the SRWM's and its own, or the width with the number of parameters nearest to it."""
    if control.core is None:
        return {}
    if not control.matched:
        return {**common, **control.core_kwargs}
    core, n_layers = control.core, common["n_layers"]
    target = parameter_count(make_core("srwm", input_size, **common))

    def count(width: int) -> int:
        with torch.device("meta"):  # sizes without memory
            return parameter_count(make_core(core, input_size, hidden_size=width, n_layers=n_layers))

    above = 1 + bisect_left(range(1, MAX_WIDTH), target, key=count)
    width = min((max(above - 1, 1), above), key=lambda width: abs(count(width) - target))
    return {"hidden_size": width, "n_layers": n_layers}


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Score(NamedTuple):
    """The score of one training; higher is better."""

    test: float
    at_training_length: float | None
    """The same with episodes as long as in training, where those of the test are longer."""
    parameters: int


@dataclass
class Row:
    """The scores of one control, one per seed."""

    name: str
    learning_rate: float | None = None
    scores: list[Score] = field(default_factory=list)

    def summary(self, random: float, best: float, solved: float) -> dict[str, Any]:
        """Return the row in JSON's types; a seed counts as solved from this fraction of the way `random` to `best`."""
        tests = np.array([score.test for score in self.scores], np.float64)
        short = [score.at_training_length for score in self.scores if score.at_training_length is not None]
        return {
            "control": self.name,
            "what": CONTROLS[self.name].what,
            "parameters": self.scores[-1].parameters,
            "learning_rate": self.learning_rate,
            **mean_interval(tests).to_json(),
            "min": float(tests.min()),
            "max": float(tests.max()),
            "solved": int((tests >= random + solved * (best - random)).sum()),
            "seeds": len(tests),
            "scores": tests.tolist(),
            "train_mean": float(np.mean(short)) if short else None,
        }


def best_rate(rates: Iterable[float], score: Callable[[float], float]) -> float:
    """Return the learning rate with the highest score, of equal ones the highest; a single one is not scored."""
    candidates = sorted(rates, reverse=True)
    return candidates[0] if len(candidates) == 1 else max(candidates, key=score)
