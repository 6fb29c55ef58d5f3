"""The experiments of `srwm-rl controls`: PPO on a built-in task, or supervised parity.

An experiment trains a control once and scores it; higher is better. Its `bounds` are the scores of random and of the
best possible actions, `solved` is the fraction of the way between them from which a training counts as solved, and
`rates` are the learning rates to choose from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
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

# The SRWM's sizes, and those of its relatives; the others get as many parameters.
COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}
BY_CONTROL = {"core": "by control", "core_kwargs": COMMON, "learning_rate": "by control"}
TASK_SETTINGS: dict[str, dict[str, Any]] = {  # where they differ from those of `srwm-rl train`
    "recall": {"n_timesteps": 400_000, "learning_rate": 3e-3},
    "bandit": {"n_timesteps": 500_000, "learning_rate": 3e-3},
    "parity": {"n_timesteps": 150_000},
    "repeat_previous": {"n_timesteps": 500_000},
}
TEST_KWARGS = {"parity": ("length:160",)}  # of the environment of the test; the training's are tested as well


class TaskExperiment:
    """PPO on a built-in task, tested on held-out levels with sampled actions."""

    controls = tuple(CONTROLS)
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
        self.settings = {"train": train, "test_kwargs": self.test_kwargs, "n_levels": n_levels}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """Train `control`, and score each of `rows`, which use its weights."""
        kwargs = core_settings(control, COMMON, self._input_size)
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
                return {rows[0]: self._test(RandomAgent(env.action_space, seed), config, 0)}
            model = make_model(config, env)
            model.learn(config.n_timesteps)
        n_parameters = parameter_count(model.policy)
        return {
            row: self._test(FrozenStateAgent(model) if row == "no_shift" else model, config, n_parameters)
            for row in rows
        }

    @cached_property
    def _input_size(self) -> int:
        """Width of the encoder's output, the core's input."""
        config = replace(self.config, core="feedforward", core_kwargs=("hidden_size:1",), n_envs=1)
        with closing(make_env(config)) as env:
            size: int = make_model(config, env).policy.core.input_size
            return size

    def _test(self, agent: Predictor, config: TrainConfig, n_parameters: int) -> Score:
        torch.manual_seed(config.seed)
        if not self.test_kwargs:
            return Score(self._mean_return(agent, config), None, n_parameters)
        longer = replace(config, env_kwargs=self.test_kwargs)
        return Score(self._mean_return(agent, longer), self._mean_return(agent, config), n_parameters)

    def _mean_return(self, agent: Predictor, config: TrainConfig) -> float:
        first = LevelRange.parse(config.eval_levels).start
        levels, n_envs = LevelRange(first, first + self.n_levels), min(config.n_envs, self.n_levels)
        with closing(make_levels_env(config.env, n_envs, levels, 1, config.seed, **config.env_settings())) as env:
            return float(play_levels(agent, env).level_means().mean())


class ParityExperiment:
    """Supervised parity, tested on streams four times as long as any in training."""

    controls = tuple(name for name, control in CONTROLS.items() if control.core is not None)
    solved = 0.98  # of the way from 1/2 to 1: an accuracy of .99
    bounds = (0.5, 1.0)

    def __init__(self, n_updates: int | None, rates: tuple[float, ...], n_streams: int) -> None:
        self.train = ParitySettings() if n_updates is None else ParitySettings(n_updates=n_updates)
        self.rates = rates or (2e-3, 6e-3, 2e-2)
        self.n_streams, self.n_steps = n_streams, 4 * self.train.longest
        self.unit = f"accuracy over the last {self.train.longest} of {self.n_steps} steps, {n_streams} fresh streams"
        self.settings = {"train": asdict(self.train) | BY_CONTROL, "n_streams": n_streams, "rates": self.rates}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """See `TaskExperiment.score`."""
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


Experiment = TaskExperiment | ParityExperiment


def measure(experiment: Experiment, only: Iterable[str], seeds: int, verbose: bool) -> Iterator[dict[str, Any]]:
    """Train and test controls with every seed; yield the contents of the table and the file after each training."""
    rows = {name: Row(name) for name in choose_controls(only) if name in experiment.controls}
    if not rows:
        raise UserError("--supervised has no control 'random': guesses are right half of the time; give others")
    random, best = experiment.bounds
    torch.set_num_threads(1)  # networks this small are slower on several
    for seed in range(seeds):
        for training, names in trainings(rows).items():
            start = time.perf_counter()
            scores = _train(experiment, training, [rows[name] for name in names], seed)
            if verbose:
                results = ", ".join(f"{name} {score.test:.3f}" for name, score in scores.items())
                warn(f"seed {seed}: {results} ({time.perf_counter() - start:.0f} s)")
            yield {
                "unit": experiment.unit,
                "random": random,
                "best": best,
                "solved_from": random + experiment.solved * (best - random),
                "settings": experiment.settings,
                "rows": [row.summary(random, best, experiment.solved) for row in rows.values() if row.scores],
            }


def _train(experiment: Experiment, training: str, rows: list[Row], seed: int) -> dict[str, Score]:
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
