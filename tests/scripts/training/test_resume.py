"""`--resume`: which settings may change, the record of changes, and --verify."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.resume import FREE, WITH_OVERRIDE
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file


@pytest.fixture
def copied(recall: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run with three checkpoints."""
    return Path(shutil.copytree(recall, tmp_path / "copied"))


def test_every_setting_that_may_change_exists() -> None:
    assert set(TrainConfig.__dataclass_fields__) >= FREE | WITH_OVERRIDE
    assert not FREE & WITH_OVERRIDE


def test_a_run_is_verified_and_not_changed(call: Any, recall: Path, snapshot: Any) -> None:
    before = snapshot(recall)
    result = call("train", "--resume", recall, "--verify")
    assert result.code == 0, result
    assert "exact: from 192 to 256 steps" in result.out
    assert "bit for bit" in result.out
    after = snapshot(recall)
    before.pop(".lock", None)
    after.pop(".lock", None)
    assert after == before


def test_a_synchronous_impala_run_and_one_with_evaluations_are_verified(
    call: Any, impala_argv: list[str], tmp_path: Path
) -> None:
    argv = [*impala_argv, "--synchronous", "--eval-freq", 64, "--eval-episodes", 4, "--save-freq", 1, "-n", 320]
    assert call("train", *argv, "-f", tmp_path).code == 0
    result = call("train", "--resume", tmp_path / "impala_srwm" / "recall_1", "--verify")
    assert result.code == 0, result
    assert "exact: from 256 to 320 steps" in result.out


def test_the_history_says_since_when_other_versions_train(call: Any, copied: Path) -> None:
    stored = json.loads((copied / "config.json").read_text())
    here = dict(stored["versions"])
    stored["versions"]["python"] = "3.9.1"
    (copied / "config.json").write_text(json.dumps(stored | {"history": [{"at": 64, "changed": {}}, 5]}))
    lengths = [{"at": 256, "changed": {"n_timesteps": [256, 320]}}, {"at": 320, "changed": {"n_timesteps": [320, 384]}}]
    for n, length in ((320, 1), (384, 2)):  # the second time the versions are the same
        assert call("train", "--resume", copied, "-n", n).code == 0
        config = json.loads((copied / "config.json").read_text())
        assert config["versions"]["python"] == "3.9.1"
        first, second, *further = config["history"]
        assert (first, [second, *further[1:]]) == ({"at": 64, "changed": {}}, lengths[:length])
        assert further[0] == {"at": 256, "versions": here}


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_scaled_steps_and_a_short_convolution_are_exact_across_a_resume(
    algo: str, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    argv = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    at = argv.index("n_layers:1")
    for factor, n in ((1.0, 256), (3.0, 256), (3.0, 128)):
        settings = [*argv[:at], f"edit_lr_multiplier:{factor}", "key_init:2.0", "short_conv:3", *argv[at:]]
        assert call("train", *settings, "--save-freq", 1, "-f", tmp_path, "-n", n).code == 0
    plain, whole, resumed = (tmp_path / f"{algo}_srwm" / f"recall_{i}" for i in (1, 2, 3))
    assert call("train", "--resume", resumed, "-n", 256).code == 0
    assert "exact: from 192 to 256 steps" in call("train", "--resume", resumed, "--verify").out
    weights = [read_file(Run.open(run).files("model")[-1])[0] for run in (plain, whole, resumed)]
    for name, array in weights[1].items():
        np.testing.assert_array_equal(weights[2][name], array)
    assert not np.array_equal(weights[0]["core.layers.0.weight"], weights[1]["core.layers.0.weight"])
    error = call("train", "--resume", resumed, "-n", 512, "--core-kwargs", "edit_lr_multiplier:1.0").error()
    assert "leave out --core-kwargs" in error


def test_a_run_in_groups_is_verified_and_resumes_in_them(
    call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srwm_rl.scripts.training.build.groups_of_new_run", lambda config: 2)  # as on a GPU
    assert call("train", *recall_argv, "--save-freq", 1, "-n", 256, "-f", tmp_path).code == 0
    monkeypatch.undo()
    run = tmp_path / "ppo_srwm" / "recall_1"
    assert Run.open(run).config["train"]["n_groups"] == 2
    assert "exact: from 192 to 256 steps" in call("train", "--resume", run, "--verify").out
    assert call("train", "--resume", run, "-n", 320).code == 0
    assert "leave out --n-groups (the run has 2)" in call("train", "--resume", run, "--n-groups", 1).error()


def test_a_run_from_before_ppo_had_groups_is_exact(call: Any, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["train"]["n_groups"]
    (copied / "config.json").write_text(json.dumps(config))
    result = call("train", "--resume", copied, "--verify")
    assert result.code == 0, result
    assert "exact: from 192 to 256 steps" in result.out


def test_a_run_from_before_the_remaining_progress_ended_at_0_is_exact(call: Any, copied: Path) -> None:
    newest = Run.open(copied).files("checkpoint")[-1]
    arrays, meta = read_file(newest)
    assert meta["state"]["counters"]["_current_progress_remaining"] == 0.0
    meta["state"]["counters"]["_current_progress_remaining"] = -0.25
    write_file(newest, arrays, meta)
    assert "exact: from 192 to 256 steps" in call("train", "--resume", copied, "--verify").out
    assert call("train", "--resume", copied, "-n", 257).code == 0
    assert "exact: from 256 to 320 steps" in call("train", "--resume", copied, "--verify").out


@pytest.mark.parametrize("what", ["weight", "log"])
def test_verify_detects_a_run_that_is_not_exact(what: str, call: Any, copied: Path) -> None:
    newest = Run.open(copied).files("checkpoint")[-1]
    if what == "weight":
        arrays, meta = read_file(newest)
        name = next(name for name in arrays if name.startswith("/policy/") and "core" in name)
        arrays[name] = np.nextafter(arrays[name], np.float32(np.inf))
        write_file(newest, arrays, meta)
        part = f"first {name}"
    else:
        log = copied / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        last = json.loads(lines[-1])
        last["train/loss"] = 0.5  # as many bytes as before, so that the positions still fit
        text = json.dumps(last).encode() + b"\n"
        log.write_bytes(b"".join(lines[:-1]) + text)
        part = "metrics.jsonl"
    assert part in call("train", "--resume", copied, "--verify").error()


def test_runs_that_cannot_be_verified_are_refused(
    call: Any, copied: Path, impala_argv: list[str], tmp_path: Path
) -> None:
    assert call("train", *impala_argv, "--save-freq", 1, "-n", 256, "-f", tmp_path).code == 0
    overlapped = tmp_path / "impala_srwm" / "recall_1"
    assert "no two runs are the same" in call("train", "--resume", overlapped, "--verify").error()
    for path in Run.open(copied).files("checkpoint")[:-1]:
        path.unlink()
    assert "needs two" in call("train", "--resume", copied, "--verify").error()
    argv = ["--env", "CartPole-v1", "--n-envs", 2, "--n-steps", 16, "--batch-size", 16, "--n-epochs", 1, "-n", 96]
    assert call("train", *argv, "--save-freq", 1, "--no-progress", "-f", tmp_path).code == 0
    cartpole = tmp_path / "ppo_srwm" / "CartPole-v1_1"
    assert "cannot save its state" in call("train", "--resume", cartpole, "--verify").error()


def test_override_changes_the_trainers_settings_and_records_it(call: Any, copied: Path) -> None:
    argv = ["train", "--resume", copied, "-n", 384, "--learning-rate", 0.0005]
    assert "--learning-rate 0.005: leave it out, or insist with --override" in call(*argv).error()
    assert call(*argv, "--override").code == 0
    config = json.loads((copied / "config.json").read_text())
    assert config["train"]["learning_rate"] == 0.0005
    assert config["history"] == [{"at": 256, "changed": {"n_timesteps": [256, 384], "learning_rate": [0.005, 0.0005]}}]
    assert call("train", "--resume", copied, "-n", 448).code == 0  # the new rate is the run's own now
    last = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/learning_rate"] == 0.0005


def test_a_longer_run_says_that_its_learning_rate_decays_anew(
    call: Any, recall_argv: list[str], tmp_path: Path, copied: Path
) -> None:
    assert "learning rate falls" not in call("train", "--resume", copied, "-n", 384).out  # --lr-decay none
    decay = recall_argv.index("--lr-decay") + 1
    argv = [*recall_argv[:decay], "linear", *recall_argv[decay + 1 :], "-n", 128, "-f", tmp_path]
    assert call("train", *argv).code == 0
    run = tmp_path / "ppo_srwm" / "recall_1"
    longer = call("train", "--resume", run, "-n", 512)
    assert (
        "learning rate falls to 0 at 512 steps instead of 128: from 128 on it begins with 0.00375 instead" in longer.out
    )
    assert json.loads((run / "config.json").read_text())["history"] == [
        {"at": 128, "changed": {"n_timesteps": [128, 512]}}
    ]


@pytest.mark.parametrize(
    "argv",
    [
        *(["--core", "lstm"], ["--env", "bandit"], ["--n-envs", "8"], ["--core-kwargs", "hidden_size:24"]),
        ["--algo", "impala"],  # which has no --gae-lambda, a setting of the run
    ],
)
def test_settings_of_the_network_cannot_be_overridden(argv: list[str], call: Any, recall: Path) -> None:
    result = call("train", "--resume", recall, "-n", 384, "--override", *argv)
    assert "a resumed run keeps its settings" in result.error()


def test_a_run_in_training_without_a_checkpoint_is_said_to_be_in_training(call: Any, copied: Path) -> None:
    for checkpoint in (copied / "checkpoints").iterdir():
        checkpoint.unlink()
    with Run.open(copied).lock():
        assert "is being trained by process" in call("train", "--resume", copied, "-n", 384).error()
    assert "has no intact checkpoint" in call("train", "--resume", copied, "-n", 384).error()


@pytest.mark.parametrize("word", ["--override", "--verify"])
def test_override_and_verify_need_resume(word: str, call: Any) -> None:
    assert f"{word} is for a resumed run" in call("train", "--env", "recall", word).error()
