"""Import damaged checkpoints by the hundred, under an audit hook: `fuzz_official.py FOLDER GOLDEN [N]`.

A separate process, because an audit hook cannot be removed. It fails if an import ends in anything but a run or a
`UserError`, or if anything is run, imported, compiled, connected to or written elsewhere meanwhile.
"""

import os
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import official_checkpoints  # the script's own folder is on Python's path

from srwm_rl import UserError
from srwm_rl.official import import_checkpoint

FORBIDDEN = ("import", "exec", "compile", "pickle.", "os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn")
FORBIDDEN = (*FORBIDDEN, "socket.", "subprocess.", "ctypes.", "urllib.", "code.", "marshal.")
OPERATIONS = b".0()]}abceilopqrstuBCGIKMNQRTUVX\x80\x81\x85\x86\x87\x88\x92\x93"
FOLDER, GOLDEN = Path(sys.argv[1]), Path(sys.argv[2])
N_EACH = int(sys.argv[3]) if len(sys.argv) > 3 else 200
CHECKPOINT = FOLDER / "model.tar"
rng = random.Random(0)
armed = False
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Record forbidden events while a file is imported."""
    if not armed:
        return
    # Opening by number only wraps a descriptor that was opened by name before, which is an event of its own.
    by_name = event == "open" and not isinstance(arguments[0], int)
    flags = arguments[2] if by_name else 0
    writing = by_name and ("w" in str(arguments[1]) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    writes = writing and not str(arguments[0]).startswith(str(FOLDER))
    if writes or event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:100]}")


def attempt(name: str) -> bool:
    """Import the checkpoint; return whether that succeeded."""
    try:
        import_checkpoint(CHECKPOINT, FOLDER / name)
    except UserError as error:
        if "\n" in str(error):
            seen.append(str(error))
        return False
    return True


def damage(data: bytes) -> bytes:
    """Change some bytes, often to pickle opcodes, and sometimes cut off the end."""
    changed = bytearray(data)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    for _ in range(rng.choice((0, 1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.choice(OPERATIONS) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(changed)


def small_agents() -> list[dict[str, bytes]]:
    """Return the members of a small checkpoint of every kind; importing them also triggers all late imports."""
    b"x".decode("cp437")  # zipfile takes this codec of Python's for names without a flag
    agents = []
    for core in official_checkpoints.OPTIONS:
        official_checkpoints.make_checkpoint(CHECKPOINT, core)
        assert attempt(core)
        with zipfile.ZipFile(CHECKPOINT) as archive:
            agents.append({name: archive.read(name) for name in archive.namelist()})
    return agents


def damage_file(whole: bytes, number: int) -> None:
    """Damage the archive itself: its checksums, its members' table at the end, its weights."""
    table = len(whole) - 12_000
    CHECKPOINT.write_bytes(whole[:table] + damage(whole[table:]) if number % 2 else damage(whole))


def damage_meaning(members: dict[str, bytes]) -> None:
    """Damage a member, mostly the pickle, with checksums that fit."""
    names = [name for name in members if name.endswith("data.pkl") or rng.random() < 0.01]
    with zipfile.ZipFile(CHECKPOINT, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, damage(data) if name in names else data)


def main() -> int:
    """Run all; return the exit code."""
    global armed
    sys.addaudithook(watch)
    agents, whole = small_agents(), GOLDEN.read_bytes()
    taken = [0, 0]
    for number in range(2 * N_EACH):
        if number % 2:
            damage_file(whole, number // 2)
        else:
            damage_meaning(rng.choice(agents))
        armed = True
        taken[number % 2] += attempt("run")
        armed = False
        shutil.rmtree(FOLDER / "run", ignore_errors=True)
    print(f"taken {taken} of {N_EACH} each; forbidden: {seen[:5]}")
    return bool(seen) or not all(0 < count < N_EACH for count in taken)


if __name__ == "__main__":
    sys.exit(main())
