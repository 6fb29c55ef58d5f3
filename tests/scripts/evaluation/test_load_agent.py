"""Files cannot run code, import modules or restore simulator states; an SB3 zip is loaded only with --trust."""

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_contrib import RecurrentPPO

from srwm_rl import SRWMPolicy
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.envs import batch, vec_env
from srwm_rl.envs.make import make_vec_env
from srwm_rl.envs.wrappers import grouped as groups
from srwm_rl.envs.wrappers import memory_inputs as inputs
from srwm_rl.envs.wrappers import reward
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file, write_file

POLICY = {"core_kwargs": {"hidden_size": 8, "n_layers": 1}}
SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "policy_kwargs": POLICY, "device": "cpu"}
SAID = ("--env", "recall", "--train-levels", "0:12", "--eval-levels", "100:104", "--n-envs", 2)


def zip_of(folder: Path, algorithm: Any, inputs: tuple[str, ...] = ("action", "reward", "step")) -> Path:
    env = make_vec_env("recall", 2, "0:12", 0, inputs=inputs)
    policy = SRWMPolicy if algorithm is RecurrentPPO else "SRWMPolicy"
    model = algorithm(policy, env, **SMALL).learn(32)
    model.save(folder / "model.zip")
    env.close()
    return folder / "model.zip"


@pytest.mark.parametrize("algorithm", [PPO, IMPALA, RecurrentPPO])
def test_a_trusted_zip_is_evaluated(algorithm: Any, call: Any, tmp_path: Path) -> None:
    path = zip_of(tmp_path, algorithm)
    output = call("eval", path, "--trust", *SAID, "--json", tmp_path / "report.json")
    assert (output.code, output.err) == (0, ""), output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["levels"] == {"train": "0:12", "held-out": "100:104"}
    assert (report["core"], report["num_timesteps"]) == ("srwm", 32)


@pytest.mark.parametrize("inputs", [(), ("reward",), ("step", "action")])
def test_the_memory_inputs_are_read_from_the_zips_spaces(inputs: tuple[str, ...], call: Any, tmp_path: Path) -> None:
    assert call("eval", zip_of(tmp_path, PPO, inputs), "--trust", *SAID).code == 0


def test_a_zip_is_refused_with_the_reason_and_not_read(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zip_of(tmp_path, PPO)
    monkeypatch.setattr(PPO, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("it was opened"))
    message = call("eval", path, *SAID).error()
    assert "reading it runs whatever code is in it" in message
    assert "add --trust" in message


@pytest.mark.parametrize("left_out", ["--env", "--train-levels", "--eval-levels"])
def test_a_zip_needs_its_environment_and_levels(left_out: str, call: Any, tmp_path: Path) -> None:
    argv = list(SAID)
    del argv[argv.index(left_out) : argv.index(left_out) + 2]
    assert (
        "give --env, --train-levels and --eval-levels" in call("eval", zip_of(tmp_path, PPO), "--trust", *argv).error()
    )


def test_a_zip_of_another_environment_is_refused(call: Any, tmp_path: Path) -> None:
    argv = ["bandit" if word == "recall" else word for word in SAID]
    assert "has other observations or actions" in call("eval", zip_of(tmp_path, PPO), "--trust", *argv).error()


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 99])
def test_a_damaged_zip_is_one_line(content: bytes, call: Any, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(content)
    assert "cannot be loaded" in call("eval", tmp_path / "model.zip", "--trust", *SAID).error()


def test_trust_is_for_zips_alone(call: Any, recall: Path) -> None:
    assert "--trust is for zips" in call("eval", recall, "--trust").error()
    assert "was trained on recall; leave it out" in call("eval", recall, "--env", "bandit").error()


def test_a_zip_is_played_beside_a_run(call: Any, recall: Path, tmp_path: Path) -> None:
    argv = ("--train-levels", "0:12", "--eval-levels", "1000:1004", "--n-envs", 2)
    path, written = zip_of(tmp_path, PPO), tmp_path / "report.json"
    assert call("eval", recall, "--trust", "--beside", path, *argv, "--json", written).code == 0
    (baseline,) = json.loads(written.read_text())["baselines"]
    assert (baseline["name"], len(baseline["episodes"]["held-out"])) == (str(path), 4)
    assert "add --trust" in call("eval", recall, "--beside", path, *argv).error()


def test_a_zip_is_played_in_the_mode_that_is_said(call: Any, recall: Path, tmp_path: Path) -> None:
    env = make_vec_env("maze", 2, "0:12", 0, mode="hard")
    PPO("SRWMPolicy", env, **SMALL).save(tmp_path / "model.zip")
    env.close()
    argv = ("--trust", *("maze" if word == "recall" else word for word in SAID), "--json", tmp_path / "report.json")
    lengths = {}
    for mode in ("easy", "hard"):
        assert call("eval", tmp_path / "model.zip", *argv, "--mode", mode).code == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["mode"] == mode
        lengths[mode] = [row[3] for row in report["episodes"]["held-out"]]
    assert lengths["easy"] != lengths["hard"]
    assert "--mode is for zips" in call("eval", recall, "--mode", "hard").error()


MODULE = """
import gymnasium
(__import__("pathlib").Path(__file__).parent / "imported").touch()
gymnasium.register("Own-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=9)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the marker file of a module with an environment, written when it is imported."""
    (tmp_path / "srwm_rl_own_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("srwm_rl_own_env", None)
    return tmp_path / "imported"


def test_a_model_file_cannot_import_an_environments_module(
    call: Any, recall: Path, tmp_path: Path, own_module: Path
) -> None:
    arrays, meta = read_file(Run.open(recall).files("model")[-1])
    meta["config"]["env"] = "srwm_rl_own_env:Own-v0"
    write_file(tmp_path / "model", arrays, meta)
    message = call("eval", tmp_path / "model").error()
    assert "code that is not imported because a file names it: add --env srwm_rl_own_env:Own-v0" in message
    assert not own_module.exists()
    assert (
        "has other observations or actions"
        in call("eval", tmp_path / "model", "--env", "srwm_rl_own_env:Own-v0").error()
    )
    assert own_module.exists()


def test_a_model_file_has_no_environment_state(recall: Path) -> None:
    run = Run.open(recall)
    arrays, meta = read_file(run.files("model")[-1])
    checkpoint, whole = read_file(run.files("checkpoint")[-1])
    states = [name for name in checkpoint if name.startswith("/environments")]
    assert states, "the checkpoint has the states that the model must not have"
    weights = {name for name in arrays if not name.startswith("/levels_played/")}
    assert {f"/policy/{name}" for name in weights} == {name for name in checkpoint if name.startswith("/policy/")}
    assert meta.keys() - {"levels_played"} == whole.keys() - {"state"}
    held = {checkpoint[name].tobytes() for name in states if checkpoint[name].size > 1 and checkpoint[name].any()}
    content = run.files("model")[-1].read_bytes()
    assert held
    assert not [word for word in held if word in content]


@pytest.mark.parametrize("env", ["recall", "fruitbot"])
def test_an_evaluation_restores_no_state(
    env: str, call: Any, recall: Path, procgen_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recall
    if env != "recall":
        assert call("train", "--env", env, *procgen_argv, "-n", 64, "-f", tmp_path).code == 0
        (run,) = tmp_path.glob("*/*_1")
    holders = (batch.BatchEnv, groups.GroupedVecEnv, inputs.VecMemoryInputs, vec_env.BatchVecEnv)
    for holder in (*holders, reward.VecNormalizeReward):
        monkeypatch.setattr(holder, "set_state", lambda *_: pytest.fail("a state was restored"))
    argv = ["--n-envs", 2, "--train-levels", "0:2", "--eval-levels", "1000:1002"]
    assert call("eval", run, *argv).code == 0
    with pytest.raises(pytest.fail.Exception, match="a state was restored"):
        call("train", "--resume", run, "-n", 512)  # the patched functions would have failed


def test_only_the_runs_own_checkpoints_are_resumed(call: Any, recall: Path, tmp_path: Path) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    folder = run / "checkpoints"
    outside = shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(outside)
    before = sorted(file.name for file in Path(outside).iterdir())
    assert f"{folder} is a link" in call("train", "--resume", run, "-n", 512).error()
    assert sorted(file.name for file in Path(outside).iterdir()) == before
    assert call("eval", run).code == 0  # reading through a link is allowed


def test_absurd_weights_that_are_finite_are_refused(call: Any, recall: Path, tmp_path: Path) -> None:
    arrays, meta = read_file(Run.open(recall).files("model")[-1])
    name = next(name for name in arrays if not name.startswith("/"))
    arrays[name] = np.full_like(arrays[name], 1e38)
    write_file(tmp_path / "model", arrays, meta)
    assert "is broken: weight" in call("eval", tmp_path / "model").error()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_its_writer(call: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in call("eval", tmp_path / "pipe").error()
