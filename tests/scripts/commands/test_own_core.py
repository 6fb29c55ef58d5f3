"""A user's core, named on the command line as my_module:MyCore."""

from pathlib import Path
from typing import Any

import pytest

from srwm_rl.nn.cores import _CORES

MODULE = """
import torch
import srwm_rl

class Decay(srwm_rl.Core):
    def __init__(self, input_size, width=6):
        super().__init__(input_size, width, 1, width)
        self.read = torch.nn.Linear(input_size, width)

    def forward(self, x, state, episode_starts):
        ys, trace = [], state[0]
        for step, starts in zip(self.read(x), episode_starts):
            trace = 0.5 * trace * (starts == 0).to(x.dtype)[:, None] + step
            ys.append(trace)
        return torch.stack(ys), trace[None]

class Forgets(Decay):
    def forward(self, x, state, episode_starts):
        return super().forward(x, state, torch.zeros_like(episode_starts))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module of a new name into the current folder, and return that name."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_it_trains_resumes_and_is_evaluated_where_the_command_names_it(
    algo: str, module: str, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    tiny = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    argv = [word for word in tiny if word not in ("--core-kwargs", "hidden_size:16", "n_layers:1")]
    core = f"{module}:Decay"
    result = call("train", *argv, "--core", core, "--core-kwargs", "width:5", "-n", 64, "-f", tmp_path / "logs")
    assert result.code == 0, result
    run = tmp_path / "logs" / f"{algo}_{module}+Decay" / "recall_1"
    assert call("eval", run, "--core", core).code == 0
    assert call("train", "--resume", run, "--core", core, "-n", 128).code == 0


def test_a_run_folder_does_not_choose_imported_code(
    module: str, call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [word for word in recall_argv if word not in ("--core-kwargs", "hidden_size:16", "n_layers:1")]
    assert call("train", *argv, "--core", f"{module}:Decay", "-n", 64, "-f", tmp_path / "logs").code == 0
    run = tmp_path / "logs" / f"ppo_{module}+Decay" / "recall_1"
    monkeypatch.delitem(_CORES, f"{module}:Decay")  # as in a new process
    assert f"add --core {module}:Decay" in call("train", "--resume", run, "-n", 128).error()
    assert f"give --core {module}:Decay on the command line" in call("eval", run).error()
    assert f"{module}:Decay" not in _CORES


@pytest.mark.parametrize(
    ("core", "part"),
    [
        ("nowhere_to_be_found:Core", "there is no module 'nowhere_to_be_found'"),
        ("MODULE:Deacy", "did you mean 'Decay'?"),
        ("MODULE:Forgets", "reset"),
    ],
)
def test_a_core_that_does_not_work_is_refused_before_training(
    core: str, part: str, module: str, call: Any, untouched: Path
) -> None:
    argv = ["--env", "recall", "--core", core.replace("MODULE", module), "-f", untouched]
    assert part in call("train", *argv).error()
