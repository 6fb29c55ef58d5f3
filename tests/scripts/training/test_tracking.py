"""What TensorBoard shows of a run's settings, and `--track wandb` in wandb's offline mode."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from srwm_rl.storage.run_folder import TENSORBOARD, Run
from tests.scripts.conftest import RECALL, Call

LENGTH = ("-n", "256", "--verbose", "0")


def train(call: Call, *options: str) -> Path:
    assert call("train", *RECALL, *LENGTH, "-f", "logs", *options).code == 0
    (run,) = Path("logs").glob("*/*")
    return run


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")


def hparams(run: Path) -> tuple[dict[str, Any], list[str], EventAccumulator]:
    """Return the settings and the names of the metrics on TensorBoard's page HPARAMS, and the scalars."""
    events = EventAccumulator(str(run / TENSORBOARD)).Reload()
    contents = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
    }
    values = contents["_hparams_/session_start_info"].session_start_info.hparams
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    infos = contents["_hparams_/experiment"].experiment.metric_infos
    return settings, [metric.name.tag for metric in infos], events


def test_tensorboard_has_the_settings_beside_the_returns(call: Call) -> None:
    settings, metrics, events = hparams(train(call, "--eval-freq", "64", "--eval-episodes", "4"))
    assert (settings["env"], settings["n_envs"], settings["core_kwargs"]) == (
        "recall",
        4,
        "hidden_size:16 n_layers:1 n_heads:2 key_init:2 edit_lr_multiplier:3",
    )
    assert settings["normalize_reward"] == 1
    assert "vtrace_lambda" not in settings, "it is of another trainer"
    assert metrics == ["rollout/ep_rew_mean", "eval_train/mean_reward", "eval_test/mean_reward"]
    for metric in metrics:
        assert events.Scalars(metric), metric


def test_a_resumed_run_has_its_settings_there_too(call: Call) -> None:
    run = train(call)
    first = hparams(run)[0]
    for file in (run / TENSORBOARD).iterdir():
        file.unlink()
    assert call("train", "--resume", run, "-n", "512").code == 0
    assert hparams(run)[0] == first | {"n_timesteps": 512}


def test_without_wandb_one_line_says_how_to_install_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = call("train", *RECALL, "--track", "wandb").error()
    assert "pip install 'srwm-rl[wandb]'" in error
    assert not Path("logs").exists()
    train(call)


def records(run: Path, kind: str) -> list[Any]:
    """Return the records of a kind in what wandb stored of a run, oldest first; its process may still write them."""
    end = time.monotonic() + 600  # a hang, not a loaded machine
    while True:
        files = [list(_read(file)) for file in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
        if files and all(content and content[-1].WhichOneof("record_type") == "exit" for content in files):
            return [getattr(of, kind) for content in files for of in content if of.WhichOneof("record_type") == kind]
        assert time.monotonic() < end, files
        time.sleep(0.1)


def _read(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    with suppress(AssertionError, OSError):  # a part of a record is not written yet
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            yield Record.FromString(bytes(data))


def steps(run: Path) -> list[int]:
    rows = [{item.nested_key[0]: item.value_json for item in row.item} for row in records(run, "history")]
    assert all("rollout/ep_len_mean" in row for row in rows)
    return [int(row["_step"]) for row in rows]


def test_a_run_is_logged_with_its_settings_and_resumed_as_the_same(call: Call) -> None:
    pytest.importorskip("wandb")
    run = train(call, "--track", "wandb")
    (before,) = records(run, "run")
    assert steps(run) == [64, 128, 192, 256]
    assert (before.project, before.display_name, before.run_group) == ("srwm-rl", "ppo_srwm/recall_1", "")
    settings = {item.key: item.value_json for item in before.config.update}
    assert (settings["env"], settings["n_envs"]) == ('"recall"', "4")
    time.sleep(1)  # wandb names its folders by the second
    assert call("train", "--resume", run, "-n", "512").code == 0
    assert steps(run) == [64, 128, 192, 256, 320, 384, 448, 512]
    assert {record.run_id for record in records(run, "run")} == {before.run_id}
    assert Run.open(run).config["wandb_id"] == before.run_id
    assert call("train", "--resume", run, "-n", "768", "--track", "none").code == 0
    assert len(steps(run)) == 8


def test_seeds_are_a_group(call: Call) -> None:
    pytest.importorskip("wandb")
    assert call("train", *RECALL, *LENGTH, "-f", "logs", "--seeds", "0:2", "--jobs", "2", "--track", "wandb").code == 0
    runs = [records(Path(f"logs/ppo_srwm/recall_1/seed_{seed}"), "run")[0] for seed in (0, 1)]
    assert {run.run_group for run in runs} == {"ppo_srwm/recall_1"}
    assert [run.display_name for run in runs] == [f"ppo_srwm/recall_1-seed_{seed}" for seed in (0, 1)]
    assert runs[0].run_id != runs[1].run_id


def test_without_a_login_one_line_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("wandb")  # it reads its environment variables once in a process
    environment = {**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "srwm_rl", "train", *RECALL, *LENGTH, "-f", "logs", "--track", "wandb"]
    result = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "wandb login" in result.stderr.splitlines()[-1]
    assert "WANDB_MODE=offline" in result.stderr.splitlines()[-1]
    assert not list(Path("logs").glob("*/*")), "nothing was learned"


def test_nothing_is_logged_there_unless_asked_for(call: Call) -> None:
    pytest.importorskip("wandb")
    loaded = set(sys.modules)
    run = train(call)
    assert not (run / "wandb").exists()
    assert "wandb" not in set(sys.modules) - loaded
