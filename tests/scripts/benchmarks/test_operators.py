"""The operators' baselines equal the reference; a wrong backend is not timed."""

import pytest
import torch

from srwm_rl.scripts.benchmarks import operators
from srwm_rl.scripts.main import main


def test_the_loop_is_the_same_recurrence() -> None:
    inputs = operators.srwm_inputs((5, 2, 2, 4), "cpu")
    for ours, theirs in zip(
        operators.step_loop(*inputs), operators.srwm_scan(*inputs, backend="reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_loop_is_the_same_delta_rule() -> None:
    inputs = operators.delta_inputs((5, 2, 2, 4), "cpu")
    for ours, theirs in zip(
        operators.delta_loop(*inputs), operators.delta_scan(*inputs, backend="reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_wrong_backend_gets_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scan = operators.srwm_scan

    def broken(*args: object, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, final = scan(*args, backend="reference")
        return (y * 1.01 if backend == "cpu" else y), final

    monkeypatch.setattr(operators, "srwm_scan", broken)
    monkeypatch.setattr(operators, "SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(operators, "DELTA_SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(operators, "ACTING", ())
    monkeypatch.setattr(operators, "_backends", lambda device: ("cpu",))
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "op", "--rounds", "1"]) == 1
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("wrong results") == 2
    assert main(["bench", "nothing"]) == 2
