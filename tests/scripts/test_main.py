"""The entry point: help, unknown commands, tracebacks on request, closed pipes, and no output of other packages."""

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import srwm_rl
from srwm_rl.envs.procgen.simulator import installed_distribution
from srwm_rl.scripts import main as main_module

HEAVY = ("torch", "stable_baselines3", "procgen", "procgen_gym", "scipy")


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["eval", "-h"], ["doctor", "--help"]])
def test_help_is_light_and_quiet(argv: list[str]) -> None:
    result = python(
        "import sys\n"
        "from srwm_rl.scripts.main import main\n"
        "try:\n"
        f"    code = main({argv!r})\n"
        "except SystemExit as stop:\n"
        "    code = stop.code or 0\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("usage: srwm-rl")


@pytest.mark.parametrize("first", ["srwm_rl", "stable_baselines3", "ProcGen"])
def test_imports_print_nothing(first: str) -> None:
    module = {"ProcGen": installed_distribution().module}.get(first, first)
    result = python(
        f"import {module}\n"
        "import srwm_rl, srwm_rl.agents, srwm_rl.envs, stable_baselines3, sb3_contrib\n"
        "from srwm_rl.envs import ProcgenVecEnv\n"
        "env = ProcgenVecEnv('coinrun', 1); env.reset(); env.close()"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_command_prints_the_help_and_fails(call: Any) -> None:
    assert call().code == 2
    assert call("--help").code == 0
    assert call("--version").out == f"srwm-rl {srwm_rl.__version__}\n"


def test_own_warnings_are_one_line_and_others_stay() -> None:
    result = python(
        "import warnings\n"
        "from srwm_rl.scripts.cli import print_own_warnings\n"
        "from srwm_rl.envs import GymnasiumBatch\n"
        "import gymnasium\n"
        "class Env(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2), b=gymnasium.spaces.Text(3))\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None): return dict(a=0, b='x'), {}\n"
        "gymnasium.register('Text-v0', Env)\n"
        "with print_own_warnings():\n"
        "    GymnasiumBatch('Text-v0', 2)\n"
        "    warnings.simplefilter('always')\n"  # as a library may do, whereupon Python forgets what it has shown
        "    GymnasiumBatch('Text-v0', 2)\n"
        "    warnings.warn('of another', stacklevel=1)"
    )
    ours, *theirs = result.stderr.splitlines()
    assert ours.startswith("srwm-rl: warning: observation b is text"), result
    assert "is text" not in "\n".join(theirs)
    assert "UserWarning: of another" in "\n".join(theirs)


def test_unknown_command_suggests_the_nearest(call: Any) -> None:
    assert call("trian").error() == "unknown command 'trian'; did you mean 'train'?"


def test_traceback_on_request_only(call: Any) -> None:
    wrong = ("train", "--env", "coinrum")
    assert "Traceback" not in call(*wrong).err
    for verbose in (("--verbose", "2"), ("--verbose=2",)):
        loud = call(*wrong, *verbose)
        assert loud.code == 2
        assert "Traceback" in loud.err
        assert loud.err.splitlines()[-1] == "srwm-rl: error: there is no environment 'coinrum'; did you mean 'coinrun'?"


def test_an_error_of_the_system_is_one_line_too(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", "/a/file")

    monkeypatch.setattr(main_module, "import_module", refuse)
    assert call("train").error() == "/a/file: Permission denied"


@pytest.mark.parametrize("argv", [["train", "--env-list"], ["train", "--help"], ["--help"]])
def test_a_closed_pipe_is_no_error(argv: list[str], tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "srwm_rl", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait(600) == 141


LEAVING = """
import atexit, sys
from srwm_rl.scripts import main as front

class Slow:
    def __del__(self):
        print("taken apart")

keep = Slow()
atexit.register(print, "told to end")
sys.argv = ["srwm-rl", "train"]
front._main = lambda words: int(sys.stdin.read())
print("ran", end=", ")
code = front.main()
print("returned", code)
"""


@pytest.mark.parametrize(
    ("code", "output"), [(130, "ran, told to end\n"), (3, "ran, returned 3\ntold to end\ntaken apart\n")]
)
def test_an_interrupted_process_does_not_wait_for_the_interpreter(code: int, output: str) -> None:
    command = [sys.executable, "-c", LEAVING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, input=str(code))
    assert ended.stdout == output
    assert ended.stderr == ""
    assert ended.returncode == (130 if code == 130 else 0)


def test_a_caller_in_the_same_process_gets_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_module, "_main", lambda argv: 130)
    assert main_module.main(["train"]) == 130


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["train", "--env-list"]])
@pytest.mark.parametrize(("where", "code"), [(">&-", 0), ("<&- >&-", 0), (">/dev/full", 2)])
def test_a_closed_or_full_stdout_is_no_traceback(argv: list[str], where: str, code: int) -> None:
    command = f"{shlex.join([sys.executable, '-m', 'srwm_rl', *argv])} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done
    if code == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("srwm-rl: error: ")
        assert done.stderr.endswith(": No space left on device\n")


def test_closed_streams_get_no_other_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from srwm_rl.scripts import main\n"
        "main._open_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "assert file.fileno() > 2\n"
        "print('lost')\n"
        "os.system('echo lost')\n"
    )
    command = f"{shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=600).returncode == 0
    assert (tmp_path / "file").read_text() == ""


INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def interrupted_at(module: str, folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process that gets a SIGINT when it imports a module."""
    (folder / "sitecustomize.py").write_text(INTERRUPT.replace("MODULE", repr(module)))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "srwm_rl", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("module", ["gymnasium.envs.registration", "srwm_rl.scripts.cli", "tyro"])
def test_an_interrupt_while_the_package_is_imported_prints_nothing(module: str, tmp_path: Path) -> None:
    done = interrupted_at(module, tmp_path, "train", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupted_command_says_so(tmp_path: Path) -> None:
    done = interrupted_at("srwm_rl.scripts.commands.doctor", tmp_path, "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "srwm-rl: interrupted\n")


def test_a_library_user_keeps_the_handler_of_sigint() -> None:
    code = "import signal as s; own = s.getsignal(s.SIGINT); import srwm_rl; print(s.getsignal(s.SIGINT) is own)"
    assert python(code).stdout == "True\n"


def test_a_command_says_at_once_that_it_loads(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import sys; print('torch is imported', file=sys.stderr); sys.exit(9)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "srwm_rl", "train", "--env", "recall"]
    log = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (log.returncode, log.stdout) == (9, "")
    assert log.stderr == "srwm-rl: loading torch and recall ...\ntorch is imported\n"
    quiet = subprocess.run([*command, "--no-progress"], capture_output=True, text=True, env=environment, timeout=600)
    assert quiet.stderr == "torch is imported\n"

    ours, terminal = pty.openpty()
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, timeout=600)
    os.close(terminal)
    assert shown.returncode == 9
    assert os.read(ours, 1000).replace(b"\r\n", b"\n") == b"srwm-rl: loading torch ...\ntorch is imported\n"
    os.close(ours)
