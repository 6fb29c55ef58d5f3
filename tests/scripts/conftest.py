"""Tiny runs, and functions that call the command line in this process or in a subprocess."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from srwm_rl.scripts.main import main

SMALL = ("--n-threads", "1", "--no-progress", "--core-kwargs", "hidden_size:16", "n_layers:1")
TASK = ("--env", "recall", "--levels", "0:12", "--eval-levels", "100:108", "--n-envs", "4", "--n-steps", "16")
TASK = (*TASK, "--batch-size", "32", "--lr-decay", "none", *SMALL)
RECALL = (*TASK, "--n-epochs", "1")
IMPALA = (*TASK, "--algo", "impala")
SMALL = (*SMALL, "--n-epochs", "1")
PROCGEN = ("--n-envs", "4", "--n-steps", "16", "--batch-size", "64", "--encoder-kwargs", 'cnn:{"channels":[2]}', *SMALL)


class CommandResult(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the error message, which must be the only line but for the one that torch is loaded."""
        assert self.code == 2, self
        err = re.sub(r"^srwm-rl: loading torch and .* \.\.\.\n", "", self.err)
        assert err.startswith("srwm-rl: error: "), self
        assert err.count("\n") == 1, self
        assert "Traceback" not in err
        return err.removeprefix("srwm-rl: error: ").rstrip()


Call = Callable[..., CommandResult]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs the command line in this process."""

    def run(*argv: object) -> CommandResult:
        capfd.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return CommandResult(code, *capfd.readouterr())

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Return a function that starts the command line in a process that ends with the test."""
    started = []

    def run(*argv: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "srwm_rl", *map(str, argv)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """Return a function that returns every path below a folder, with the content of the files."""
    return _snapshot


@pytest.fixture(scope="session")
def recall_argv() -> list[str]:
    """Return the options of a tiny run on the recall task, of 64 steps per update."""
    return list(RECALL)


@pytest.fixture(scope="session")
def impala_argv() -> list[str]:
    """Return the same for IMPALA, overlapped."""
    return list(IMPALA)


@pytest.fixture(scope="session")
def procgen_argv() -> list[str]:
    """Return options that make a run on ProcGen tiny, with 64 steps per update."""
    return list(PROCGEN)


@pytest.fixture(scope="session")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of four updates, three of whose checkpoints are kept; copy it before changing it."""
    logs = tmp_path_factory.mktemp("recall")
    assert main(["train", *RECALL, "-n", "256", "--save-freq", "1", "-f", str(logs), "--verbose", "0"]) == 0
    return logs / "ppo_srwm" / "recall_1"


FEW_SHOT = ("--n-envs", "4", "--n-steps", "40", *SMALL[:3], "--core-kwargs", "hidden_size:8", "n_layers:2")
FEW_SHOT = (*FEW_SHOT, "--encoder-kwargs", "mlp:[]", 'cnn:{"kind":"conv4","channels":[4,4]}')


@pytest.fixture(scope="session")
def few_shot_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images: 6 classes of 12 images, 8 x 8, in each split."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(6):
            (root / split / f"{split}{i}").mkdir(parents=True)
            pattern = rng.integers(0, 256, (8, 8))
            for j in range(12):
                pixels = np.clip(pattern + rng.normal(0, 20, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"{split}{i}" / f"{j}.png")
    return root


@pytest.fixture(scope="session")
def train_few_shot(few_shot_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains on few-shot episodes of the folder for one update, and returns the run."""

    def train(*argv: str, core: str = "srwm", data: str | None = None, **settings: object) -> Path:
        logs = tmp_path_factory.mktemp("few_shot")
        kwargs = {"data": data or few_shot_folder, "ways": "3:5", "shots": "1:3", **settings}
        pairs = [f"{name}:{value}" for name, value in kwargs.items()]
        options = ["--algo", "supervised", "--env", "fewshot", "--env-kwargs", *pairs, *FEW_SHOT, "--core", core]
        assert main(["train", *options, *argv, "-n", "160", "-f", str(logs), "--verbose", "0"]) == 0
        return logs / f"supervised_{core}" / "fewshot_1"

    return train


@pytest.fixture(scope="session")
def few_shot(train_few_shot: Callable[..., Path]) -> Path:
    """Return a run on few-shot episodes of 3 to 5 ways and 1 to 3 shots, asked and then told; it learned nothing.

    Of seed 1, whose edits change some answers already.
    """
    return train_few_shot("--seed", "1")


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """Return a folder, and check after the test that nothing was written there."""
    folder = tmp_path / "untouched"
    folder.mkdir()
    yield folder
    assert _snapshot(folder) == {}
