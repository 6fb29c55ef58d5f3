"""The controls of few-shot learning: agents that lack a part each, trained alike from right answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from srwm_rl.agents.evaluation.interventions import FrozenStateAgent, memory_part
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env
from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.nn.cores import make_core
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import pairs
from srwm_rl.scripts.config.tested_levels import tested_range
from srwm_rl.scripts.evaluation.control_experiments import (
    SELECTION_SEED,
    Control,
    Score,
    core_settings,
    parameter_count,
)
from srwm_rl.scripts.evaluation.few_shot import few_shot_rows
from srwm_rl.scripts.training.build import make_env, make_model

N_TIMESTEPS = 1_000_000
TEST_KWARGS = ("shots:5", "queries:1")
NO_AUX = "_no_aux"

_TRAINED: dict[str, Control] = {
    "srwm": Control("gradient through the whole episode"),
    "cut": Control("gradient cut at every step", bptt=1),
    "frozen": Control("query, key and beta as drawn", core_kwargs={"frozen": "query,key,beta"}),
    "sr_delta": Control("self-referential, with a Delta Net", core="sr_delta"),
    "fake_sr": Control("the layers without modification", core="fake_sr"),
    "delta": Control("Delta Net: writes, but not its own rule", core="delta"),
    "lstm": Control("LSTM, as many parameters", core="lstm", matched=True),
    "gru": Control("GRU, as many parameters", core="gru", matched=True),
}
FEW_SHOT_CONTROLS: dict[str, Control] = {
    "srwm": _TRAINED["srwm"],
    "no_shift": Control("srwm's weights, shift zeroed while acting", trained_as="srwm"),
    **{name: control for name, control in _TRAINED.items() if name != "srwm"},
    "prototype": Control("prototype network on the same encoder", core="prototype"),
    **{
        name + NO_AUX: replace(control, what=f"{control.what}; no auxiliary loss", settings={"aux_coef": 0.0})
        for name, control in _TRAINED.items()
    },
    # A memory of LSTM cells as large as the SRWM's has hundreds of times its parameters: both also meet half-way.
    "srwm_small": Control("SRWM in heads of 2: a smaller state", core_kwargs={"head_size": 2}),
    "lstm_small": Control("LSTM, a state as large as srwm_small's", core="lstm", state_of="srwm_small"),
    "gru_small": Control("GRU, a state as large as srwm_small's", core="gru", state_of="srwm_small"),
    "lstm_state": Control("LSTM, a state as large as srwm's", core="lstm", state_of="srwm"),
    "gru_state": Control("GRU, a state as large as srwm's", core="gru", state_of="srwm"),
}


class FewShotExperiment:
    """Supervised few-shot learning, scored by the accuracy on test classes after one example of the class.

    Learning rates are chosen on validation classes.
    """

    controls: Mapping[str, Control] = FEW_SHOT_CONTROLS
    solved = 0.95

    def __init__(self, n_timesteps: int | None, rates: tuple[float, ...], n_levels: int) -> None:
        self.config = replace(
            defaults("fewshot", None, "srwm", "supervised"), device="cpu", n_timesteps=n_timesteps or N_TIMESTEPS
        )
        self.n_levels, self.rates = n_levels, rates or (self.config.learning_rate,)
        protocol = FewShotBatch(1, **pairs(self.config.env_kwargs, "env_kwargs")).protocol
        self.outputs, self.bounds = protocol.outputs, (1 / protocol.outputs, 1.0)
        self.unit = f"accuracy after one example of the class, {n_levels} episodes of test classes"
        train = self.config.to_json() | {
            "core": "by control",
            "core_kwargs": "by control",
            "learning_rate": "by control",
        }
        self.settings = {"train": train, "test_kwargs": TEST_KWARGS, "n_levels": n_levels, "rates": self.rates}
        small = replace(self.config, core="feedforward", core_kwargs=("hidden_size:1",), n_envs=1)
        with closing(make_env(small)) as env:
            self.input_size: int = make_model(small, env).policy.core.input_size

    def train(self, control: Control, seed: int, rate: float) -> Any:
        """Return a trained model."""
        config = replace(
            self.config,
            core=control.core or "srwm",
            core_kwargs=tuple(f"{name}:{value}" for name, value in self.core_kwargs(control).items()),
            bptt=control.bptt,
            seed=seed,
            learning_rate=rate,
            **control.settings,
        )
        with closing(make_env(config)) as env:
            return make_model(config, env).learn(config.n_timesteps)

    def core_kwargs(self, control: Control) -> dict[str, Any]:
        """Return the settings of a control's core."""
        common = pairs(self.config.core_kwargs, "core_kwargs")
        if control.core == "prototype":
            return {"n_classes": self.outputs}
        if control.matched:
            return core_settings(control, common, self.input_size)
        core, n_layers = control.core or "srwm", common["n_layers"]
        if control.state_of is not None:  # the state of a recurrent core grows in proportion to its width
            other = FEW_SHOT_CONTROLS[control.state_of]
            wanted = make_core(other.core or "srwm", self.input_size, **self.core_kwargs(other))
            one = make_core(core, self.input_size, hidden_size=1, n_layers=n_layers)
            width = wanted.state_layers * wanted.state_size // (one.state_layers * one.state_size)
            return {"hidden_size": width, "n_layers": n_layers}
        own = pairs(defaults("fewshot", None, core, "supervised").core_kwargs, "core_kwargs") | control.core_kwargs
        if "head_size" in own:
            own["n_heads"] = own["hidden_size"] // own.pop("head_size")
        return own

    def test(self, model: Any, row: str, seed: int) -> Score:
        """Score a model, with a frozen state for the row "no_shift"; the selection's seed on validation classes."""
        agent = FrozenStateAgent(model, part=memory_part(model.policy)) if row == "no_shift" else model
        validation = LevelRange.parse(self.config.eval_levels)
        start = (validation if seed == SELECTION_SEED else tested_range(self.config)).start
        tested = replace(self.config, env_kwargs=(*self.config.env_kwargs, *TEST_KWARGS))
        levels = LevelRange(start, start + self.n_levels)
        with closing(make_levels_env("fewshot", 32, levels, 1, 0, **tested.env_settings())) as env:
            episodes = play_levels(agent, env, deterministic=True)
        by_seen = few_shot_rows(tested, {row: {"": episodes}})[0]["by_seen"]
        accuracy = {f"after {n}": float(of["mean"] or 0.0) for n, of in enumerate(by_seen) if of is not None}
        core = model.policy.core
        size = core.state_layers * core.state_size
        return Score(accuracy["after 1"], None, parameter_count(model.policy), accuracy, size)
