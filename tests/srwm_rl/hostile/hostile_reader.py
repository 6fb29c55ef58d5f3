"""Give the hostile files to everything that reads files, under an audit hook: `hostile_reader.py FOLDER [WORD...]`.

A process of its own, for a hook stays for good. Prints JSON: how often each reader was asked, and what it did wrong.
With words, only the files whose names hold one of them are given.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import stat
import sys
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_payloads import MARK, MODULE  # the script's own folder is on Python's path

from srwm_rl import UserError, load
from srwm_rl.official import import_checkpoint
from srwm_rl.scripts.main import main as command

FOLDER = Path(sys.argv[1])
WORDS = [each for each in sys.argv[2:] if each != "--careless"]
CARELESS = "--careless" in sys.argv  # to see that the watch below sees
EVAL = ("--no-progress", "--n-envs", "2", "--train-levels", "0:2", "--eval-levels", "100:102")
FORBIDDEN = (
    "pickle.",
    "exec",
    "compile",
    "marshal.",
    "import",
    "code.",
    "ctypes.",
    "socket.",
    "subprocess.",
    "urllib.",
)
FORBIDDEN = (
    *FORBIDDEN,
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.",
    "http.",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CHANGES = (*CHANGES, "os.chown", "os.utime", "shutil.")
SPARE = 256 * 2**20
# What a reader may take, for it does not read it: the run's settings in a model, the rest of an official checkpoint.
UNREAD = {"load": ("-meta-config.",), "import": ("-torch-unread-",)}
own: Path | None = None  # the folder that the command at work may write in; None: no command is at work
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what must not happen while a file is read."""
    if own is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = bool(set("wax+") & set(mode or "")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and not isinstance(path, int) and not _is_own(path):  # a number: it is open already
            seen.append(f"open {path} {mode} {flags}")
    elif event.startswith(CHANGES):
        if not all(_is_own(each) for each in arguments if isinstance(each, str | bytes | Path)):
            seen.append(f"{event} {arguments}")
    elif event in ("exec", "compile") and sys._getframe(1).f_code.co_filename == typing.__file__:
        pass  # an annotation in our own code, which the command line's options are made of
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:200]}")


def _is_own(path: Any) -> bool:
    # Through a link, the place that it points at counts; the link itself, where it is replaced or deleted, does not.
    return own is not None and Path(os.path.realpath(os.path.dirname(os.fsdecode(path)))).is_relative_to(own)


def peak(reset: bool = False) -> int:
    """Return the most memory held since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(words: list[str]) -> Callable[[], str]:
    """Return a function that runs the command line and returns the one line with which it refuses; "": it did not."""

    def call() -> str:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = command(words)
        said = errors.getvalue()
        if code == 0:
            return ""
        fits = code == 2 and said.startswith("srwm-rl: error: ") and said.count("\n") == 1
        return said if fits else f"BAD exit code {code}: {said}"

    return call


def python(call: Callable[[], object]) -> Callable[[], str]:
    """Return a function that returns the `UserError` in which `call` ends; "": in none."""

    def outcome() -> str:
        try:
            call()
        except UserError as error:
            return f"{error}\n"
        return ""

    return outcome


def ask(call: Callable[[], str], name: str, size: int, writes: Path, harmless: bool = False) -> str | None:
    """Ask one reader; return what it did wrong."""
    global own
    seen.clear()
    before = peak(reset=True)
    own = writes
    try:
        said = call()
    except BaseException as error:
        own = None
        return f"{type(error).__name__}: {str(error)[:300]}"
    own = None
    if seen:
        return f"did {seen[:3]}"
    if peak() - before > 3 * size + SPARE:
        return f"took {(peak() - before) / 2**20:.0f} MB for {size} bytes"
    if said.startswith("BAD") or (not said and not harmless):
        return said or "took it"
    if said and (said.count("\n") != 1 or name not in said or len(said) > 2100 or "\x1b" in said):
        return f"unclear: {said!r}"
    return None


def readers(path: Path, run_folder: Path, shown: str) -> dict[str, tuple[Callable[[], str], Path, str]]:
    """Return what a file is given to, where that may write, and the name that its message must hold."""
    if CARELESS:
        return {"careless": (python(lambda: careless(path)), FOLDER / "nothing", shown)}
    imported = FOLDER / "imported"
    return {
        "load": (python(lambda: load(path)), FOLDER / "nothing", shown),
        "eval": (run(["eval", str(path), *EVAL]), FOLDER / "nothing", shown),
        "resume": (run(resume(run_folder)), run_folder, run_folder.name),
        "import": (python(lambda: import_checkpoint(path, imported)), FOLDER, shown),
    }


def careless(path: Path) -> None:
    """Read a file as one must not."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data) * 3
    elif data:
        pickle.loads(data)


def resume(run_folder: Path) -> list[str]:
    """Return the command line that goes on with a run for one more update."""
    return ["train", "--resume", str(run_folder), "-n", "128"]


def run_around(path: Path, run_folder: Path) -> int:
    """Make a run folder whose one checkpoint is the given file, link, pipe or folder; return its size."""
    shutil.copytree(FOLDER / "good" / "run", run_folder, ignore=shutil.ignore_patterns("*.safetensors"))
    place = run_folder / "checkpoints" / "checkpoint-000000000064.safetensors"
    if path.is_symlink():
        place.symlink_to(os.readlink(path))
    elif path.is_dir():
        shutil.copytree(path, place)
    elif path.exists() and stat.S_ISFIFO(path.stat().st_mode):
        os.mkfifo(place)
    elif path.exists():
        os.link(path, place)
        return path.stat().st_size
    return 0


def give_file(path: Path, counts: Counter[str]) -> list[str]:
    """Give a file to every reader; return what they did wrong."""
    run_folder = FOLDER / "run-around"
    size = run_around(path, run_folder)
    wrong = []
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in path.name)
    for reader, (call, writes, name) in readers(path, run_folder, shown).items():
        found = ask(call, name, size, writes, any(each in path.name for each in UNREAD.get(reader, ())))
        counts[reader] += 1
        if found:
            wrong.append(f"{reader} {path.name!r}: {found}")
    left = {each.name for each in run_folder.rglob("*")} - {
        "config.json",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
    }
    if odd := {each for each in left if not each.startswith(("checkpoint-", "events.", ".lock", ".metadata"))}:
        wrong.append(f"{path.name!r}: {odd} were left in the run")
    shutil.rmtree(FOLDER / "imported", ignore_errors=True)
    shutil.rmtree(run_folder)
    return wrong


def warm_up() -> None:
    """Let everything be imported that is imported late."""
    for words in (["eval", str(FOLDER / "good" / "model"), *EVAL], resume(FOLDER / "good" / "run")):
        folder = shutil.copytree(FOLDER / "good", FOLDER / "warm")
        words = [word.replace(str(FOLDER / "good"), str(folder)) for word in words]
        assert (said := run(words)()) == "", said
        shutil.rmtree(folder)
    import_checkpoint(FOLDER / "good" / "official.tar", FOLDER / "imported")
    shutil.rmtree(FOLDER / "imported")
    "x".encode("cp437")
    for name in ("coinrun", "no-such-v0"):
        run(["train", "--env", name, "--dry-run"])()


def main() -> int:
    """Ask everybody about everything."""
    os.chdir(FOLDER)
    sys.path.append(str(FOLDER / "canary"))
    sys.addaudithook(watch)
    warm_up()
    # A gigabyte too many is a fault to report, and no reason to take the machine down.
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    counts: Counter[str] = Counter()
    wrong = []
    chosen = [each for part in ("files", "runs") for each in sorted((FOLDER / part).iterdir())]
    for path in (each for each in chosen if not WORDS or any(word in each.name for word in WORDS)):
        if path.parent.name == "files":
            wrong += give_file(path, counts)
        else:
            found = ask(run(resume(path)), path.name, 2**20, path)
            counts["resume a folder"] += 1
            wrong += [f"resume {path.name!r}: {found}"] if found else []
        if (FOLDER / MARK).exists() or MODULE in sys.modules:
            wrong.append(f"{path.name!r}: it was run!")
            (FOLDER / MARK).unlink(missing_ok=True)
            sys.modules.pop(MODULE, None)
    print(json.dumps({"counts": counts, "wrong": wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
