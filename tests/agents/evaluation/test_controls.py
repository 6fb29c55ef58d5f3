"""Controls: which there are, how they are matched in size, and how their scores are added up."""

import pytest

from srwm_rl import make_core
from srwm_rl.agents.evaluation.controls import (
    CONTROLS,
    Row,
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


def test_what_is_played_with_other_weights_is_not_trained_itself() -> None:
    assert trainings(("srwm", "cut", "no_shift")) == {"srwm": ["srwm", "no_shift"], "cut": ["cut"]}
    assert trainings(("no_shift",)) == {"srwm": ["no_shift"]}


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.core is not None])
@pytest.mark.parametrize("input_size", [2, 20])
def test_every_core_can_be_built_and_matched_ones_have_as_many_parameters(name: str, input_size: int) -> None:
    control = CONTROLS[name]
    assert control.core is not None
    target = parameter_count(make_core("srwm", input_size, **COMMON))
    found = parameter_count(make_core(control.core, input_size, **core_settings(control, COMMON, input_size)))
    assert found == pytest.approx(target, rel=0.05 if control.matched else 0.25)


def test_the_nearest_width_is_taken() -> None:
    width = core_settings(CONTROLS["gru"], COMMON, 16)["hidden_size"]
    target = parameter_count(make_core("srwm", 16, **COMMON))
    off = [abs(parameter_count(make_core("gru", 16, hidden_size=width + d)) - target) for d in (-1, 0, 1)]
    assert off[1] == min(off)


def test_rows_say_what_the_scores_say() -> None:
    row = Row("srwm")
    for score in (1.0, 0.9, 0.2):
        row.add(score, score / 2, 77)
    summary = row.summary(random=0.0, best=1.0, solved=0.9)
    assert (summary["mean"], summary["min"], summary["max"]) == pytest.approx((0.7, 0.2, 1.0))
    assert (summary["solved"], summary["seeds"], summary["parameters"]) == (2, 3, 77)
    assert summary["low"] < 0.7 < summary["high"]
    assert summary["train_mean"] == pytest.approx(0.35)
    alone = Row("cut")
    alone.add(0.5, None, 1)
    assert (alone.summary(0, 1, 0.5)["low"], alone.summary(0, 1, 0.5)["train_mean"]) == (None, None)


def test_the_best_rate_is_taken_and_a_lone_one_is_not_tried() -> None:
    assert best_rate((0.1, 0.3, 0.2), {0.1: 5.0, 0.2: 9.0, 0.3: 7.0}.__getitem__) == 0.2
    assert best_rate((0.1, 0.2), lambda _: 1.0) == 0.2
    assert best_rate((0.1,), {}.__getitem__) == 0.1
