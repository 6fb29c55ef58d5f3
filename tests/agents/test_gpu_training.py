"""Trainers on a GPU: frames, options of the recurrence, captures beside a learner, and memory over many updates."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents.engine import cuda_graphs
from srwm_rl.agents.engine.streams import SWITCH_INTERVAL
from srwm_rl.nn.module_fingerprint import ModuleFingerprint
from tests.agents.probe import AddHooks, small_model
from tests.agents.two_gpu_processes import N_UPDATES, RECAPTURED

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SIMULATED = () if torch.version.cuda is not None else ("tests.simulated_cuda.run", "-m")


def assert_captured(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "CUDA graphs" not in caplog.text  # a warning where they are disabled
    gradient = model.engine._graphed_gradient
    assert gradient._graphs
    assert not gradient.disabled


def test_frames_of_64_x_64_are_learned_in_bfloat16_by_graphs(caplog: pytest.LogCaptureFixture) -> None:
    encoder = {"precision": "bfloat16", "cnn": {"channels": [8, 16]}}
    frames = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    model = small_model("ppo", observation_space=frames, device="cuda", policy_kwargs={"encoder_kwargs": encoder})
    model.learn(96)
    assert_captured(model, caplog)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_retention_and_a_bound_are_captured(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    core = {"hidden_size": 16, "n_layers": 1, "retention": True, "shift_bound": 0.5}
    model = small_model(algo, device="cuda", policy_kwargs={"core_kwargs": core})
    model.learn(128)
    assert_captured(model, caplog)


def test_acting_is_captured_again_beside_a_learner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures: list[bool] = []
    capture = cuda_graphs.capture

    def counted(work: Any, stream: Any, pool: Any = None, draws: bool = True) -> Any:
        captures.append(draws)
        return capture(work, stream, pool, draws)

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    model = small_model("impala", device="cuda", synchronous=False, n_groups=2)
    model.learn(32 * 30, AddHooks((10, 20)))
    assert captures.count(True) == 3 * 2 * 2  # of two groups, for each of the core states that take turns
    assert model._n_updates == 30
    assert_captured(model, caplog)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_memory_does_not_grow_over_a_thousand_updates(algo: str) -> None:
    settings = {"batch_size": 8, "n_epochs": 1} if algo == "ppo" else {}
    model = small_model(algo, device="cuda", n_envs=2, n_steps=4, **settings)
    bytes_after = []
    for n_updates in (100, 900):
        model.learn(8 * n_updates, reset_num_timesteps=False)
        torch.cuda.synchronize()
        bytes_after.append(torch.cuda.memory_allocated())
    assert bytes_after[0] > 0
    assert bytes_after[1] <= bytes_after[0] + 4096


@pytest.mark.parametrize("fails", [False, True])
def test_the_switch_interval_is_short_while_a_learner_runs_beside_the_actors(fails: bool) -> None:
    before, intervals = sys.getswitchinterval(), set()

    def on_step(*_: Any) -> bool:
        intervals.add(sys.getswitchinterval())
        if fails:
            raise KeyError("the callback is gone")
        return True

    for synchronous in (False, True):
        model = small_model("impala", device="cuda", synchronous=synchronous)
        with pytest.raises(KeyError) if fails else nullcontext():
            model.learn(64, on_step)
        assert sys.getswitchinterval() == before
        assert intervals == {before if synchronous else SWITCH_INTERVAL}
        intervals.clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_of_two_processes_captures_acting_anew_while_they_learn(tmp_path: Path) -> None:
    # On simulated CUDA a capture within a collective operation of another thread is an error: it might never end.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, *SIMULATED, "tests.agents.two_gpu_processes", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert "CUDA graphs" not in output  # a warning where they are disabled
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["acting graphs"], second["acting graphs"]) == (2 * (1 + len(RECAPTURED)), 2)
    for process in (first, second):
        assert process["updates"] == N_UPDATES
        assert process["graphs in use"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_core_state_that_is_not_finite_within_a_rollout_is_reset(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(algo, device="cuda", n_groups=2, on_nan="skip", length=100)

    def on_step(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps == 20:
            actors = model.engine._graphed_acting(model.policy)._actors
            for core_state in actors[2].core_states:
                core_state[:, 1] = torch.nan
        return True

    model.learn(64, on_step)
    assert "layer 0, environment 3); that core state is reset" in caplog.text
    assert model.nan_guard.skipped == 1
    assert torch.isfinite(model._core_state).all()
    assert_captured(model, caplog)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_the_network_is_compared_when_a_rollout_begins_not_in_its_steps(
    algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    matches = ModuleFingerprint.matches

    def noting(fingerprint: ModuleFingerprint) -> bool:
        compared.append("a comparison")
        return matches(fingerprint)

    model = small_model(algo, device="cuda", n_groups=2)
    monkeypatch.setattr(ModuleFingerprint, "matches", noting)
    collect = model._collect

    def collect_noted(*args: Any) -> bool:
        compared.append("the steps begin")
        result: bool = collect(*args)
        compared.append("the steps end")
        return result

    model._collect = collect_noted
    model.learn(3 * 32)
    for i in np.flatnonzero([name == "the steps begin" for name in compared]):
        assert compared[i + 1] == "the steps end"
    assert compared.count("a comparison") > 2 * 2  # groups and rollouts
