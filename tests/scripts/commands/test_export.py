"""`srwm-rl export`: ONNX files act as their run; wrong input is refused. Zips: test_sb3_zip.py."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import srwm_rl
from srwm_rl.envs.procgen.simulator import installed_distribution
from srwm_rl.nn.diagnostics import introspect
from srwm_rl.onnx_export import ActingStep
from srwm_rl.scripts.export import onnx_file
from srwm_rl.scripts.main import main

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

HEADLESS = ("lstm", "gru", "feedforward")
PENDULUM = ("--env", "Pendulum-v1", "--n-envs", "2", "--n-steps", "16", "--batch-size", "32", "--n-epochs", "1")


def argv_for(core: str, argv: list[str]) -> list[str]:
    """Return a tiny run's arguments with heads of size 2: heads of size 1 never edit themselves."""
    heads = [] if core in HEADLESS else ["n_heads:4"]
    cut = argv.index("n_layers:1") + 1
    return [*argv[:cut], *heads, *argv[cut:], "--core", core]


def train(call: Any, argv: list[str], logs: Path) -> Path:
    result = call("train", *argv, "-n", 64, "-f", logs, "--verbose", 0)
    assert result.code == 0, result
    return next(logs.glob("*/*"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> Path:
    """Return a tiny run."""
    logs = tmp_path_factory.mktemp("export")
    assert main(["train", *argv_for("srwm", recall_argv), "-n", "64", "-f", str(logs), "--verbose", "0"]) == 0
    return next(logs.glob("*/*"))


@pytest.fixture(scope="module")
def graph(run: Path) -> bytes:
    """Return the tiny run's exported graph."""
    return onnx_file.to_onnx(ActingStep(srwm_rl.load(run).policy), {})


def compare(file: Path, run: Path, batch: int) -> None:
    """Step a file and its run over the same random observations; each carries its own memory."""
    graph, policy = onnxruntime.InferenceSession(file), srwm_rl.load(run).policy
    rng = np.random.default_rng(batch)
    shape = (policy.core.state_layers, batch, policy.core.state_size)
    state, carried = torch.zeros(shape), np.zeros(shape, np.float32)
    for t in range(5):
        obs = {
            key: rng.integers(0, 256, (batch, *part.shape), np.uint8)
            if part.dtype == np.uint8
            else rng.normal(size=(batch, *part.shape)).astype(np.float32)
            for key, part in policy.obs_spaces.items()
        }
        starts = rng.random(batch) < (0.3 if t else 1)
        seen = introspect(policy, {k: torch.from_numpy(v) for k, v in obs.items()}, state, torch.from_numpy(starts))
        state = seen.core_state
        choice, *_, value, carried = graph.run(None, {**obs, "state": carried, "episode_start": starts})
        np.testing.assert_allclose(choice, seen.choices.numpy(), atol=1e-5)
        np.testing.assert_allclose(value, seen.values.numpy(), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(carried, state.numpy(), atol=1e-5, rtol=1e-5)
    assert not policy.core.carries_over or not carried.size or np.abs(carried).max() > 1e-4


@pytest.mark.parametrize("core", srwm_rl.core_names())
def test_every_core_acts_the_same_in_onnxruntime(core: str, call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    run, file = train(call, argv_for(core, recall_argv), tmp_path / "logs"), tmp_path / "agent.onnx"
    result = call("export", run, "-o", file)
    assert result.code == 0, result
    assert result.out.startswith(f"{file}: {core} on recall, 64 steps; ")
    assert "checked   48 steps of 4 environments" in result.out
    assert "largest difference: action_probabilities " in result.out
    for batch in (1, 5):
        compare(file, run, batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.onnx", "logs"]


def test_a_procgen_run_takes_frames_and_names_its_actions(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    argv = [*argv_for("srwm", procgen_argv), "--env", "coinrun,maze", "--precision", "bfloat16"]
    run, file = train(call, argv, tmp_path / "logs"), tmp_path / "agent.onnx"
    result = call("export", run, "-o", file)
    assert result.code == 0, result
    assert "observation uint8 [B, 64, 64, 3]" in result.out
    assert "in bfloat16, the graph in float32" in result.out
    known = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(known.pop("actions")) == list(onnx_file.PROCGEN_ACTIONS)
    assert json.loads(known.pop("action_space"))["n"] == 15
    assert set(json.loads(known["observation_keys"])) == {
        key for key, _ in json.loads(known["observation_space"])["spaces"]
    }
    texts = {"core": "srwm", "algo": "ppo", "env": "coinrun,maze", "mode": "easy", "num_timesteps": "64"}
    assert known.items() >= {**texts, "srwm_rl_version": srwm_rl.__version__}.items()


def test_the_names_of_procgens_actions_are_its_own() -> None:
    env = importlib.import_module(f"{installed_distribution().module}.env")
    combos = env.KEY_COMBOS if hasattr(env, "KEY_COMBOS") else env.BaseProcgenEnv.get_combos(None)
    assert tuple("+".join(keys) or "NOTHING" for keys in combos) == onnx_file.PROCGEN_ACTIONS


def test_continuous_actions_have_mean_and_deviation(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    small = recall_argv[recall_argv.index("--n-threads") :]
    run, file = train(call, [*argv_for("srwm", small), *PENDULUM[:-2]], tmp_path / "logs"), tmp_path / "agent.onnx"
    result = call("export", run, "-o", file)
    assert result.code == 0, result
    assert "action_mean float32 [B, 1], action_std float32 [B, 1]" in result.out
    for batch in (1, 5):
        compare(file, run, batch)


def _wrong_value(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("value_net.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_wrong_value, "onnxruntime and PyTorch differ by more than 0.0001: action_probabilities "),
        (lambda content: content[: len(content) // 2], "onnxruntime cannot run it: InvalidProtobuf"),
    ],
    ids=["wrong", "broken"],
)
def test_a_faulty_graph_is_not_written(
    spoil: Any, part: str, run: Path, graph: bytes, call: Any, untouched: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(onnx_file, "to_onnx", lambda step, metadata: spoil(graph))
    result = call("export", run, "-o", untouched / "agent.onnx")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
    assert result.err.startswith(f"srwm-rl: {untouched / 'agent.onnx'} was not written: {part}")
    kept = tmp_path / "kept.onnx"
    kept.write_text("an earlier export")
    assert call("export", run, "-o", kept, "--force").code == 1
    assert kept.read_text() == "an earlier export"


@pytest.mark.parametrize("package", onnx_file.PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(
    package: str, run: Path, call: Any, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = call("export", run, "-o", untouched / "agent.onnx").error()
    assert message == f"--format onnx needs {package}: pip install 'srwm-rl[export]'"


def test_wrong_input_is_refused_in_one_line(run: Path, call: Any, untouched: Path, tmp_path: Path) -> None:
    file = untouched / "agent.onnx"
    empty = tmp_path / "empty"
    shutil.copytree(run, empty)
    for model in (empty / "checkpoints").iterdir():
        model.unlink()
    assert "there is no run at" in call("export", tmp_path / "nothing", "-o", file).error()
    assert "has no model" in call("export", empty, "-o", file).error()
    assert "--format takes one of 'onnx', 'sb3', not 'tflite'" in call("export", run, "--format", "tflite").error()
    assert "is no folder to write in" in call("export", run, "-o", tmp_path / "nowhere" / "x").error()
    assert "give -o the name of a file" in call("export", run, "-o", untouched).error()
    assert "something is missing" in call("export", "-o", file).error()


@pytest.mark.parametrize("format_", ["onnx", "sb3"])
def test_a_file_that_exists_is_replaced_only_on_request(format_: str, run: Path, call: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("precious")
    argv = ("export", run, "--format", format_, "-o", file)
    assert "exists already; give another name with -o, or --force" in call(*argv).error()
    assert file.read_text() == "precious"
    result = call(*argv, "--force", "--verbose", 0)
    assert (result.code, result.out) == (0, "")
    assert file.stat().st_size > 1000


def test_the_help_is_light_and_explains() -> None:
    code = (
        "import sys\n"
        "from srwm_rl.scripts.main import main\n"
        "try:\n"
        "    main(['export', '--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("usage: srwm-rl export", "--format {onnx,sb3}", "action_probabilities", "new_state", "episode_start"):
        assert part in result.stdout
