"""The operators' baselines equal the reference; a wrong backend is not timed."""

import json
from pathlib import Path

import pytest
import torch

from srwm_rl.scripts.benchmarks import operators
from srwm_rl.scripts.main import main


def test_the_loop_is_the_same_recurrence() -> None:
    inputs = operators.make_inputs("srwm_scan", (5, 2, 2, 4), "cpu")
    for ours, theirs in zip(
        operators.step_loop(*inputs), operators.srwm_scan(*inputs, backend="reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_loop_is_the_same_delta_rule() -> None:
    inputs = operators.make_inputs("delta_scan", (5, 2, 2, 4), "cpu")
    for ours, theirs in zip(
        operators.delta_loop(*inputs), operators.delta_scan(*inputs, backend="reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_backend_gets_no_speed(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scan = operators.srwm_scan

    def broken(*args: object, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, final = scan(*args, backend="reference")
        return (y, final * factor if backend == "cpu" else final)

    monkeypatch.setattr(operators, "srwm_scan", broken)
    monkeypatch.setattr(operators, "SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(operators, "DELTA_SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(operators, "ACTING", ())
    monkeypatch.setattr(operators, "choose", lambda *_, **__: "cpu")
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "op", "--rounds", "1", "--json", str(tmp_path / "bench.json")]) == 1
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("wrong results") == 2
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["ns"] is None for row in rows[:6]] == [False, False, True] * 2
    assert main(["bench", "nothing"]) == 2
