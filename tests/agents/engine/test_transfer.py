"""Between host and device: the same numbers, in their own memory on a CPU, and one wait for all on a GPU."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.agents import PPO
from srwm_rl.agents.engine import nan_guard as user
from srwm_rl.agents.engine.transfer import to_device, to_host
from tests.agents.probe import Probe

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 8, 8, 3), (0, 3)])
def test_there_and_back_nothing_changes(shape: tuple[int, ...], dtype: type, device: torch.device) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    there = to_device(array, device)
    assert there.device.type == device.type
    back, other = to_host(there, torch.ones(3, 2, device=device).t())
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(other, np.ones((2, 3)))


def test_on_a_cpu_all_is_the_same_memory() -> None:
    array = np.zeros(3, np.float32)
    tensor = to_device(array, torch.device("cpu"))
    (back,) = to_host(tensor)
    tensor[0] = 1
    back[1] = 2
    assert array.tolist() == [1, 2, 0]


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}}
    env = DummyVecEnv([Probe] * 4)
    model = PPO("SRWMPolicy", env, n_steps=8, batch_size=16, seed=0, device="cuda", policy_kwargs=kwargs)
    model.learn(4 * 8)  # graphs are captured by now
    waits: list[int] = []

    def counted(*tensors: torch.Tensor) -> list[np.ndarray]:
        torch.cuda.set_sync_debug_mode("default")
        found = to_host(*tensors)
        torch.cuda.set_sync_debug_mode("error")  # anything else that waits raises
        waits.append(len(tensors))
        return found

    monkeypatch.setattr(user, "to_host", counted)
    model.policy.set_training_mode(False)
    play = model._collect

    def watched(*given: object) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return play(*given)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(model, "_collect", watched)
    model.learn(4 * 8, reset_num_timesteps=False)
    assert waits == [3] * 9  # eight steps and the values of what the last one led to
