"""Files that a user names: regular ones only, and a bound on what is read of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srwm_rl import UserError, regular_file
from srwm_rl.regular_file import read_end, read_lines, read_small, read_start

READERS: dict[str, Callable[[Path], Any]] = {
    "small": lambda path: read_small(path, 100),
    "start": lambda path: read_start(path, 4),
    "end": lambda path: read_end(path, 4),
    "lines": lambda path: list(read_lines(path, 100)),
}


@pytest.fixture
def odd(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes what is no regular file."""

    def make(kind: str) -> Path:
        path = tmp_path / "odd"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        return path

    return make


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "loop", "missing"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, reader: str, odd: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"cannot read .*odd: "):
        READERS[reader](odd(kind))


@pytest.mark.parametrize("reader", READERS)
def test_a_name_that_no_file_has(reader: str) -> None:
    with pytest.raises(UserError, match="no file has such a name"):
        READERS[reader](Path("a\0b"))


def test_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\r\nthree")
    assert read_small(path, 14) == b"one\ntwo\r\nthree"
    assert list(read_lines(path, 14)) == [b"one\n", b"two\r\n", b"three"]
    assert (read_start(path, 4), read_end(path, 4)) == (b"one\n", b"hree")
    assert (read_start(path, 99), read_end(path, 99)) == (path.read_bytes(), path.read_bytes())
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_small(link, 14) == path.read_bytes()
    path.write_bytes(b"")
    for read in (read_small, read_start, read_end, lambda *args: b"".join(read_lines(*args))):
        assert read(path, 10) == b""


def test_long_files_and_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for reader in (read_small, lambda *args: list(read_lines(*args))):
        with pytest.raises(UserError, match=r"it has 1,099,511,627,776 bytes, more than the 1,000 that are read"):
            reader(path, 1000)
    assert read_start(path, 3) == read_end(path, 3) == bytes(3)
    monkeypatch.setattr(regular_file, "MAX_LINE_BYTES", 10)
    path.write_bytes(b"0123456789\n")
    with pytest.raises(UserError, match="it has a line of more than 10 bytes"):
        list(read_lines(path, 100))
    path.write_bytes(b"012345678\n012345678\n")
    assert len(list(read_lines(path, 100))) == 2


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_put_in_the_place_of_a_checked_file_is_not_waited_for(
    reader: str, odd: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, flags = odd("pipe"), list[int]()
    file = pipe.with_name("file")
    file.write_bytes(b"")
    status, opened = file.stat(), os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda _: status)
        patch.setattr(os, "open", lambda path, flag: flags.append(flag) or opened(path, flag | os.O_NONBLOCK))
        with pytest.raises(UserError, match="it is no regular file"):
            READERS[reader](pipe)
    assert flags[0] & os.O_NONBLOCK
