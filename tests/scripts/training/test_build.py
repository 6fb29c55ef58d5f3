"""Build a trainer from settings: its threads and the groups of its environments."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.agents.frames_at_once import FRAMES_AT_ONCE
from srwm_rl.nn.cnns import MIN_FRAMES_PER_THREAD
from srwm_rl.ops import cpu
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import groups_of_new_run, make_env, use_threads

FRAMES = spaces.Box(0, 255, (64, 64, 3), np.uint8)
VECTORS = spaces.Box(-1, 1, (3,), np.float32)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    cpu.set_threads(None)  # as in a new process
    yield
    torch.set_num_threads(threads)
    cpu.set_threads(None)


@pytest.mark.parametrize(
    ("n_threads", "space", "expected"),
    [
        (None, FRAMES, 3),
        (None, spaces.Dict({"observation": FRAMES, "previous_reward": VECTORS}), 3),
        (None, VECTORS, 1),
        (None, spaces.Dict({"observation": VECTORS, "episode_step": VECTORS}), 1),
        (None, spaces.Discrete(4), 1),
        (2, FRAMES, 2),
        (2, VECTORS, 2),
    ],
)
def test_threads(n_threads: int | None, space: spaces.Space[object], expected: int) -> None:
    use_threads(n_threads, space)
    assert torch.get_num_threads() == expected
    assert cpu.n_threads() == (n_threads or 3)  # the C kernels use all cores even then


def test_overlapping_acting_and_learning_halve_torchs_threads_for_small_batches() -> None:
    few, many = 3 * MIN_FRAMES_PER_THREAD - 1, 3 * MIN_FRAMES_PER_THREAD  # environments
    cases = [(FRAMES, few, 1), (FRAMES, many, 3), (VECTORS, few, 1), (VECTORS, many, 1), (FRAMES, 0, 3)]
    for space, overlapping, expected in cases:
        use_threads(None, space, overlapping)
        assert torch.get_num_threads() == expected
        assert cpu.n_threads() == 3
    use_threads(2, FRAMES, overlapping=few)
    assert torch.get_num_threads() == 2, "not what was n_threads for"
    cpu.set_threads(
        FRAMES_AT_ONCE["cpu"] // MIN_FRAMES_PER_THREAD + 1
    )  # too few rows per minibatch for so many threads
    torch.set_num_threads(cpu.n_threads())
    use_threads(None, FRAMES, overlapping=10**6)
    assert torch.get_num_threads() == cpu.n_threads() // 2


def test_torch_has_one_thread_beside_a_gpu() -> None:
    use_threads(None, FRAMES, on_gpu=True)
    assert torch.get_num_threads() == 1
    assert cpu.n_threads() == 3
    use_threads(2, FRAMES, on_gpu=True)
    assert torch.get_num_threads() == 2, "not what was n_threads for"


def group_sizes(**settings: Any) -> list[int]:
    small = {"env": "recall", "n_envs": 6, "normalize_reward": False, "device": "cpu"}
    env = make_env(TrainConfig(**{**small, **settings}))
    levels = env.reset() and [level for group in env.env_method("level_seed") for level in group]
    assert len(set(map(int, levels))) == env.num_envs, "groups share levels"
    return [group.num_envs for group in getattr(env, "groups", [env])]


@pytest.mark.parametrize(
    ("algo", "n_groups", "sizes"),
    [
        ("ppo", None, [6]),
        ("ppo", 1, [6]),
        ("ppo", 2, [3, 3]),
        ("ppo", 3, [2, 2, 2]),
        ("impala", None, [3, 3]),
        ("impala", 1, [6]),
        ("impala", 3, [2, 2, 2]),
    ],
)
def test_groups(algo: str, n_groups: int | None, sizes: list[int]) -> None:
    assert group_sizes(algo=algo, n_groups=n_groups, levels="all") == sizes


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_groups_that_do_not_divide(algo: str) -> None:
    assert group_sizes(algo=algo, n_envs=5, levels="all") == [5]
    with pytest.raises(UserError, match="--n-envs 5 cannot be divided evenly into 2 groups; use a multiple of 2"):
        group_sizes(algo=algo, n_envs=5, n_groups=2)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"device": "cpu"}, 1),
        ({"device": "cpu", "algo": "impala"}, 1),
        ({"device": "cuda"}, 2),
        ({"device": "cuda:1"}, 2),
        ({"device": "cuda", "n_envs": 5}, 1),
        ({"device": "cuda", "env": "coinrun,maze"}, 1),  # three environments of each game
        ({"device": "cuda", "env": "coinrun,maze", "n_envs": 8}, 2),
        ({"device": "cuda", "n_groups": 1}, 1),
        ({"device": "cpu", "n_groups": 3}, 3),
        ({"device": "cuda", "algo": "impala"}, 2),
    ],
)
def test_a_new_run_has_two_groups_on_a_gpu(
    settings: dict[str, Any], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srwm_rl.scripts.training.build.get_device", torch.device)
    config = TrainConfig(**{"env": "recall", "n_envs": 6, "normalize_reward": False, **settings})
    assert groups_of_new_run(config) == kept
