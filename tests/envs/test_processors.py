"""Processors are counted by affinity and shared among a machine's processes; ProcGen's threads follow."""

import os

import pytest

from srwm_rl.envs.processors import share_of_processors, usable_processors
from srwm_rl.envs.procgen.batch import ProcgenBatch


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_affinity_counts_not_the_machines_processors() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_processors() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_processors() == len(before)


@pytest.mark.parametrize(
    ("processors", "local_world_size", "share"), [(16, None, 16), (16, "4", 4), (7, "2", 3), (2, "8", 1), (4, "", 4)]
)
def test_processes_of_a_machine_share_its_processors(
    processors: int, local_world_size: str | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    environment = {} if local_world_size is None else {"LOCAL_WORLD_SIZE": local_world_size}
    assert share_of_processors(environment) == share


@pytest.mark.parametrize(("n_envs", "processes", "n_threads"), [(64, 1, 8), (64, 4, 4), (3, 1, 3), (1, 1, 0)])
def test_threads_of_procgen(n_envs: int, processes: int, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    env = ProcgenBatch("coinrun", n_envs)
    assert env.n_threads == n_threads
    env.close()
