"""Curves read from a run's metrics file."""

import json
from pathlib import Path

import numpy as np
import pytest

from srwm_rl.agents.evaluation.statistics import t_interval
from srwm_rl.errors import UserError
from srwm_rl.scripts.reports.curves import N_POINTS, Curve, combine, read_curves, thin


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_values_come_back_by_key(tmp_path: Path) -> None:
    rows = [{"step": 10, "a": 1.0}, {"step": 30, "a": None, "b": 5}, {"step": 20, "a": 2.5}]
    curves = read_curves(write(tmp_path / "metrics.jsonl", rows))
    assert curves.keys() == {"a", "b"}
    assert curves["a"].steps.tolist() == [10, 20]
    assert curves["a"].values.tolist() == [1.0, 2.5]
    assert curves["b"].steps.tolist() == [30]


def test_a_run_without_a_file_has_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.jsonl") == {}


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "a": 1.0}])
    path.write_text(path.read_text() + '{"step": 2, "a"')
    assert read_curves(path)["a"].steps.tolist() == [1]


@pytest.mark.parametrize("line", ["{", "[]", '{"a": 1}', '{"step": "x"}', '{"step": null}'])
def test_a_damaged_file_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"damaged in line 2"):
        read_curves(path)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": null, "b": "x", "c": 1e200, "d": 2}\n{"step": 1e999, "d": 3}\n')
    assert {key: curve.values.tolist() for key, curve in read_curves(path).items()} == {"d": [2.0]}


def test_thinning_keeps_the_mean_and_the_end() -> None:
    steps = np.arange(10_000, dtype=np.float64)
    thinned = thin(Curve(steps, np.sin(steps / 500)))
    assert len(thinned.steps) == N_POINTS
    assert np.abs(thinned.values - np.sin(thinned.steps / 500)).max() < 0.02
    assert thinned.steps[-1] == 9999


def test_seeds_are_averaged_up_to_the_shortest_run() -> None:
    steps = np.linspace(0, 100, 50)
    band = combine([Curve(steps, steps), Curve(steps + 10, 3 * (steps + 10)), Curve(steps[:40], 2 * steps[:40])])
    assert band.mean.steps[0] == 10
    assert band.mean.steps[-1] == pytest.approx(steps[39])
    assert band.mean.values == pytest.approx(2 * band.mean.steps)
    assert len(band.seeds) == 3
    for at in (0, 70, N_POINTS - 1):
        interval = t_interval(np.array([1.0, 2.0, 3.0]) * band.mean.steps[at])
        assert (band.mean.values[at], band.low[at], band.high[at]) == pytest.approx(interval)


def test_another_statistic_has_a_bootstrap_interval_within_the_seeds() -> None:
    steps = np.linspace(1, 100, 50)
    band = combine([Curve(steps, steps), Curve(steps, 9 * steps), Curve(steps, 2 * steps)], statistic=np.median)
    assert band.mean.values == pytest.approx(2 * band.mean.steps)
    assert band.low == pytest.approx(band.mean.steps)
    assert band.high == pytest.approx(9 * band.mean.steps)


def test_one_seed_has_no_interval() -> None:
    band = combine([Curve(np.arange(5.0), np.arange(5.0) ** 2)])
    assert band.seeds == []
    assert (band.low == band.mean.values).all()
