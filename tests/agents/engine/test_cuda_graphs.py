"""Captured CUDA graphs: what a failed capture restores, and how arguments are copied."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from srwm_rl.agents.engine import cuda_graphs


class Generator:
    """A simulated `torch.Generator` whose state can be replaced."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, generator: "Generator") -> None:
        self.state = generator.state

    def clone_state(self) -> "Generator":
        return Generator("a copy")


@pytest.mark.parametrize(
    ("error", "draws", "state"),
    [(None, True, "first"), (None, False, "first"), (RuntimeError, True, "a copy"), (RuntimeError, False, "first")],
)
def test_a_failed_capture_leaves_the_generator_that_other_graphs_draw_from(
    error: Any, draws: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, ended_pools = Generator("first"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended_pools.append(args), raising=False)

    def capture() -> None:
        with cuda_graphs._restored_after_failure("pool", draws):
            assert generator.state == ("first" if draws else "a copy")
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        capture()
    assert generator.state == state
    assert ended_pools == ([] if error is None else [(0, "pool")])


def test_arguments_are_copied_key_by_key_whatever_the_order_of_a_dict() -> None:
    args = ({"a": torch.ones(2, 1), "b": torch.zeros(2, 3)}, None, 0.5)
    buffers = cuda_graphs.empty_like_args(args, torch.device("cpu"))
    cuda_graphs.copy_into(buffers, ({"b": torch.full((2, 3), 7.0), "a": torch.full((2, 1), 8.0)}, None, 1.5))
    assert buffers[0]["a"].flatten().tolist() == [8.0] * 2
    assert buffers[0]["b"].flatten().tolist() == [7.0] * 6
    assert buffers[1:] == (None, 1.5)
