"""Copies between host and device: unchanged numbers, shared memory on a CPU, one synchronization on a GPU."""

import numpy as np
import pytest
import torch

from srwm_rl.agents.engine import nan_guard
from srwm_rl.agents.engine.transfer import to_device, to_host
from tests.agents.probe import small_model

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 8, 8, 3), (0, 3)])
def test_arrays_are_unchanged_by_a_round_trip(shape: tuple[int, ...], dtype: type, device: torch.device) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = to_device(array, device)
    assert tensor.device.type == device.type
    returned, transposed = to_host(tensor, torch.ones(3, 2, device=device).t())
    assert returned.dtype == array.dtype
    np.testing.assert_array_equal(returned, array)
    np.testing.assert_array_equal(transposed, np.ones((2, 3)))


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.zeros(3, np.float32)
    tensor = to_device(array, torch.device("cpu"))
    (returned,) = to_host(tensor)
    tensor[0] = 1
    returned[1] = 2
    assert array.tolist() == [1, 2, 0]


@pytest.mark.gpu
def test_collecting_waits_for_the_gpu_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("ppo", n_layers=2, batch_size=16, device="cuda")
    model.learn(4 * 8)  # graphs are captured by now
    waits: list[int] = []

    def counting_to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
        torch.cuda.set_sync_debug_mode("default")
        arrays = to_host(*tensors)
        torch.cuda.set_sync_debug_mode("error")  # anything else that waits raises
        waits.append(len(tensors))
        return arrays

    monkeypatch.setattr(nan_guard, "to_host", counting_to_host)
    model.policy.set_training_mode(False)
    collect = model._collect

    def collect_without_other_waits(*args: object) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return collect(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(model, "_collect", collect_without_other_waits)
    model.learn(4 * 8, reset_num_timesteps=False)
    assert waits == [3] * 9  # eight steps, and the bootstrap values
