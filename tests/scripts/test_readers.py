"""Every command that reads a file of the user's refuses pipes, devices, damaged and hostile content in one line."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LONG = "9" * 400
HUGE_SHAPE = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**45},)}}"

# Arguments of a command by what it reads; FILE is the file, RUN a run in which a file is replaced.
FILES: dict[str, tuple[str, ...]] = {
    "eval": ("eval", "FILE"),
    "compare": ("compare", "FILE", "RUN"),
    "watch": ("watch", "FILE"),
    "export": ("export", "FILE", "-o", "OUT.onnx"),
    "share": ("share", "FILE", "-o", "OUT.safetensors"),
    "import-official": ("import-official", "FILE", "-o", "OUT"),
    "replay": ("replay", "FILE"),
    "report --eval": ("report", "RUN", "--eval", "FILE", "-o", "OUT.html"),
    "report --video": ("report", "RUN", "--eval", "EVALUATION", "--video", "FILE", "-o", "OUT.html"),
    "train --config": ("train", "--config", "FILE", "--env", "recall"),
    "controls --resume": ("controls", "recall", "--json", "FILE", "--resume"),
}
OF_A_RUN: dict[str, tuple[str, tuple[str, ...]]] = {
    "metrics.jsonl, report": ("metrics.jsonl", ("report", "RUN", "--eval", "EVALUATION", "-o", "OUT.html")),
    "metrics.jsonl, plot": ("metrics.jsonl", ("plot", "RUN", "-o", "OUT.png")),
    "config.json, eval": ("config.json", ("report", "RUN", "--eval", "EVALUATION", "-o", "OUT.html")),
    "config.json, resume": ("config.json", ("train", "--resume", "RUN", "-n", "512")),
    "group.json": ("group.json", ("train", "--resume", "RUN", "-n", "512")),
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, recall: Path) -> Path:
    """Return the results of an evaluation of the run."""
    from srwm_rl.scripts.main import main

    path = tmp_path_factory.mktemp("evaluation") / "eval.json"
    assert main(["eval", str(recall), "--json", str(path), "--no-progress"]) == 0
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory, recall: Path) -> Path:
    """Return a trace of an episode of the run."""
    from srwm_rl.scripts.main import main

    folder = tmp_path_factory.mktemp("trace")
    argv = ["-o", str(folder / "a.gif"), "--trace", str(folder / "a.npz"), "--verbose", "0", "--no-progress"]
    assert main(["watch", str(recall), *argv]) == 0
    return folder / "a.npz"


def place(kind: str, path: Path) -> None:
    """Make a file, or what is none, at a path."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        contents = {
            "empty": b"",
            "random": np.random.default_rng(0).bytes(1000),
            "digits": f'{{"step": {LONG}, "a": {LONG}}}\n{{"step": 2}}\n'.encode(),
            "deep": b"[" * 100_000,
            "deep objects": b'{"a":' * 100_000,
            "no UTF-8": b'{"step": "\xff\xfe"}\n{"step": 2}\n',
        }
        path.write_bytes(contents[kind])


KINDS = ("pipe", "zero", "empty", "random", "digits", "deep", "deep objects", "no UTF-8")


@pytest.fixture
def words(tmp_path: Path, recall: Path, evaluation: Path) -> Callable[..., list[str]]:
    """Return a function that puts paths into the words of a command."""
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    places = {"RUN": run, "EVALUATION": evaluation, "FILE": tmp_path / "file"}

    def argv(command: tuple[str, ...]) -> list[str]:
        return [str(places.get(word, word.replace("OUT", f"{tmp_path}/out"))) for word in command]

    return argv


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", FILES)
def test_a_file_that_is_named(
    reader: str, kind: str, words: Callable[..., list[str]], call: Any, tmp_path: Path
) -> None:
    place(kind, tmp_path / "file")
    line = call(*words(FILES[reader])).error()
    assert str(tmp_path / "file") in line
    if kind in ("pipe", "zero"):
        assert "it is no regular file" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
@pytest.mark.parametrize("reader", OF_A_RUN)
def test_a_file_of_a_run(reader: str, kind: str, words: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    name, command = OF_A_RUN[reader]
    place(kind, tmp_path / "run" / name)
    result = call(*words(command))
    if name == "metrics.jsonl" and kind in ("empty", "deep", "deep objects"):
        # Nothing is logged yet, or the last line is not whole: the run is still training.
        assert result.code == 0 or "has no" in result.error()
    elif name == "group.json" and kind == "folder":
        assert result.code == 0  # which is no group, but a run
    else:
        assert str(tmp_path / "run") in result.error()


@pytest.mark.parametrize("value", [int(LONG), -1, 2**70, 1.5, "x", None, [], 1e300])
@pytest.mark.parametrize("entry", [1, 2, 3])  # level, return, length of an episode
def test_an_evaluation_with_odd_numbers(
    entry: int, value: Any, words: Callable[..., list[str]], call: Any, evaluation: Path, tmp_path: Path
) -> None:
    content = json.loads(evaluation.read_text())
    split = next(iter(content["episodes"]))
    content["episodes"][split][0][entry] = value
    (tmp_path / "file").write_text(json.dumps(content))
    result = call(*words(FILES["report --eval"]))
    if entry == 2 and value in (-1, 1.5):
        assert result.code == 0
    else:
        assert "was not written by srwm-rl eval --json" in result.error()


def npz(**members: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = f"{header}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        npz(rewards=npy(HUGE_SHAPE)),
        npz(rewards=npy(HUGE_SHAPE.replace(str(2**45), LONG))),
        npz(rewards=npy(HUGE_SHAPE.replace("<f4", "|O"), bytes(8))),
        npz(rewards=npy(HUGE_SHAPE.replace(str(2**45), "-1"), bytes(8))),
        npz(rewards=npy(HUGE_SHAPE.replace("<f4", "<V0"))),
        npz(rewards=npy("(" * 4000)),
        npz(rewards=npy("{" + "'a':{" * 500)),
        npz(rewards=npy(HUGE_SHAPE, version=b"\x09\x00")),
        npz(rewards=b""),
        npz(**{f"a{i}": b"" for i in range(100)}),
        npz(meta=npy(HUGE_SHAPE.replace("<f4", "|u1").replace(str(2**45), "9"), b"[[[[[[[[[")),
    ],
)
def test_a_trace_with_odd_arrays(content: bytes, words: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    line = call(*words(FILES["replay"])).error()
    assert line == f"{tmp_path / 'file'} is no trace of srwm-rl, or is damaged; srwm-rl watch --trace writes one"


@pytest.mark.parametrize("value", [LONG, "-1", str(2**40), "1e300", "1.5", "[[[[[[[[", '"x"', "null"])
@pytest.mark.parametrize("name", ["level", "seed", "n_levels", "attempts", "frame_stack"])
def test_a_trace_with_odd_numbers(
    name: str, value: str, words: Callable[..., list[str]], call: Any, trace: Path, tmp_path: Path
) -> None:
    with np.load(trace) as file:
        arrays = dict(file)
    meta = json.loads(arrays.pop("meta").tobytes())
    meta["scene"][name] = "VALUE"
    text = json.dumps(meta).replace('"VALUE"', value).encode()
    np.savez(tmp_path / "file", meta=np.frombuffer(text, np.uint8), **arrays)
    (tmp_path / "file.npz").rename(tmp_path / "file")
    assert str(tmp_path / "file") in call(*words(FILES["replay"])).error()


def test_a_trace_that_unpacks_to_gigabytes(words: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        for _ in range(2**10):
            file.write(bytes(2**20))
    assert (tmp_path / "file").stat().st_size < 2**21
    assert "is no trace of srwm-rl" in call(*words(FILES["replay"])).error()
