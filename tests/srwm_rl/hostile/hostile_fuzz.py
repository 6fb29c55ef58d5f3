"""Read files with random damage for some time: `hostile_fuzz.py FOLDER SECONDS [SEED]`.

Prints JSON: the counts of files read and refused, and every fault: anything but success or one clear line of error.
A fault names its file's number; the same seed makes the same files.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from hostile_corpus import Good  # the script's own folder is on Python's path

from srwm_rl import UserError, load
from srwm_rl.official import import_checkpoint
from srwm_rl.scripts.main import main as command
from srwm_rl.storage.safe_file import read_file, serialise

FOLDER, SECONDS = Path(sys.argv[1]), float(sys.argv[2])
SEED = int(sys.argv[3]) if len(sys.argv) > 3 else 0
LONGEST = 100  # seconds for one file
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    2**31,
    10**30,
    0.0,
    -0.5,
    1.5,
    "",
    "x",
    "os:system",
    [],
    {},
    [1],
)
EVAL = ("--no-progress", "--n-envs", "2", "--train-levels", "0:2", "--eval-levels", "100:102")
rng = random.Random(SEED)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Return every entry in a tree of dicts and lists, as container and key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [pair for key, child in items for pair in ((tree, key), *nodes(child))]


def change_tree(tree: Any) -> None:
    """Replace, delete, copy or swap some of what a tree holds."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = nodes(tree)
        if not places:
            return
        holder, key = rng.choice(places)
        source, source_key = rng.choice(places)
        act = rng.randrange(5)
        if act <= 1:
            holder[key] = deepcopy(rng.choice(ODD))
        elif act == 2 and isinstance(holder, dict):
            del holder[key]
        elif act == 3:
            holder[key] = deepcopy(source[source_key])
        elif isinstance(holder[key], int | float):
            holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 2, float(holder[key])))


def change_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Give one array other numbers, another shape, type or name."""
    name = rng.choice([*arrays])
    array = arrays[name]
    act = rng.randrange(6)
    if act == 0:
        arrays[name] = array.reshape(-1)
    elif act == 1:
        arrays[name] = array.astype(rng.choice(("float64", "float32", "int64", "uint8", "bool", "float16")))
    elif act == 2:
        arrays[name] = np.concatenate([array.reshape(-1)] * 2)[: rng.randrange(2 * array.size + 1)]
    elif act == 3:
        arrays[rng.choice([*arrays])] = arrays.pop(name)
    elif act == 4:
        del arrays[name]
    elif array.size and array.dtype.kind == "f":
        arrays[name] = array.copy()
        arrays[name].flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, 1e38, -1e38, 0.0))
    elif array.size:
        arrays[name] = np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(array.shape)


def change_bytes(data: bytes) -> bytes:
    """Change some bytes, cut the end off, or put a part in twice."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = rng.randrange(len(changed)) if changed else 0
        act = rng.randrange(8)
        if act == 0:
            del changed[at:]
        elif act == 1:
            changed[at:at] = changed[at : at + rng.randrange(64)]
        elif act == 2:
            del changed[at : at + rng.randrange(64)]
        elif changed:
            changed[at] = rng.choice((rng.randrange(256), changed[at] ^ 1 << rng.randrange(8), *b'0]}",e'))
    return bytes(changed)


def change_file(path: Path) -> bytes:
    """Return one of our files changed: its bytes, or its meaning with a sha256 that fits."""
    if rng.random() < 0.3:
        return change_bytes(path.read_bytes())
    while True:
        arrays, meta = deepcopy(read_file(path))
        if rng.random() < 0.5:
            change_arrays(arrays)
        if rng.random() < 0.8:
            change_tree(meta)
        try:
            return serialise(arrays, meta)
        except (ValueError, TypeError):
            continue


def change_config(path: Path) -> bytes:
    """Return a run's settings changed."""
    if rng.random() < 0.3:
        return change_bytes(path.read_bytes())
    config = json.loads(path.read_text())
    change_tree(config if rng.random() < 0.3 else config["train"])
    return json.dumps(config).encode()


def run(*argv: object) -> bool:
    """Run the command line; return whether it succeeded.

    Raises:
        AssertionError: it neither succeeded nor failed with one line of error.
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = command([str(word) for word in argv])
    message = errors.getvalue()
    fault = code == 3 and "Traceback" not in message  # a non-finite number, named in the message
    assert code == 0 or fault or (code == 2 and message.count("\n") <= 2), f"exit code {code}: {message}"
    return code == 0


def succeeds(read: Callable[..., object], *arguments: object) -> bool:
    """Read a file; return whether that succeeded."""
    with contextlib.suppress(UserError):
        read(*arguments)
        return True
    return False


def read_model(good: Good, path: Path) -> bool:
    """Read a changed model with srwm_rl.load and srwm-rl eval."""
    path.write_bytes(change_file(good.model))
    return succeeds(load, path) and run("eval", path, *EVAL)


def read_official(good: Good, path: Path) -> bool:
    """Import a changed official checkpoint."""
    path.write_bytes(change_bytes(good.official.read_bytes()))
    return succeeds(import_checkpoint, path, path.with_name("imported"))


def read_checkpoint(good: Good, path: Path) -> bool:
    """Resume a run from a changed checkpoint."""
    shutil.copytree(good.run, path)
    (checkpoint,) = (path / "checkpoints").glob("checkpoint-*")
    checkpoint.write_bytes(change_file(good.checkpoint))
    return run("train", "--resume", path, "-n", 128)


def read_config(good: Good, path: Path) -> bool:
    """Resume a run with changed settings."""
    shutil.copytree(good.run, path)
    (path / "config.json").write_bytes(change_config(good.run / "config.json"))
    return run("train", "--resume", path, "-n", 128)


READERS: tuple[Callable[[Good, Path], bool], ...] = (read_model, read_official, read_checkpoint, read_config)


def main() -> int:
    """Fuzz until the time is over."""
    good = Good(FOLDER / "good")
    deadline, number = time.monotonic() + SECONDS, 0
    counts: Counter[str] = Counter()
    faults: list[str] = []
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it hangs")))
    while time.monotonic() < deadline and len(faults) < 20:
        reader = READERS[number % len(READERS)]
        path = FOLDER / "at-work" / "it"
        path.parent.mkdir()
        signal.alarm(LONGEST)
        try:
            counts[f"{reader.__name__}: {'read' if reader(good, path) else 'refused'}"] += 1
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(
                f"{number}: {reader.__name__}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            )
        signal.alarm(0)
        shutil.rmtree(path.parent)
        number += 1
    print(json.dumps({"files": number, "counts": counts, "faults": faults}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
