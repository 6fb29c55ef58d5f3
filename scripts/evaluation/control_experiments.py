"""The experiments of `srwm-rl controls`: PPO on a built-in task, or supervised parity."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from srwm_rl.agents.evaluation.controls import (
    CONTROLS,
    SELECTION_SEED,
    Control,
    Row,
    Score,
    best_rate,
    choose_controls,
    core_settings,
    parameter_count,
    trainings,
)
from srwm_rl.agents.evaluation.interventions import FrozenStateAgent
from srwm_rl.agents.evaluation.play_levels import Predictor, RandomAgent, play_levels
from srwm_rl.agents.evaluation.supervised_parity import EMBEDDING, ParitySettings, accuracy_by_step, train_parity
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env, normalizer
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.training.build import make_env, make_model

COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}
"""The SRWM's sizes, and those of its relatives; the others get as many parameters."""
BY_CONTROL = {"core": "by control", "core_kwargs": COMMON, "learning_rate": "by control"}


@dataclass(frozen=True)
class TaskSettings:
    """The settings of a task that differ from those of `srwm-rl train`."""

    n_timesteps: int
    settings: dict[str, Any] = field(default_factory=dict)
    test_kwargs: tuple[str, ...] = ()
    """Further settings of the environment of the test, as name:value; the training's are tested as well."""


TASK_SETTINGS: dict[str, TaskSettings] = {
    "recall": TaskSettings(400_000, {"learning_rate": 3e-3}),
    "bandit": TaskSettings(500_000, {"learning_rate": 3e-3}),
    "parity": TaskSettings(150_000, test_kwargs=("length:160",)),
    "repeat_previous": TaskSettings(500_000),
}


class ControlExperiment(ABC):
    """Train a control once and score it; higher is better.

    Attributes:
        controls: names of those that the experiment has.
        unit: of a score, for the table's title.
        bounds: the scores of random and of the best possible actions.
        solved: fraction of the way between them from which a training counts as solved.
        rates: the learning rates to choose from.
    """

    controls: tuple[str, ...] = tuple(CONTROLS)
    unit: str
    bounds: tuple[float, float]
    solved: float
    rates: tuple[float, ...]

    @abstractmethod
    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """Train `control`, and score each of `rows`, which use its weights."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return every setting in JSON's types."""

    def report(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Return the contents of the table and of the JSON file."""
        random, best = self.bounds
        return {
            "unit": self.unit,
            "random": random,
            "best": best,
            "solved_from": random + self.solved * (best - random),
            "settings": self.settings(),
            "rows": [row.summary(random, best, self.solved) for row in rows if row.scores],
        }


class TaskExperiment(ControlExperiment):
    """PPO on a built-in task, tested on held-out levels with sampled actions."""

    solved = 0.95

    def __init__(self, task: str, n_timesteps: int | None, rates: tuple[float, ...], n_levels: int) -> None:
        self.task, self.n_levels = TASK_SETTINGS[task], n_levels
        steps = n_timesteps or self.task.n_timesteps
        self.config: TrainConfig = replace(defaults(task, None), device="cpu", n_timesteps=steps, **self.task.settings)
        self.rates = rates or (self.config.learning_rate,)
        test_kwargs = pairs(self.task.test_kwargs, "env_kwargs")
        self.bounds = normalizer(task, env_kwargs=test_kwargs)[task]
        changed = f" with {' '.join(self.task.test_kwargs)}" if test_kwargs else ""
        self.unit = f"mean return on {n_levels} held-out levels{changed}"

    def settings(self) -> dict[str, Any]:
        """See `ControlExperiment`."""
        train = self.config.to_json() | BY_CONTROL
        return {"train": train, "test_kwargs": self.task.test_kwargs, "n_levels": self.n_levels}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """See `ControlExperiment`."""
        kwargs = core_settings(control, COMMON, self._input_size)
        config = replace(
            self.config,
            core=control.core or "feedforward",
            core_kwargs=tuple(f"{name}:{value}" for name, value in kwargs.items()),
            bptt=control.bptt,
            seed=seed,
            learning_rate=rate,
        )
        env = make_env(config)
        try:
            if control.core is None:
                return {rows[0]: self._test(RandomAgent(env.action_space, seed), config, 0)}
            model = make_model(config, env)
            model.learn(config.n_timesteps)
        finally:
            env.close()
        n_parameters = parameter_count(model.policy)
        return {
            row: self._test(FrozenStateAgent(model) if row == "no_shift" else model, config, n_parameters)
            for row in rows
        }

    @cached_property
    def _input_size(self) -> int:
        """Width of the encoder's output, the core's input."""
        config = replace(self.config, core="feedforward", core_kwargs=("hidden_size:1",), n_envs=1)
        env = make_env(config)
        try:
            size: int = make_model(config, env).policy.core.input_size
            return size
        finally:
            env.close()

    def _test(self, agent: Predictor, config: TrainConfig, n_parameters: int) -> Score:
        torch.manual_seed(config.seed)
        if not self.task.test_kwargs:
            return Score(self._mean_return(agent, config), None, n_parameters)
        longer = replace(config, env_kwargs=self.task.test_kwargs)
        return Score(self._mean_return(agent, longer), self._mean_return(agent, config), n_parameters)

    def _mean_return(self, agent: Predictor, config: TrainConfig) -> float:
        first = LevelRange.parse(config.eval_levels).start
        env = make_levels_env(
            config.env,
            min(config.n_envs, self.n_levels),
            LevelRange(first, first + self.n_levels),
            1,
            config.seed,
            env_kwargs=pairs(config.env_kwargs, "env_kwargs"),
            inputs=config.inputs,
            reward_clip=config.reward_clip or None,
        )
        try:
            return float(play_levels(agent, env).level_means().mean())
        finally:
            env.close()


class ParityExperiment(ControlExperiment):
    """Supervised parity, tested on streams four times as long as any in training."""

    controls = tuple(name for name, control in CONTROLS.items() if control.core is not None)
    solved = 0.98  # of the way from 1/2 to 1: an accuracy of .99
    bounds = (0.5, 1.0)

    def __init__(self, n_updates: int | None, rates: tuple[float, ...], n_streams: int) -> None:
        self.train = ParitySettings() if n_updates is None else ParitySettings(n_updates=n_updates)
        self.rates = rates or (2e-3, 6e-3, 2e-2)
        self.n_streams, self.n_steps = n_streams, 4 * self.train.longest
        self.unit = f"accuracy over the last {self.train.longest} of {self.n_steps} steps, {n_streams} fresh streams"

    def settings(self) -> dict[str, Any]:
        """See `ControlExperiment`."""
        return {"train": asdict(self.train) | BY_CONTROL, "n_streams": self.n_streams, "rates": self.rates}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """See `ControlExperiment`."""
        assert control.core is not None, "random actions are not among the controls"
        kwargs, n = core_settings(control, COMMON, EMBEDDING), self.train.longest
        model = train_parity(
            replace(self.train, core=control.core, core_kwargs=kwargs, bptt=control.bptt, learning_rate=rate, seed=seed)
        )
        scores = {}
        for row in rows:
            accuracy = accuracy_by_step(model, self.n_steps, self.n_streams, forget=row == "no_shift")  # [T]
            scores[row] = Score(accuracy[-n:].mean().item(), accuracy[:n].mean().item(), parameter_count(model))
        return scores


def measure(experiment: ControlExperiment, only: Iterable[str], seeds: int, verbose: bool) -> Iterator[list[Row]]:
    """Train and test controls with every seed; yield all rows after each training.

    Args:
        experiment: trains and tests.
        only: names of the controls; none: all.
        seeds: number of trainings per control.
        verbose: print a line per training.

    Raises:
        UserError: an unknown control, or none that the experiment has.
    """
    rows = {name: Row(name) for name in choose_controls(only) if name in experiment.controls}
    if not rows:
        raise UserError("--supervised has no control 'random': guesses are right half of the time; give others")
    torch.set_num_threads(1)  # networks this small are slower on several
    for seed in range(seeds):
        for training, names in trainings(rows).items():
            start = time.perf_counter()
            scores = _train(experiment, training, [rows[name] for name in names], seed)
            if verbose:
                results = ", ".join(f"{name} {score.test:.3f}" for name, score in scores.items())
                warn(f"seed {seed}: {results} ({time.perf_counter() - start:.0f} s)")
            yield list(rows.values())


def _train(experiment: ControlExperiment, training: str, rows: list[Row], seed: int) -> dict[str, Score]:
    """Train one control with one seed, and add the scores to the rows that use its weights."""
    control = CONTROLS[training]
    if rows[0].learning_rate is None and control.core is not None:
        rate = best_rate(
            experiment.rates, lambda rate: experiment.score(control, [training], SELECTION_SEED, rate)[training].test
        )
        for row in rows:
            row.learning_rate = rate
    scores = experiment.score(control, [row.name for row in rows], seed, rows[0].learning_rate or 0.0)
    for row in rows:
        row.scores.append(scores[row.name])
    return scores
