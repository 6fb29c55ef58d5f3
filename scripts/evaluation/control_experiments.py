"""What `srwm-rl controls` trains and tests: a built-in task by rewards, or parity by right answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from srwm_rl.scripts.config.settings import TrainConfig, defaults, pairs
from srwm_rl.scripts.training.build import make_env, make_model

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.controls import Control
    from srwm_rl.agents.evaluation.play_levels import Predictor

COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}
"""The SRWM's sizes, and those of its relatives; the others get as many parameters."""


@dataclass(frozen=True)
class TaskSettings:
    """How a task is trained and tested where that differs from `srwm-rl train`."""

    n_timesteps: int
    settings: dict[str, Any] = field(default_factory=dict)
    test_kwargs: tuple[str, ...] = ()
    """Settings of the environment in which the trained agents are tested as well, as name:value."""


TASK_SETTINGS: dict[str, TaskSettings] = {
    "recall": TaskSettings(400_000, {"learning_rate": 3e-3}),
    "bandit": TaskSettings(500_000, {"learning_rate": 3e-3}),
    "parity": TaskSettings(150_000, test_kwargs=("length:160",)),
    "repeat_previous": TaskSettings(500_000),
}


class Score(NamedTuple):
    """What one trained agent is worth."""

    test: float
    at_training_length: float | None
    """The same where episodes are as long as in training; None: they are so in the test."""
    parameters: int


class ControlExperiment(ABC):
    """Train a control once and score it; higher is better.

    Attributes:
        unit: what a score is, for the table's title.
        bounds: the scores of random and of the best possible play.
        solved: fraction of the way between them from which a training counts as solved.
        rates: the learning rates to choose from.
    """

    unit: str
    bounds: tuple[float, float]
    solved: float
    rates: tuple[float, ...]

    @abstractmethod
    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """Train `control`, and score each of `rows` that is played with its weights."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return every setting in JSON's types."""


class TaskExperiment(ControlExperiment):
    """PPO on a built-in task, tested on held-out levels with sampled actions."""

    solved = 0.95

    def __init__(self, task: str, n_timesteps: int | None, rates: tuple[float, ...], n_levels: int) -> None:
        from srwm_rl.envs.make import normalizer

        self._task = TASK_SETTINGS[task]
        steps = n_timesteps or self._task.n_timesteps
        self.config: TrainConfig = replace(defaults(task, None), device="cpu", n_timesteps=steps, **self._task.settings)
        self.rates = rates or (self.config.learning_rate,)
        self.n_levels = n_levels
        test_kwargs = pairs(self._task.test_kwargs, "env_kwargs")
        self.bounds = normalizer(task, env_kwargs=test_kwargs)[task]
        changed = f" with {' '.join(self._task.test_kwargs)}" if test_kwargs else ""
        self.unit = f"mean return on {n_levels} held-out levels{changed}"

    def describe(self) -> dict[str, Any]:
        """See `ControlExperiment`."""
        settings = self.config.to_json() | {"core": "by control", "core_kwargs": COMMON, "learning_rate": "by control"}
        return {"train": settings, "test_kwargs": self._task.test_kwargs, "n_levels": self.n_levels}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """See `ControlExperiment`."""
        from srwm_rl.agents.evaluation.controls import parameter_count
        from srwm_rl.agents.evaluation.interventions import FrozenStateAgent
        from srwm_rl.agents.evaluation.play_levels import RandomAgent

        config = self._configure(control, seed, rate)
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

    def _configure(self, control: Control, seed: int, rate: float) -> TrainConfig:
        from srwm_rl.agents.evaluation.controls import core_settings

        kwargs = core_settings(control, COMMON, self._input_size)
        return replace(
            self.config,
            core=control.core or "feedforward",
            core_kwargs=tuple(f"{name}:{value}" for name, value in kwargs.items()),
            bptt=control.bptt,
            seed=seed,
            learning_rate=rate,
        )

    @cached_property
    def _input_size(self) -> int:
        """Width of what the encoder hands to the core."""
        config = replace(self.config, core="feedforward", core_kwargs=("hidden_size:1",), n_envs=1)
        env = make_env(config)
        try:
            size: int = make_model(config, env).policy.core.input_size
            return size
        finally:
            env.close()

    def _test(self, agent: Predictor, config: TrainConfig, n_parameters: int) -> Score:
        import torch

        torch.manual_seed(config.seed)
        if not self._task.test_kwargs:
            return Score(self._mean_return(agent, config), None, n_parameters)
        longer = replace(config, env_kwargs=self._task.test_kwargs)
        return Score(self._mean_return(agent, longer), self._mean_return(agent, config), n_parameters)

    def _mean_return(self, agent: Predictor, config: TrainConfig) -> float:
        from srwm_rl.agents.evaluation.play_levels import play_levels
        from srwm_rl.envs.levels import LevelRange
        from srwm_rl.envs.make import make_levels_env

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

    solved = 0.98  # of the way from 1/2 to 1: an accuracy of .99
    bounds = (0.5, 1.0)
    default_rates = (2e-3, 6e-3, 2e-2)

    def __init__(self, n_updates: int | None, rates: tuple[float, ...], n_streams: int) -> None:
        from srwm_rl.agents.evaluation.supervised_parity import ParitySettings

        self.settings = ParitySettings() if n_updates is None else ParitySettings(n_updates=n_updates)
        self.rates = rates or self.default_rates
        self.n_streams = n_streams
        self.n_steps, self.tail = 4 * self.settings.longest, self.settings.longest
        self.unit = f"accuracy over the last {self.tail} of {self.n_steps} steps, {n_streams} fresh streams"

    def describe(self) -> dict[str, Any]:
        """See `ControlExperiment`."""
        settings = asdict(self.settings) | {"core": "by control", "core_kwargs": COMMON, "learning_rate": "by control"}
        return {"train": settings, "n_streams": self.n_streams, "rates": self.rates}

    def score(self, control: Control, rows: list[str], seed: int, rate: float) -> dict[str, Score]:
        """See `ControlExperiment`."""
        from srwm_rl.agents.evaluation.controls import core_settings, parameter_count
        from srwm_rl.agents.evaluation.supervised_parity import EMBEDDING, accuracy_by_step, train_parity

        assert control.core is not None, "there are no random answers"
        kwargs = core_settings(control, COMMON, EMBEDDING)
        model = train_parity(
            replace(
                self.settings, core=control.core, core_kwargs=kwargs, bptt=control.bptt, learning_rate=rate, seed=seed
            )
        )
        result = {}
        for row in rows:
            right = accuracy_by_step(model, self.n_steps, self.n_streams, forget=row == "no_shift")  # [T]
            tail, short = right[-self.tail :].mean().item(), right[: self.settings.longest].mean().item()
            result[row] = Score(tail, short, parameter_count(model))
        return result
