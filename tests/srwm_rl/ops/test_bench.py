"""The bench's baseline is right, and a wrong backend gets no speed."""

from importlib import import_module

import pytest
import torch

from srwm_rl.ops import bench
from srwm_rl.scripts.main import main


def test_the_loop_is_the_same_recurrence() -> None:
    inputs = bench._inputs((5, 2, 2, 4), "cpu")
    for ours, theirs in zip(bench.step_loop(*inputs), bench.srwm_scan(*inputs, backend="reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loop_is_the_same_delta_rule() -> None:
    inputs = bench._delta_inputs((5, 2, 2, 4), "cpu")
    for ours, theirs in zip(bench.delta_loop(*inputs), bench.delta_scan(*inputs, backend="reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_wrong_backend_gets_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scan = bench.srwm_scan

    def broken(*args: object, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, final = scan(*args, backend="reference")
        return (y * 1.01 if backend == "cpu" else y), final

    monkeypatch.setattr(bench, "srwm_scan", broken)
    monkeypatch.setattr(bench, "SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(bench, "DELTA_SIZES", ((3, 2, 1, 4),))
    monkeypatch.setattr(bench, "ACTING", ())
    script = import_module("srwm_rl.scripts.benchmarks.operators")
    monkeypatch.setattr(script, "_backends", lambda device: ("cpu",))
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "op", "--rounds", "1"]) == 1
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("wrong results") == 2
    assert main(["bench", "nothing"]) == 2
