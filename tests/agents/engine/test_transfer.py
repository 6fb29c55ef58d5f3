"""Copies between host and device: unchanged numbers, shared memory on a CPU, one synchronization on a GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl.agents.engine.transfer import PackedTensors, to_device
from tests.agents.probe import small_model

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 8, 8, 3), (0, 3)])
def test_arrays_are_unchanged_on_a_device(shape: tuple[int, ...], dtype: type, device: torch.device) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = to_device(array, device)
    assert tensor.device.type == device.type
    returned = tensor.cpu().numpy()
    assert returned.dtype == array.dtype
    np.testing.assert_array_equal(returned, array)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_tensors_are_unchanged_by_a_round_trip(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = {"a": torch.uint8, "b": torch.bool, "c": torch.int64, "d": torch.float32, "e": torch.float64}
    shapes: list[tuple[int, ...]] = [(5,), (4, 3, 3), (0, 3), ()]
    examples = {
        name: [torch.randint(2, shape, generator=generator).to(dtype) for shape in shapes]
        for name, dtype in dtypes.items()
    }
    packed = PackedTensors(examples, device)

    def fill(tensors: Any, values: Any) -> None:
        for name in dtypes:
            for tensor, value in zip(tensors[name], values[name], strict=True):
                assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
                tensor.copy_(value)

    fill(packed.on_host, examples)
    packed.to_device()
    assert {tensor.device.type for tensors in packed.on_device.values() for tensor in tensors} == {device.type}
    if device.type == "cuda":
        torch.cuda.synchronize()  # the host may write over what is being copied only after a wait
    changed = {name: [1 - tensor.long() for tensor in tensors] for name, tensors in examples.items()}
    fill(packed.on_host, {name: [x.to(dtypes[name]) for x in tensors] for name, tensors in changed.items()})
    packed.to_host()
    for name, tensors in examples.items():
        for tensor, value in zip(packed.on_host[name], tensors, strict=True):
            assert torch.equal(tensor, value)


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.zeros(3, np.float32)
    to_device(array, torch.device("cpu"))[0] = 1
    assert array.tolist() == [1, 0, 0]


@pytest.mark.gpu
def test_collecting_waits_for_the_gpu_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("ppo", n_layers=2, batch_size=16, device="cuda")
    model.learn(4 * 8)  # graphs are captured by now
    n_waits, to_host = 0, PackedTensors.to_host

    def counting_to_host(packed: PackedTensors) -> None:
        nonlocal n_waits
        torch.cuda.set_sync_debug_mode("default")
        to_host(packed)
        torch.cuda.set_sync_debug_mode("error")  # anything else that waits raises
        n_waits += 1

    monkeypatch.setattr(PackedTensors, "to_host", counting_to_host)
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
    assert n_waits == 9  # eight steps, and the bootstrap values
