"""Measurements in alternation."""

from typing import Any

from srwm_rl.scripts.benchmarks import measure


def test_sides_alternate_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        return lambda: order.append(name) or {"steps": len(order)}

    rates = measure.alternate({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 4
    assert rates == {"a": {"steps": [3, 5, 7]}, "b": {"steps": [4, 6, 8]}}
    relative = measure.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 4.0])
    assert relative == measure.Rate(2.0, 2.0, 3.0)
    assert f"{relative:.1f}" == "2.0 [2.0, 3.0]"


def test_parts_run_in_turn_for_a_while_and_each_has_its_own_speed() -> None:
    now, order = [0.0], []

    def work(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    parts = {"collect": work("collect", 0.5), "learn": work("learn", 2.0)}
    assert measure.speeds(parts, 10, lambda: now[0], 7.0) == {"collect": 20.0, "learn": 5.0}
    assert order == ["collect", "learn"] * 3
    order.clear()
    assert measure.speeds(parts, 10, lambda: now[0]) == {"collect": 20.0, "learn": 5.0}
    assert order == ["collect", "learn"]
