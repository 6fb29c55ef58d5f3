"""Read the hostile files with every reader under an audit hook: `hostile_reader.py FOLDER [WORD...]`.

A separate process, because an audit hook cannot be removed. Prints JSON: calls per reader, and their faults.
With words, only the files whose names contain one of them are read.
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
WORDS = [word for word in sys.argv[2:] if word != "--unsafe"]
UNSAFE = "--unsafe" in sys.argv  # to test the audit hook itself
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
# Parts that a reader ignores and so accepts: the run's settings in a model, those of a CNN without images, the rest of
# an official checkpoint.
UNREAD = {"load": ("-meta-config.", "-unused-cnn"), "eval": ("-unused-cnn",), "import": ("-torch-unread-",)}
own: Path | None = None  # the folder that the running command may write in; None: no command is running
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Record forbidden events while a file is read."""
    if own is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = bool(set("wax+") & set(mode or "")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and not isinstance(path, int) and not _is_own(path):  # a number is a descriptor: open already
            seen.append(f"open {path} {mode} {flags}")
    elif event.startswith(CHANGES):
        if not all(_is_own(path) for path in arguments if isinstance(path, str | bytes | Path)):
            seen.append(f"{event} {arguments}")
    elif event in ("exec", "compile") and sys._getframe(1).f_code.co_filename == typing.__file__:
        pass  # annotations of our settings, evaluated by typing for the command line
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:200]}")


def _is_own(path: Any) -> bool:
    # For writes through a link, its target counts; the link itself may be replaced or deleted.
    return own is not None and Path(os.path.realpath(os.path.dirname(os.fsdecode(path)))).is_relative_to(own)


def peak(reset: bool = False) -> int:
    """Return the peak memory since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(argv: list[str]) -> Callable[[], str]:
    """Return a function that runs the command line and returns its one line of error; "": it succeeded."""

    def call() -> str:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = command(argv)
        message = errors.getvalue()
        if code == 0:
            return ""
        fits = code == 2 and message.startswith("srwm-rl: error: ") and message.count("\n") == 1
        return message if fits else f"BAD exit code {code}: {message}"

    return call


def python(call: Callable[[], object]) -> Callable[[], str]:
    """Return a function that runs `call` and returns its `UserError`'s message; "": none."""

    def outcome() -> str:
        try:
            call()
        except UserError as error:
            return f"{error}\n"
        return ""

    return outcome


def run_reader(call: Callable[[], str], name: str, size: int, writes: Path, harmless: bool = False) -> str | None:
    """Run one reader; return its fault, or ""."""
    global own
    seen.clear()
    before = peak(reset=True)
    own = writes
    try:
        message = call()
    except BaseException as error:
        own = None
        return f"{type(error).__name__}: {str(error)[:300]}"
    own = None
    if seen:
        return f"did {seen[:3]}"
    if peak() - before > 3 * size + SPARE:
        return f"took {(peak() - before) / 2**20:.0f} MB for {size} bytes"
    if message.startswith("BAD") or (not message and not harmless):
        return message or "took it"
    if message and (message.count("\n") != 1 or name not in message or len(message) > 2100 or "\x1b" in message):
        return f"unclear: {message!r}"
    return None


def readers(path: Path, run_folder: Path, shown: str) -> dict[str, tuple[Callable[[], str], Path, str]]:
    """Return for each reader its call, the folder it may write in, and the name that its message must contain."""
    if UNSAFE:
        return {"unsafe": (python(lambda: read_unsafely(path)), FOLDER / "nothing", shown)}
    imported = FOLDER / "imported"
    return {
        "load": (python(lambda: load(path)), FOLDER / "nothing", shown),
        "eval": (run(["eval", str(path), *EVAL]), FOLDER / "nothing", shown),
        "resume": (run(resume(run_folder)), run_folder, run_folder.name),
        "import": (python(lambda: import_checkpoint(path, imported)), FOLDER, shown),
    }


def read_unsafely(path: Path) -> None:
    """Read a file unsafely."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data) * 3
    elif data:
        pickle.loads(data)


def resume(run_folder: Path) -> list[str]:
    """Return the command line that resumes a run for one more update."""
    return ["train", "--resume", str(run_folder), "-n", "128"]


def run_around(path: Path, run_folder: Path) -> int:
    """Make a run folder whose only checkpoint is `path`: a file, link, pipe or folder; return its size."""
    shutil.rmtree(run_folder, ignore_errors=True)  # of a reader that was killed
    shutil.copytree(FOLDER / "good" / "run", run_folder, ignore=shutil.ignore_patterns("*.safetensors"))
    target = run_folder / "checkpoints" / "checkpoint-000000000064.safetensors"
    if path.is_symlink():
        target.symlink_to(os.readlink(path))
    elif path.is_dir():
        shutil.copytree(path, target)
    elif path.exists() and stat.S_ISFIFO(path.stat().st_mode):
        os.mkfifo(target)
    elif path.exists():
        os.link(path, target)
        return path.stat().st_size
    return 0


def check_file(path: Path, counts: Counter[str]) -> list[str]:
    """Read a file with every reader; return the faults."""
    run_folder = FOLDER / "run-around"
    size = run_around(path, run_folder)
    wrong = []
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in path.name)
    for reader, (call, writes, name) in readers(path, run_folder, shown).items():
        fault = run_reader(call, name, size, writes, any(part in path.name for part in UNREAD.get(reader, ())))
        counts[reader] += 1
        if fault:
            wrong.append(f"{reader} {path.name!r}: {fault}")
    left = {file.name for file in run_folder.rglob("*")} - {
        "config.json",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
    }
    if odd := {name for name in left if not name.startswith(("checkpoint-", "events.", ".lock", ".metadata"))}:
        wrong.append(f"{path.name!r}: {odd} were left in the run")
    shutil.rmtree(FOLDER / "imported", ignore_errors=True)
    shutil.rmtree(run_folder)
    return wrong


def warm_up() -> None:
    """Trigger all late imports before the audit."""
    for argv in (["eval", str(FOLDER / "good" / "model"), *EVAL], resume(FOLDER / "good" / "run")):
        folder = shutil.copytree(FOLDER / "good", FOLDER / "warm")
        argv = [word.replace(str(FOLDER / "good"), str(folder)) for word in argv]
        assert (message := run(argv)()) == "", message
        shutil.rmtree(folder)
    import_checkpoint(FOLDER / "good" / "official.tar", FOLDER / "imported")
    shutil.rmtree(FOLDER / "imported")
    "x".encode("cp437")
    for name in ("coinrun", "no-such-v0"):
        run(["train", "--env", name, "--dry-run"])()


def main() -> int:
    """Read every file with every reader."""
    os.chdir(FOLDER)
    sys.path.append(str(FOLDER / "canary"))
    sys.addaudithook(watch)
    warm_up()
    # Excess memory is reported as a fault; the limit only protects the machine.
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    counts: Counter[str] = Counter()
    wrong = []
    paths = [path for part in ("files", "runs") for path in sorted((FOLDER / part).iterdir())]
    for path in (path for path in paths if not WORDS or any(word in path.name for word in WORDS)):
        if path.parent.name == "files":
            wrong += check_file(path, counts)
        else:
            fault = run_reader(run(resume(path)), path.name, 2**20, path)
            counts["resume a folder"] += 1
            wrong += [f"resume {path.name!r}: {fault}"] if fault else []
        if (FOLDER / MARK).exists() or MODULE in sys.modules:
            wrong.append(f"{path.name!r}: it was run!")
            (FOLDER / MARK).unlink(missing_ok=True)
            sys.modules.pop(MODULE, None)
    print(json.dumps({"counts": counts, "wrong": wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
