"""The experiments of `srwm-rl controls`: agents that lack one part each, by PPO on a task or by supervised parity.

Each row of `CONTROLS` removes a part or replaces the memory. An agent that is as good without a part does not owe its
success to that part: on bandits, for example, even a modification that was never trained is a reservoir of the past.

An experiment trains a control once and scores it; higher is better. Its `bounds` are the scores of random and of the
best possible actions, `solved` is the fraction of the way between them from which a training counts as solved, and
`rates` are the learning rates to choose from.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from srwm_rl.agents.evaluation.interventions import FrozenStateAgent, memory_part
from srwm_rl.agents.evaluation.play_levels import Predictor, RandomAgent, play_levels
from srwm_rl.agents.evaluation.statistics import mean_interval, t_interval
from srwm_rl.agents.evaluation.supervised_parity import (
    EMBEDDING,
    ParityModel,
    ParitySettings,
    accuracy_by_step,
    train_parity,
)
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env, normalizer
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.cores import make_core
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.training.build import make_env, make_model

SELECTION_SEED = 1_000_000  # learning rates are chosen on a seed that is never reported
# The SRWM's sizes, and those of its relatives; the others get as many parameters.
COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}
BY_CONTROL = {"core": "by control", "core_kwargs": COMMON, "learning_rate": "by control"}
TASK_SETTINGS: dict[str, dict[str, Any]] = {  # where they differ from those of `srwm-rl train`
    "recall": {"n_timesteps": 400_000, "learning_rate": 3e-3},
    "bandit": {"n_timesteps": 500_000, "learning_rate": 3e-3},
    "parity": {"n_timesteps": 150_000},
    "repeat_previous": {"n_timesteps": 500_000},
    "associative_recall": {"n_timesteps": 500_000},
    "hidden_controls": {"n_timesteps": 600_000},
    "mdp": {"n_timesteps": 1_500_000},
}
TEST_KWARGS = {"parity": ("length:160",)}  # of the environment of the test; the training's are tested as well


@dataclass(frozen=True)
class Control:
    """One row of the comparison."""

    what: str  # short description for the table
    core: str | None = "srwm"  # None: random actions
    core_kwargs: dict[str, Any] = field(default_factory=dict)  # beside the common ones
    bptt: int | None = None  # steps after which the gradient through time is cut
    matched: bool = False  # choose `hidden_size` for as many parameters as the SRWM has, instead of the common sizes
    trained_as: str | None = None  # use the weights of this row instead of training
    settings: dict[str, Any] = field(default_factory=dict)  # of the trainer, where they differ
    state_of: str | None = None  # choose `hidden_size` for as many floats in the state as this row has


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


def choose_controls(names: Iterable[str], controls: Mapping[str, Control] = CONTROLS) -> list[str]:
    """Return the named controls in the table's order; all of them if none is named."""
    chosen = list(names) or list(controls)
    for name in chosen:
        if name not in controls:
            raise UserError(f"there is no control {name!r}{did_you_mean(name, controls)}")
    return [name for name in controls if name in chosen]


def trainings(names: Iterable[str], controls: Mapping[str, Control] = CONTROLS) -> dict[str, list[str]]:
    """Return for each control to train (or, without a network, to play) the rows that use its weights."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(controls[name].trained_as or name, []).append(name)
    return rows


def core_settings(control: Control, common: dict[str, Any], input_size: int) -> dict[str, Any]:
    """Return the core's settings: the SRWM's and its own, or the width with the number of parameters nearest to it."""
    if control.core is None:
        return {}
    if not control.matched:
        return {**common, **control.core_kwargs}
    target = parameter_count(make_core("srwm", input_size, **common))
    width = matched_width(control.core, input_size, common["n_layers"], target)
    return {"hidden_size": width, "n_layers": common["n_layers"]}


def matched_width(core: str, input_size: int, n_layers: int, target: int) -> int:
    """Return the `hidden_size` with which a core's number of parameters is nearest to `target`."""

    def count(width: int) -> int:
        with torch.device("meta"):  # sizes without memory
            return parameter_count(make_core(core, input_size, hidden_size=width, n_layers=n_layers))

    above = 1 + bisect_left(range(1, 4096), target, key=count)
    return min((max(above - 1, 1), above), key=lambda width: abs(count(width) - target))


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Score(NamedTuple):
    """The score of one training; higher is better."""

    test: float
    at_training_length: float | None  # with episodes as long as in training, where those of the test are longer
    parameters: int
    more: dict[str, float] = {}  # noqa: RUF012 (of a NamedTuple; further scores by name)
    state: int | None = None  # floats of the core's state, where it is said


class Experiment(Protocol):
    """What `measure` needs; see the module."""

    controls: Mapping[str, Control]
    bounds: tuple[float, float]
    solved: float
    rates: tuple[float, ...]
    unit: str
    settings: dict[str, Any]

    def train(self, control: Control, seed: int, rate: float) -> Any:
        """Return a trained model."""

    def test(self, model: Any, row: str, seed: int) -> Score:
        """Score a model in the row of a control."""


class TaskExperiment:
    """PPO on a built-in task, tested on held-out levels with sampled actions."""

    controls: Mapping[str, Control] = CONTROLS
    solved = 0.95

    def __init__(self, task: str, n_timesteps: int | None, rates: tuple[float, ...], n_levels: int) -> None:
        self.n_levels, self.test_kwargs = n_levels, TEST_KWARGS.get(task, ())
        config = replace(defaults(task, None), device="cpu", **TASK_SETTINGS[task])
        self.config: TrainConfig = replace(config, n_timesteps=n_timesteps or config.n_timesteps)
        self.rates = rates or (self.config.learning_rate,)
        self.bounds = normalizer(task, env_kwargs=pairs(self.test_kwargs, "env_kwargs"))[task]
        changed = f" with {' '.join(self.test_kwargs)}" if self.test_kwargs else ""
        self.unit = f"mean return on {n_levels} held-out levels{changed}"
        train = self.config.to_json() | BY_CONTROL
        self.settings = {"train": train, "test_kwargs": self.test_kwargs, "n_levels": n_levels, "rates": self.rates}
        small = replace(self.config, core="feedforward", core_kwargs=("hidden_size:1",), n_envs=1)
        with closing(make_env(small)) as env:
            self.input_size: int = make_model(small, env).policy.core.input_size

    def train(self, control: Control, seed: int, rate: float) -> Any:
        """Return a trained model, or an agent with random actions."""
        kwargs = core_settings(control, COMMON, self.input_size)
        config = replace(
            self.config,
            core=control.core or "feedforward",
            core_kwargs=tuple(f"{name}:{value}" for name, value in kwargs.items()),
            bptt=control.bptt,
            seed=seed,
            learning_rate=rate,
        )
        with closing(make_env(config)) as env:
            if control.core is None:
                return RandomAgent(env.action_space, seed)
            return make_model(config, env).learn(config.n_timesteps)

    def test(self, model: Any, row: str, seed: int) -> Score:
        """Score a model, with a frozen state for the row "no_shift"."""
        agent = FrozenStateAgent(model, part=memory_part(model.policy)) if row == "no_shift" else model
        torch.manual_seed(seed)
        kwargs = [self.test_kwargs] * bool(self.test_kwargs) + [self.config.env_kwargs]
        test, *shorter = (self._mean_return(agent, replace(self.config, seed=seed, env_kwargs=own)) for own in kwargs)
        n_parameters = parameter_count(model.policy) if hasattr(model, "policy") else 0
        return Score(test, shorter[0] if shorter else None, n_parameters)

    def _mean_return(self, agent: Predictor, config: TrainConfig) -> float:
        """Return the mean return on held-out levels."""
        first = LevelRange.parse(config.eval_levels).start
        levels, n_envs = LevelRange(first, first + self.n_levels), min(config.n_envs, self.n_levels)
        with closing(make_levels_env(config.env, n_envs, levels, 1, config.seed, **config.env_settings())) as env:
            return float(play_levels(agent, env).level_means().mean())


class ParityExperiment:
    """Supervised parity, tested on streams four times as long as any in training."""

    controls: Mapping[str, Control] = {name: of for name, of in CONTROLS.items() if of.core is not None}
    solved = 0.98  # of the way from 1/2 to 1: an accuracy of .99
    bounds = (0.5, 1.0)

    def __init__(self, n_updates: int | None, rates: tuple[float, ...], n_streams: int) -> None:
        self.config = ParitySettings() if n_updates is None else ParitySettings(n_updates=n_updates)
        self.rates = rates or (2e-3, 6e-3, 2e-2)
        longest = self.config.longest
        self.n_streams, self.n_steps = n_streams, 4 * longest
        self.unit = f"accuracy over the last {longest} of {self.n_steps} steps, {n_streams} fresh streams"
        self.settings = {"train": asdict(self.config) | BY_CONTROL, "n_streams": n_streams, "rates": self.rates}

    def train(self, control: Control, seed: int, rate: float) -> ParityModel:
        """Return a trained model."""
        kwargs = core_settings(control, COMMON, EMBEDDING)
        settings: dict[str, Any] = {"core": control.core, "core_kwargs": kwargs, "bptt": control.bptt}
        return train_parity(replace(self.config, **settings, learning_rate=rate, seed=seed))

    def test(self, model: ParityModel, row: str, seed: int) -> Score:
        """See `TaskExperiment.test`; the streams are the same for all seeds."""
        accuracy = accuracy_by_step(model, self.n_steps, self.n_streams, forget=row == "no_shift")  # [T]
        n = self.config.longest
        return Score(accuracy[-n:].mean().item(), accuracy[:n].mean().item(), parameter_count(model))


def measure(
    experiment: Experiment,
    only: Iterable[str],
    seeds: int,
    verbose: bool,
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Train and test controls with every seed; yield the contents of the table and the file after each training.

    `known` are rows of an earlier, unfinished call, whose trainings are not repeated.
    """
    controls = experiment.controls
    names = choose_controls(only, controls)
    rates: dict[str, float | None] = {row["control"]: row["learning_rate"] for row in known}
    scores = {row["control"]: _scores_of(row) for row in known}
    seconds: dict[str, list[float]] = {row["control"]: list(row["seconds"]) for row in known}
    random, best = experiment.bounds
    solved_from = random + experiment.solved * (best - random)
    torch.set_num_threads(1)  # networks this small are slower on several

    def report() -> dict[str, Any]:
        shown = [name for name in controls if name in scores]
        return {
            "unit": experiment.unit,
            "random": random,
            "best": best,
            "solved_from": solved_from,
            "settings": experiment.settings,
            "rows": [
                summary(row, controls[row].what, rates[row], scores[row], solved_from, seconds[row]) for row in shown
            ],
        }

    if known:
        yield report()
    for seed in range(seeds):
        for training, rows in trainings(names, controls).items():
            missing = [row for row in rows if len(scores.get(row, ())) <= seed]
            if not missing:
                continue
            start = time.perf_counter()
            if not rates.keys() & rows:
                rates |= dict.fromkeys(rows, choose_rate(experiment, training))
                start = time.perf_counter()
            rates |= {row: rates[next(name for name in rows if name in rates)] for row in missing}
            model = experiment.train(controls[training], seed, rates[rows[0]] or 0.0)
            took = time.perf_counter() - start
            for row in missing:
                scores.setdefault(row, []).append(experiment.test(model, row, seed))
                seconds.setdefault(row, []).append(round(took, 1))
            if verbose:
                results = ", ".join(f"{row} {scores[row][-1].test:.3f}" for row in missing)
                warn(f"seed {seed}: {results} ({took:.0f} s)")
            yield report()


def _scores_of(row: dict[str, Any]) -> list[Score]:
    """Return the scores by seed of a row of the file."""
    shorter = row["train_scores"] or [None] * len(row["scores"])
    more = row.get("more", {})
    return [
        Score(
            *(test, shorter[i], row["parameters"], {name: of["scores"][i] for name, of in more.items()}),
            state=row.get("state"),
        )
        for i, test in enumerate(row["scores"])
    ]


def choose_rate(experiment: Experiment, training: str) -> float | None:
    """Return the learning rate with the highest score, of equal ones the highest; a single one is not scored."""
    control, rates = experiment.controls[training], sorted(experiment.rates, reverse=True)
    if control.core is None:
        return None

    def score(rate: float) -> float:
        return experiment.test(experiment.train(control, SELECTION_SEED, rate), training, SELECTION_SEED).test

    return rates[0] if len(rates) == 1 else max(rates, key=score)


def summary(
    name: str,
    what: str,
    learning_rate: float | None,
    scores: list[Score],
    solved_from: float,
    seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """Return a row of the table in JSON's types, of a control's scores by seed."""
    tests = np.array([score.test for score in scores], np.float64)
    shorter = [score.at_training_length for score in scores if score.at_training_length is not None]
    row = {
        "control": name,
        "what": what,
        "parameters": scores[-1].parameters,
        "learning_rate": learning_rate,
        **mean_interval(tests).to_json(),
        "min": float(tests.min()),
        "max": float(tests.max()),
        "solved": int((tests >= solved_from).sum()),
        "seeds": len(tests),
        "scores": tests.tolist(),
        "train_mean": float(np.mean(shorter)) if shorter else None,
        "train_scores": shorter,
        "seconds": list(seconds),
        **({} if scores[-1].state is None else {"state": scores[-1].state}),
    }
    more = {of: [score.more[of] for score in scores] for of in scores[0].more}
    if more:  # few seeds: Student's t
        row["more"] = {
            of: {**t_interval(np.array(by_seed)).to_json(), "scores": by_seed} for of, by_seed in more.items()
        }
    return row
