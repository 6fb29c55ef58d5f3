"""Environments and wrappers from a module in the current folder: every command, and the commands that are printed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from srwm_rl.scripts.cli import own_code_options
from srwm_rl.storage.run_folder import Run

MODULE = """
import gymnasium
import numpy as np

class Echo(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 3, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.symbols = self.np_random.integers(4, size=12)
        self.t = 0
        return self.symbols[:1].astype(np.float32), {}

    def step(self, action):
        reward = float(action == self.symbols[self.t])
        self.t += 1
        return self.symbols[self.t : self.t + 1].astype(np.float32), reward, self.t == 11, False, {}

gymnasium.register("OwnEcho-v0", Echo)

class Add(gymnasium.RewardWrapper):
    def __init__(self, env, amount=1.0):
        super().__init__(env)
        self.amount = amount

    def reward(self, reward):
        return reward + self.amount
"""
ENV = "own_code:OwnEcho-v0"
WRAPPER = ("own_code:Add", "amount:0.5")
OWN = ("--env", ENV, "--wrapper", *WRAPPER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the module, and in it the run of a console script that was started there."""
    folder = tmp_path_factory.mktemp("own_code")
    (folder / "own_code.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, recall_argv: list[str]) -> tuple[Path, str]:
    """Return the folder of a finished run, and what the console script printed."""
    argv = ["train", *options(recall_argv), "--frame-stack", "2", "-n", "256", "--save-freq", "1"]
    return folder / "logs/ppo_srwm/own_code+OwnEcho-v0_1", script(folder, *argv).stdout


def options(recall_argv: list[str]) -> list[str]:
    return [*recall_argv[2:], *OWN]


def script(folder: Path, *argv: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run the console script, whose path of modules does not begin with the current folder."""
    program = [
        sys.executable,
        "-c",
        "import sys; sys.path.pop(0); from srwm_rl.scripts.main import main; sys.exit(main())",
    ]
    result = subprocess.run([*program, *map(str, argv)], capture_output=True, text=True, cwd=folder, timeout=600)
    assert result.returncode == code, result
    return result


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def test_the_command_that_is_printed_works(folder: Path, run: tuple[Path, str]) -> None:
    command = run[1].rpartition("Now: ")[2].strip()
    name = run[0].relative_to(folder)
    assert command == f"srwm-rl eval {name} --env {ENV} --wrapper own_code:Add amount:0.5"
    out = script(folder, *shlex.split(command)[1:]).stdout
    assert "held-out" in out


def test_the_run_keeps_its_settings(call: Any, run: tuple[Path, str]) -> None:
    stored = Run.open(run[0]).config["train"]
    assert (stored["wrapper"], stored["frame_stack"], stored["atari"]) == ([list(WRAPPER)], 2, False)
    assert "; wrapped by own_code:Add amount:0.5; 2 observations stacked" in run[1]
    resume = ("train", "--resume", run[0], *OWN)
    assert "leave out --frame-stack" in call(*resume, "--frame-stack", 3).error()
    assert "add --wrapper own_code:Add amount:0.5" in call(*resume, "--wrapper", "own_code:Add", "amount:2").error()


def test_it_is_resumed(call: Any, run: tuple[Path, str], recall_argv: list[str], tmp_path: Path) -> None:
    assert call("train", *options(recall_argv), "-n", 64, "-f", tmp_path).code == 0
    (own,) = (tmp_path / "ppo_srwm").iterdir()
    result = call("train", "--resume", own, *OWN, "-n", 128)
    assert result.code == 0, result
    assert json.loads((own / "config.json").read_text())["train"]["wrapper"] == [list(WRAPPER)]


COMMANDS = {
    "train": ("--resume", "RUN", "-n", "512", "--dry-run"),
    "eval": ("RUN", "--baselines", "--json", "OUT.json"),
    "watch": ("RUN", "-o", "OUT.gif", "--trace", "OUT.npz"),
    "report": ("RUN", "-o", "OUT.html"),
    "export": ("RUN", "-o", "OUT.onnx"),
    "share": ("RUN", "-o", "OUT.safetensors", "--no-baselines"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_for_the_code_and_takes_it(
    command: str, call: Any, run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "export":
        pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    words = [word.replace("RUN", str(run[0])).replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]]
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    assert f"add --env {ENV}" in call(command, *words).error()
    assert "own_code" not in sys.modules
    assert "add --wrapper own_code:Add amount:0.5" in call(command, *words, "--env", ENV).error()
    result = call(command, *words, *OWN)
    assert result.code == 0, result
    if command == "share":  # the evaluation that its card names can be run
        line = next(line for line in result.out.splitlines() if line.startswith("evaluated by"))
        argv = shlex.split(line.removeprefix("evaluated by"))[1:]
        assert argv[-len(OWN) :] == [*OWN] or " ".join(OWN[2:]) in " ".join(argv)
        assert call(*argv, "--no-progress").code == 0


def test_a_trace_names_its_wrappers(call: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    assert call("watch", run[0], *OWN, "-o", tmp_path / "film.gif", "--trace", trace).code == 0
    assert "add --wrapper own_code:Add amount:0.5" in call("replay", trace, "--env", ENV).error()
    result = call("replay", trace, *OWN)
    assert (result.code, "every observation and reward as recorded" in result.out) == (0, True), result


def test_a_report_repeats_the_code_in_its_commands(call: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    argv = ("--no-random", "--no-freeze", "--no-rank-heads", "-o", tmp_path / "page.html")
    assert call("report", run[0], *OWN, *argv).code == 0
    assert f"--env {ENV} --wrapper own_code:Add amount:0.5 --repeats 1" in (tmp_path / "page.html").read_text()


def test_rewards_are_the_wrappers(call: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    assert call("eval", run[0], *OWN, "--json", tmp_path / "eval.json").code == 0
    returns = [episode[2] for episode in json.loads((tmp_path / "eval.json").read_text())["episodes"]["held-out"]]
    assert {value % 1 for value in returns} == {0.5}, "11 steps of .5 more"


def test_runs_with_and_without_are_not_compared(
    call: Any, run: tuple[Path, str], recall_argv: list[str], tmp_path: Path
) -> None:
    argv = [*recall_argv[2:], "--env", ENV, "-n", 64, "-f", tmp_path]
    assert call("train", *argv).code == 0
    (plain,) = (tmp_path / "ppo_srwm").iterdir()
    assert "was trained without" in call("compare", run[0], plain, *OWN).error()
    assert "was trained without" in call("eval", plain, *OWN).error()


def test_a_group_resumes_with_its_code(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    result = call("train", *options(recall_argv), "--seeds", "0:2", "-n", 64, "-f", tmp_path)
    assert result.code == 0, result
    (group,) = (tmp_path / "ppo_srwm").iterdir()
    assert f"Now: srwm-rl eval {group} --env {ENV} --wrapper own_code:Add amount:0.5\n" in result.out
    again = ("train", "--resume", group, "-n", 128, "--no-progress")
    assert f"add --env {ENV}" in call(*again).error()
    assert "add --wrapper" in call(*again, "--env", ENV).error()
    assert call(*again, *OWN).code == 0
    assert len(list(group.glob("*/checkpoints/model-000000000128.safetensors"))) == 2


def test_a_settings_file_names_no_code_by_itself(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    result = call("train", *options(recall_argv), "--print-config")
    assert result.code == 0, result
    (tmp_path / "settings.yml").write_text(result.out)
    argv = ("train", "--config", tmp_path / "settings.yml", "--dry-run")
    assert f"add --env {ENV}" in call(*argv).error()
    assert "add --wrapper own_code:Add amount:0.5" in call(*argv, "--env", ENV).error()
    assert call(*argv, *OWN).code == 0


def test_a_zip_needs_its_wrappers(call: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "model.zip"
    assert call("export", run[0], *OWN, "--format", "sb3", "-o", file).code == 0
    argv = ("eval", file, "--trust", *OWN, "--train-levels", "0:3", "--eval-levels", "100:103")
    assert "other observations" in call(*argv).error()
    assert call(*argv, "--frame-stack", 2).code == 0
    assert "knows its own" in call("eval", run[0], *OWN, "--frame-stack", 2).error()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gymnasium.wrappers.TimeLimit",), "not 'gymnasium.wrappers.TimeLimit'; write gymnasium.wrappers:TimeLimit"),
        (("own_code:Add", "amount"), "--wrapper takes name:value, not 'amount'"),
        (("own_code:Ad",), "did you mean 'Add'?"),
        (("own_code:Add", "size:3"), "cannot wrap OwnEcho-v0: TypeError"),
        (("gymnasium.wrappers:GrayscaleObservation",), "cannot wrap OwnEcho-v0"),
    ],
)
def test_wrong_wrappers_are_refused(words: tuple[str, ...], message: str, call: Any, untouched: Path) -> None:
    assert message in call("train", "--env", ENV, "--wrapper", *words, "-f", untouched).error()


def test_options_of_ones_own_code() -> None:
    assert own_code_options({"core": "srwm", "env": "srwm_rl:procgen-coinrun-v0", "wrapper": []}) == ""
    settings = {"core": "my:Core", "env": "m:E-v0", "wrapper": [["a:B", 'text:"x y"'], ["c:D"]]}
    assert own_code_options(settings) == " --core my:Core --env m:E-v0 --wrapper a:B 'text:\"x y\"' --wrapper c:D"


def test_an_environment_that_fails_in_its_first_reset_is_one_line(call: Any, untouched: Path) -> None:
    class Broken(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(0, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, **_: Any) -> Any:
            raise RuntimeError("no\npower")

    gymnasium.register("BrokenReset-v0", Broken)
    result = call("train", "--env", "BrokenReset-v0", "-f", untouched, "--no-progress")
    assert result.code == 3
    assert "stopped: BrokenReset-v0 failed in reset" in result.err
    assert result.err.strip().endswith("RuntimeError: no power")
    assert result.err.count("\n") == 1


class Symbols(gymnasium.Env[Any, Any]):
    """Shows images of symbols."""

    observation_space = gymnasium.spaces.Box(0, 255, (7, 7, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._image(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._image(), 1.0, self.t == 5, False, {}

    def _image(self) -> Any:
        return self.np_random.integers((11, 6, 4), size=(7, 7, 3), dtype=np.uint8)


gymnasium.register("Symbols-v0", Symbols)


def test_a_wrapper_of_the_package_need_not_be_named_again(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    argv = [*procgen_argv, "--env", "Symbols-v0", "-f", tmp_path]
    result = call("train", *argv, "--wrapper", "srwm_rl.envs:OneHotImage", "kinds:[11,6,4]", "-n", 64)
    assert result.code == 0, result
    run = tmp_path / "ppo_srwm" / "Symbols-v0_1"
    assert result.out.endswith(f"Now: srwm-rl eval {run}\n")
    assert "no number above" not in result.err
    assert call("train", "--resume", run, "-n", 128).code == 0
    assert call("eval", run, "--train-levels", "none", "--eval-levels", "1000000:1000004").code == 0
