"""A model file's description is checked against its weights before anything is built from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import Core, SRWMPolicy, UserError, core_names, load, register_core
from srwm_rl.storage.model_file import save_model
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file

BILLION = 10**9
SPACE = spaces.Dict(observation=spaces.Box(0, 1, (5,), np.float32), episode_step=spaces.Box(0, 9, (1,), np.float32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    policy = SRWMPolicy(SPACE, spaces.Discrete(3), lambda _: 0.0, core_kwargs={"hidden_size": 8, "n_layers": 1})
    save_model(tmp_path / "model", policy, {}, 1)
    return tmp_path / "model"


def refused(path: Path, change: Any, monkeypatch: pytest.MonkeyPatch | None = None) -> str:
    arrays, meta = read_file(path)
    change(meta)
    write_file(path, arrays, meta)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_shift_bound_is_not_a_size_and_may_be_absent(saved: Path, tmp_path: Path) -> None:
    assert load(saved).policy.core.layers[0].shift_bound is None
    settings = {"hidden_size": 8, "n_layers": 1, "shift_bound": 10**6}  # more than the file's weights
    policy = SRWMPolicy(SPACE, spaces.Discrete(3), lambda _: 0.0, core_kwargs=settings)
    save_model(tmp_path / "bounded", policy, {}, 1)
    assert load(tmp_path / "bounded").policy.core.layers[0].shift_bound == 10**6


@pytest.mark.parametrize("core", core_names())
@pytest.mark.parametrize("setting", ["hidden_size", "n_layers", "n_heads", "ff_size"])
def test_absurd_sizes_are_refused_at_once(core: str, setting: str, saved: Path) -> None:
    refused(saved, lambda m: m["policy"].update(core=core, core_kwargs={setting: BILLION}))


@pytest.mark.parametrize("cnn", [{"channels": [BILLION]}, {"features": BILLION}, {"channels": [1] * 10**5}])
def test_absurd_sizes_of_a_cnn_are_refused_at_once(cnn: dict[str, Any], tmp_path: Path) -> None:
    image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    small = {"cnn": {"channels": [1], "features": 1}}
    save_model(tmp_path / "model", SRWMPolicy(image, spaces.Discrete(3), lambda _: 0.0, encoder_kwargs=small), {}, 1)
    message = refused(tmp_path / "model", lambda m: m["policy"]["encoder_kwargs"].update(cnn=cnn))
    assert "a much larger network than it has weights for" in message


@pytest.mark.parametrize("core", ["lstm", "gru", "srwm", "sr_delta", "delta", "feedforward", "fake_sr"])
def test_a_width_whose_square_exceeds_the_weights_is_refused_before_allocation(core: str, saved: Path) -> None:
    n_weights = sum(array.size for array in read_file(saved)[0].values())
    width = 8 * (n_weights // 8)  # no more than the file's weights, but its square is 16 million
    allocated = []
    empty = torch.empty

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is empty and result.device.type == "cpu":
                allocated.append(result.numel())
            return result

    with Watch():
        message = refused(saved, lambda m: m["policy"].update(core=core, core_kwargs={"hidden_size": width}))
    assert "a much larger network than it has weights for" in message
    assert sum(allocated) < 2 * n_weights + 2**22


def test_settings_of_a_users_core_other_than_sizes_are_not_checked(tmp_path: Path) -> None:
    class Patient(Core):
        def __init__(self, input_size: int, longest: int = 1) -> None:
            super().__init__(input_size, 4, 1, 4)
            self.longest, self.net = longest, torch.nn.Linear(input_size, 4)

        def forward(self, x: Any, state: Any, episode_starts: Any) -> Any:
            return self.net(x), state

    name = "tests:Patient"
    register_core(name)(Patient)
    policy = SRWMPolicy(SPACE, spaces.Discrete(3), lambda _: 0.0, core=name, core_kwargs={"longest": BILLION})
    save_model(tmp_path / "model", policy, {}, 1)
    assert load(tmp_path / "model").policy.core.longest == BILLION


def test_a_message_is_one_line_for_any_name() -> None:
    message = str(UserError("core 'a\nb\x1b[2Jc' \x00" + "x" * 5000))
    assert message.isprintable()
    assert len(message) == 2000
    assert "\\n" in message


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Run:
    run = Run.create(tmp_path / "runs" / "recall", {"train": {}})
    for steps in range(6):
        run.file("model", steps).write_bytes(saved.read_bytes())
    return run


@pytest.mark.parametrize("name", ["config.json", ".lock", "metrics.jsonl", "tensorboard", "checkpoints", ".tmp-config"])
def test_a_run_with_a_link_in_it_is_read_and_not_written(name: str, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    if (run.path / name).exists():
        (run.path / name).rename(target)
    else:
        target.write_text("keep me")
    (run.path / name).symlink_to(target)
    before = target.read_bytes() if target.is_file() else sorted(target.iterdir())
    again = Run.open(run.path)
    assert len(again.files("model")) == 6
    with pytest.raises(UserError, match="is a link"), again.lock():
        pass
    assert (target.read_bytes() if target.is_file() else sorted(target.iterdir())) == before


def test_nothing_is_deleted_behind_a_link(run: Run, tmp_path: Path) -> None:
    (run.path / "checkpoints").rename(tmp_path / "theirs")
    (run.path / "checkpoints").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="nothing is deleted there"):
        run.sweep()
    assert len(list((tmp_path / "theirs").iterdir())) == 6


def test_files_with_other_names_are_not_checkpoints(run: Run) -> None:
    for name in ("model-.safetensors", "model-x.safetensors", "model--1.safetensors", "model-\u0663x.safetensors"):
        (run.path / "checkpoints" / name).write_text("x")
    run.file("model", 10**13).write_text("x")
    assert [int(file.stem[6:]) for file in run.files("model")] == [0, 1, 2, 3, 4, 5, 10**13]


def test_settings_must_be_a_regular_file(run: Run) -> None:
    import os

    (run.path / "config.json").unlink()
    os.mkfifo(run.path / "config.json")
    with pytest.raises(UserError, match="is no regular file"):
        Run.open(run.path)
