"""The upper bound on training speed."""

from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl.scripts.benchmarks import measure, trainers, training, upper_bound
from srwm_rl.scripts.training.build import make_env
from srwm_rl.storage.safe_file import pack


def test_concurrent_devices_are_as_fast_as_the_slower() -> None:
    assert upper_bound.upper_bound(100.0, 60.0, 20.0, k=2) == pytest.approx(1 / (1 / 100 + 1 / 60 + 2 / 20))
    assert upper_bound.upper_bound(100.0, 60.0, 20.0, k=2, concurrent=True) == pytest.approx(1 / (1 / 60 + 2 / 20))
    assert upper_bound.upper_bound(5.0, 60.0, 20.0, k=2, concurrent=True) == 5


def test_timing_the_components_does_not_change_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trainers.TrainBench(env="recall", n_envs=4, n_steps=8, batch_size=16, n_epochs=1)
    model = trainers.make_ours(config)
    monkeypatch.setattr(measure, "SECONDS", 0.05)
    training.timed_training(model)()
    env: Any = model.env

    def state() -> Any:
        assert model._core_state is not None
        tensors = [model._core_state, *model.policy.parameters(), torch.get_rng_state()]
        arrays = [tensor.detach().numpy().copy() for tensor in tensors]
        return pack([env.get_state(), model._last_obs, model.num_timesteps, arrays])

    before = state()
    speeds = upper_bound.make_components(model, make_env(trainers.train_config(config)), config.batch_size)()
    assert list(speeds) == ["E", "A", "L"]
    assert min(speeds.values()) > 0
    (arrays, tree), (arrays_before, tree_before) = state(), before
    assert tree == tree_before
    assert arrays.keys() == arrays_before.keys()
    assert all(np.array_equal(arrays[name], arrays_before[name]) for name in arrays)
