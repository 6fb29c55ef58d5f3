"""Controls: their choice, their matching in size, and the summary of their scores."""

import pytest

from srwm_rl import make_core
from srwm_rl.agents.evaluation.controls import (
    CONTROLS,
    Row,
    Score,
    best_rate,
    choose_controls,
    core_settings,
    parameter_count,
    trainings,
)
from srwm_rl.errors import UserError

COMMON = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}


def test_controls_are_chosen_in_the_tables_order() -> None:
    assert choose_controls(()) == tuple(CONTROLS)
    assert choose_controls(["delta", "srwm"]) == ("srwm", "delta")
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
    row = Row("srwm", scores=[Score(test, test / 2, 77) for test in (1.0, 0.9, 0.2)])
    summary = row.summary(random=0.0, best=1.0, solved=0.9)
    assert (summary["mean"], summary["min"], summary["max"]) == pytest.approx((0.7, 0.2, 1.0))
    assert (summary["solved"], summary["seeds"], summary["parameters"]) == (2, 3, 77)
    assert summary["low"] < 0.7 < summary["high"]
    assert summary["train_mean"] == pytest.approx(0.35)
    single = Row("cut", scores=[Score(0.5, None, 1)]).summary(0, 1, 0.5)
    assert (single["low"], single["train_mean"]) == (None, None)


def test_the_best_rate_is_taken_and_a_single_one_is_not_scored() -> None:
    assert best_rate((0.1, 0.3, 0.2), {0.1: 5.0, 0.2: 9.0, 0.3: 7.0}.__getitem__) == 0.2
    assert best_rate((0.1, 0.2), lambda _: 1.0) == 0.2
    assert best_rate((0.1,), {}.__getitem__) == 0.1
