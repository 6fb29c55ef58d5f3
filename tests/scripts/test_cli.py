"""Parsing a command line: misspelt and repeated options, odd values, narrow terminals, paths that are no UTF-8."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.scripts.cli import peek, write_output
from srwm_rl.storage.safe_file import write_whole


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--learning_rat", "--learning-rate"),
        ("--bs", "--batch-size"),
        ("--total-timesteps", "--n-timesteps"),
        ("--num-envs", "--n-envs"),
        ("--epochs", "--n-epochs"),
        ("--log-dir", "--log-folder"),
        ("--resume-from", "--resume"),
        ("--hepl", "--help"),
    ],
)
def test_a_misspelt_option_names_the_one_that_is_meant(option: str, meant: str, call: Any) -> None:
    assert call("train", option, 1).error().startswith(f"unknown option {option!r}; did you mean '{meant}'?")


@pytest.mark.parametrize("option", ["--gpu", "--hidden-size", "--qqq"])
def test_an_option_that_resembles_none_gets_no_guess(option: str, call: Any) -> None:
    assert call("train", option, 1).error() == f"unknown option {option!r}; see srwm-rl train --help"


def test_a_repeated_option_is_refused_in_words_that_fit_it(call: Any) -> None:
    line = call("eval", "run", "--freeze-edits", 1, "--freeze-edits", 2).error()
    assert line == "--freeze-edits is given twice; give it once"
    line = call("train", "--inputs", "action", "--inputs", "reward").error()
    assert line == "--inputs is given twice; give it once, with all its values"


def test_a_value_that_begins_with_a_dash(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    line = call("train", *recall_argv, "-f", "-x").error()
    assert line == "unknown option '-x'; if it is the value of -f, write -f=-x"


@pytest.mark.parametrize("how", ["-f=-x", "--log-folder=-x", "./-x"])
def test_the_commands_printed_for_a_folder_with_a_dash_work(
    how: str, call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("train", *recall_argv, "-n", 64, *((how,) if "=" in how else ("-f", how)))
    command = done.out.rpartition("Now: srwm-rl ")[2].split()
    assert command == ["eval", "./-x/ppo_srwm/recall_1"]
    assert call(*command, "--no-progress").code == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--seed", "9" * 5000), "--seed takes a number of fewer digits; see srwm-rl train --help"),
        (("--seed", "9" * 400), f"--seed must lie in [0, 2147483647], not {'9' * 30}; see srwm-rl train --help"),
        (("--learning-rate", "1e400"), "--learning-rate must lie in [0, 1000], not inf; see srwm-rl train --help"),
        (("--env-kwargs", f"n:{'9' * 5000}"), "recall has no setting 'n'; known: delay, n_symbols"),
        (("--env-kwargs", f"n:{'[' * 100_000}"), "recall has no setting 'n'; known: delay, n_symbols"),
    ],
)
def test_numbers_and_texts_of_any_length(
    argv: tuple[str, ...], message: str, call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    assert call("train", *recall_argv, "-f", tmp_path, *argv).error() == message


def test_a_path_that_is_no_utf_8_is_refused(recall_argv: list[str], untouched: Path) -> None:
    folder = os.path.join(os.fsencode(untouched), b"\xff\xfe")
    command = [sys.executable, "-m", "srwm_rl", "train", *recall_argv, "-n", "64", "-f", folder]
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 2
    assert b"is no UTF-8 text; a path can be given from a folder inside of it" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("columns", ["1", "5", "30", "-3", "x", "1000000"])
def test_help_ends_on_a_terminal_of_any_width(columns: str) -> None:
    command = [sys.executable, "-m", "srwm_rl", "eval", "--help"]
    environment = {**os.environ, "COLUMNS": columns}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert 40 < len(lines) < 1000
    if columns in ("1", "5", "30"):
        assert {len(line) for line in lines if line.startswith("│")} == {40}


def test_the_width_of_the_terminal_is_left_as_it_was(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    assert call("doctor", "--help").code == 0
    assert os.environ["COLUMNS"] == "5"


@contextmanager
def full_disk() -> Iterator[None]:
    """Within it this process, pytest included, writes no files of more than 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_output_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path, new = tmp_path / "file", tmp_path / "new"
    write_output(path, bytes(2000))
    for file in (path, new):
        with full_disk(), pytest.raises(OSError, match="File too large") as caught:
            write_output(file, bytes(3000))
        assert caught.value.filename == str(file)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == bytes(2000)


def test_an_output_is_written_through_links_and_into_pipes_and_devices(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_output(link, b"new")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, b"new")
    assert (os.read(reader, 10), pipe.is_fifo()) == (b"new", True)
    os.close(reader)
    with pytest.raises(OSError, match="it is no regular file, and is not replaced by one"):
        write_whole(pipe, b"new")
    write_output("/dev/null", b"new")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_output("/dev/full", b"new")
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("option", [("eval", "RUN", "--json"), ("report", "RUN", "--eval", "JSON", "-o")])
def test_results_that_cannot_be_written_are_an_error(
    option: tuple[str, ...], call: Any, recall: Path, tmp_path: Path
) -> None:
    results = tmp_path / "eval.json"
    assert call("eval", recall, "--no-progress", "--json", results).code == 0
    words = [{"RUN": recall, "JSON": results}.get(word, word) for word in option]
    assert call(*words, "/dev/full", "--no-progress").error() == "/dev/full: No space left on device"


@pytest.mark.parametrize("argv", [["--init-from", "x"], ["--init_from", "x"], ["--init_from=x"], ["-i", "x"]])
def test_an_option_is_seen_in_every_spelling(argv: list[str]) -> None:
    assert peek(["--env", "recall", *argv, "--seed", "1"], "--init-from", "-i") == "x"
