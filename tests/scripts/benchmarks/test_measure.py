"""Measurements in alternation."""

from typing import Any

from srwm_rl.scripts.benchmarks import measure


def test_sides_alternate_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        return lambda: order.append(name) or 10

    rates = measure.alternate({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    relative = measure.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 4.0])
    assert relative == (2.0, 2.0, 3.0)
