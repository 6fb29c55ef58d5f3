"""Model files: what is saved acts the same after loading, and what does not fit is named."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import srwm_rl
from srwm_rl import SRWMPolicy, UserError, load
from srwm_rl.nn.cores import _CORES
from srwm_rl.nn.encoders import MAIN_KEY
from srwm_rl.storage.model_file import load_policy_arrays, policy_arrays, save_model
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file

SPACE = spaces.Dict(
    observation=spaces.Box(0, 255, (16, 16, 3), np.uint8), previous_reward=spaces.Box(-1, 1, (1,), np.float32)
)


def policy(core: str = "srwm", hidden_size: int = 16, **settings: Any) -> SRWMPolicy:
    torch.manual_seed(0)
    core_kwargs = {"hidden_size": hidden_size, **settings}
    kwargs = {"core": core, "core_kwargs": core_kwargs, "encoder_kwargs": {"cnn": {"channels": [4]}}}
    return SRWMPolicy(SPACE, spaces.Discrete(3), lambda _: 1e-3, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, policy(), {"env": "coinrun"}, 123)
    return path


@pytest.mark.parametrize("core", [*srwm_rl.core_names(), "srwm behind a convolution"])
def test_a_loaded_agent_acts_as_the_saved_one(core: str, tmp_path: Path) -> None:
    name, *conv = core.split(" behind ")
    original = policy(name, **({"short_conv": 4} if conv else {}))
    save_model(tmp_path / "m", original, {"env": "coinrun"}, 123)
    agent = load(tmp_path / "m")
    assert (agent.num_timesteps, agent.config) == (123, {"env": "coinrun"})
    obs = {key: np.stack([subspace.sample() for _ in range(4)]) for key, subspace in SPACE.spaces.items()}
    state: Any = None
    their_state: Any = None
    for _ in range(3):
        mine, state = original.predict(obs, state, deterministic=True)
        theirs, their_state = agent.predict(obs, their_state, deterministic=True)
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(state[0], their_state[0])


@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["patch", "conv4"])
def test_bfloat16_is_not_emulated(kind: str, fastest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    cnn = {"kind": kind, "channels": [8, 8, 8]}
    original = SRWMPolicy(
        frames,
        spaces.Discrete(3),
        lambda _: 1e-3,
        core_kwargs={"hidden_size": 8},
        encoder_kwargs={"precision": "bfloat16", "cnn": cnn},
    )
    original.set_training_mode(False)  # batch normalisation
    save_model(tmp_path / "m", original, {}, 0)
    monkeypatch.setattr("srwm_rl.nn.encoders.fastest_precision", lambda device: fastest)
    policy = load(tmp_path / "m").policy
    assert [network.precision for network in policy.features_extractor.images.values()] == [fastest]
    assert policy.settings() == original.settings()  # as it is saved again, and trained on
    obs = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with torch.no_grad():
        ours, theirs = (each.features_extractor({MAIN_KEY: torch.from_numpy(obs)}) for each in (policy, original))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert torch.equal(ours, theirs) == (fastest == "bfloat16")


@pytest.mark.parametrize("core", ["srwm", "sr_delta"])
def test_frozen_columns_are_saved(core: str, tmp_path: Path) -> None:
    original = policy(core, frozen="query,beta", query_init=1.0)
    save_model(tmp_path / "m", original, {}, 0)
    torch.manual_seed(1)
    loaded = load(tmp_path / "m").policy
    for mine, theirs in zip(original.core.layers, loaded.core.layers, strict=True):  # type: ignore[arg-type]
        assert torch.equal(mine.slow_weight(), theirs.slow_weight())


def test_a_model_without_its_frozen_columns_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = policy(frozen="key")
    arrays = policy_arrays(original)
    for name in ("core.layers.0.frozen_weight", "core.layers.1.frozen_weight"):  # as earlier versions wrote it
        del arrays[name]
    save_model(tmp_path / "m", original, {}, 0, arrays)
    loaded = load(tmp_path / "m").policy
    assert torch.equal(original.core.layers[1].weight, loaded.core.layers[1].weight)  # type: ignore[index,union-attr]
    assert "did not save core.layers.0.frozen_weight, core.layers.1.frozen_weight" in caplog.text


def test_buffers_of_a_users_core_are_saved(tmp_path: Path) -> None:
    class Counting(srwm_rl.Core):
        def __init__(self, input_size: int) -> None:
            super().__init__(input_size, input_size, 1, 1)
            self.register_buffer("scale", torch.rand(input_size))
            self.register_buffer("count", torch.randint(1000, ()))
            self.register_buffer("scratch", torch.rand(2), persistent=False)
            self.gain = torch.nn.Parameter(torch.rand(()))

        def forward(self, x: Any, state: Any, episode_starts: Any) -> Any:
            return x * self.scale * self.gain, state

    try:
        srwm_rl.register_core("counting")(Counting)
        original = SRWMPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3, core="counting")
        save_model(tmp_path / "m", original, {}, 0)
        loaded = load(tmp_path / "m").policy
        for name, value in original.core.state_dict().items():
            restored = loaded.core.state_dict()[name]
            assert restored.dtype == value.dtype
            assert torch.equal(restored, value)
        assert not [name for name in policy_arrays(original) if "scratch" in name]
    finally:
        _CORES.pop("counting", None)


def test_aliases_of_the_encoder_are_saved_once() -> None:
    names = policy_arrays(policy())
    assert not [name for name in names if name.startswith(("pi_", "vf_"))]


def test_saved_arrays_do_not_share_memory_with_the_policy() -> None:
    original = policy()
    arrays = policy_arrays(original)
    before = {name: array.copy() for name, array in arrays.items()}
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(1)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: a.pop("value_net.bias"), "lacks weight 'value_net.bias'"),
        (lambda a, m: a.update(extra=np.zeros(1, np.float32)), "surplus weight 'extra'"),
        (lambda a, m: a.update({"value_net.bias": np.zeros(2, np.float32)}), "weight 'value_net.bias' is float32"),
        (lambda a, m: a.update({"value_net.bias": np.zeros(1, np.float64)}), "weight 'value_net.bias' is float64"),
        (lambda a, m: a.update({"value_net.bias": np.array([np.nan], np.float32)}), "not finite"),
        (lambda a, m: m["policy"].update(core="lstm"), "another architecture"),
        (lambda a, m: m["policy"].update(core="os.system"), "unknown core 'os.system'"),
        (lambda a, m: m.update(format=99), "upgrade srwm-rl"),
        (lambda a, m: m.update(kind="checkpoint"), "is a checkpoint file, not a model"),
    ],
)
def test_a_mismatch_is_named(saved: Path, change: Any, message: str) -> None:
    arrays, meta = read_file(saved)
    change(arrays, meta)
    write_file(saved, arrays, meta)
    with pytest.raises(UserError, match=message) as error:
        load(saved)
    assert "\n" not in str(error.value)


def test_a_refused_load_changes_nothing() -> None:
    target = policy()
    before = policy_arrays(target)
    arrays = policy_arrays(policy())
    arrays["core.project.weight"] += 1
    arrays["value_net.bias"] = np.array([np.inf], np.float32)
    with pytest.raises(UserError, match="not finite"):
        load_policy_arrays(target, arrays, "file")
    for name, array in policy_arrays(target).items():
        np.testing.assert_array_equal(array, before[name])


def test_load_takes_the_newest_model_of_a_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "recall", {"train": {}})
    for steps in (5, 200):
        save_model(run.file("model", steps), policy(), {}, steps)
    assert load(run.path).num_timesteps == 200


def test_runs_are_numbered_and_never_reused(tmp_path: Path) -> None:
    paths = [Run.create(tmp_path / "x" / "recall", {"train": {"n": i}}).path.name for i in range(3)]
    assert paths == ["recall_1", "recall_2", "recall_3"]
    assert Run.open(tmp_path / "x" / "recall_2").config == {"train": {"n": 1}}


def test_old_files_and_litter_are_swept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "recall", {"train": {}})
    for steps in range(5):
        for kind in ("model", "checkpoint"):
            run.file(kind, steps).touch()
    (run.path / "checkpoints" / ".tmp-123-model-7.safetensors").touch()
    run.sweep()
    left = sorted(file.name for file in (run.path / "checkpoints").iterdir())
    assert left == [f"{kind}-{steps:012d}.safetensors" for kind in ("checkpoint", "model") for steps in (2, 3, 4)]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "{"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="srwm-rl train"):
        Run.open(tmp_path)


def test_a_run_without_models_is_refused_with_advice(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "recall", {"train": {}})
    with pytest.raises(UserError, match=r"has no model.*start a new run"):
        load(run.path)


def test_a_damaged_newest_model_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.create(tmp_path / "recall", {"train": {}})
    for steps in (5, 200):
        save_model(run.file("model", steps), policy(), {}, steps)
    newest = run.file("model", 200)
    newest.write_bytes(newest.read_bytes()[:-9])
    assert load(run.path).num_timesteps == 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(newest) in caplog.text


LOCKER = """
import sys, time
import os
import subprocess
import sys
from pathlib import Path
from srwm_rl.storage.run_folder import Run
with Run.open(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_locked_run_is_refused_and_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "recall", {"train": {}})
    with subprocess.Popen([sys.executable, "-c", LOCKER, str(run.path)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(UserError, match=f"trained by process {first.pid};"), run.lock():
            pass
        first.kill()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())
