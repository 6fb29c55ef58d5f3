"""Controls: their choice, their matching in size, and the summary of their scores."""

from typing import Any

import pytest

from srwm_rl import make_core
from srwm_rl.errors import UserError
from srwm_rl.scripts.evaluation.control_experiments import (
    CONTROLS,
    SELECTION_SEED,
    Control,
    Score,
    choose_controls,
    choose_rate,
    core_settings,
    parameter_count,
    summary,
    trainings,
)

COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}


def test_controls_are_chosen_in_the_tables_order() -> None:
    assert choose_controls(()) == list(CONTROLS)
    assert choose_controls(["delta", "srwm"]) == ["srwm", "delta"]
    with pytest.raises(UserError, match="did you mean 'delta'"):
        choose_controls(["detla"])


def test_rows_that_share_weights_are_trained_once() -> None:
    assert trainings(("srwm", "cut", "no_shift")) == {"srwm": ["srwm", "no_shift"], "cut": ["cut"]}
    assert trainings(("no_shift",)) == {"srwm": ["no_shift"]}


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.core is not None])
@pytest.mark.parametrize("input_size", [2, 20])
def test_every_core_can_be_built_and_matched_ones_have_as_many_parameters(name: str, input_size: int) -> None:
    control = CONTROLS[name]
    assert control.core is not None
    target = parameter_count(make_core("srwm", input_size, **COMMON))
    count = parameter_count(make_core(control.core, input_size, **core_settings(control, COMMON, input_size)))
    assert count == pytest.approx(target, rel=0.05 if control.matched else 0.25)


def test_the_nearest_width_is_taken() -> None:
    width = core_settings(CONTROLS["gru"], COMMON, 16)["hidden_size"]
    target = parameter_count(make_core("srwm", 16, **COMMON))
    distances = [abs(parameter_count(make_core("gru", 16, hidden_size=width + d)) - target) for d in (-1, 0, 1)]
    assert distances[1] == min(distances)


def test_a_rows_summary_is_that_of_its_scores() -> None:
    row = summary("srwm", "what", 0.1, [Score(test, test / 2, 77) for test in (1.0, 0.9, 0.2)], solved_from=0.9)
    assert (row["mean"], row["min"], row["max"]) == pytest.approx((0.7, 0.2, 1.0))
    assert (row["solved"], row["seeds"], row["parameters"]) == (2, 3, 77)
    assert row["low"] < 0.7 < row["high"]
    assert row["train_mean"] == pytest.approx(0.35)
    single = summary("cut", "what", None, [Score(0.5, None, 1)], solved_from=0.5)
    assert (single["low"], single["train_mean"]) == (None, None)


class Rates:
    """An experiment whose model is the learning rate."""

    controls = CONTROLS

    def __init__(self, scores: dict[float, float], *rates: float) -> None:
        self.scores, self.rates = scores, rates

    def train(self, control: Control, seed: int, rate: float) -> float:
        assert seed == SELECTION_SEED
        return rate

    def test(self, model: float, row: str, seed: int) -> Score:
        assert seed == SELECTION_SEED
        return Score(self.scores[model], None, 0)


def test_the_best_rate_is_taken_and_a_single_one_is_not_scored() -> None:
    def choose(scores: dict[float, float], *rates: float, control: str = "srwm") -> float | None:
        experiment: Any = Rates(scores, *rates)
        return choose_rate(experiment, control)

    assert choose({0.1: 5.0, 0.2: 9.0, 0.3: 7.0}, 0.1, 0.3, 0.2) == 0.2
    assert choose({0.1: 1.0, 0.2: 1.0}, 0.1, 0.2) == 0.2
    assert choose({}, 0.1) == 0.1
    assert choose({}, 0.1, 0.2, control="random") is None
