"""Untrusted files of safetensors and one JSON text: written atomically, checked on every load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as make_safetensors

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.storage.strict_json import MAX_BYTES as MAX_HEADER_BYTES
from srwm_rl.storage.strict_json import parse_json

# One metadata key: safetensors writes several in random order, so that equal contents would give different files.
_KEY = "srwm_rl"
TEMPORARY = ".tmp-"
MAX_BYTES = 2**32
MAX_ARRAYS = 2**16
# The types that numpy has.
DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64"}
_ONLY_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_CHUNK = 2**20


def write_file(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and JSON data to `path` atomically: a reader sees the old file or the whole new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old file is untouched.
        UserError: `read_file` would refuse the file, as `serialise` says.
    """
    write_whole(path, serialise(arrays, meta))


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush, read back and compare, then rename.

    A link at `path` is replaced; its target is not written.

    Raises:
        OSError: it cannot be written, or other bytes are read back; the old file is untouched.
    """
    publish(stage(path, content), path)


def temporary_path(path: Path) -> Path:
    """Return a name beside `path` of this call's own: threads, and containers with equal process ids, may write one."""
    return path.with_name(f"{TEMPORARY}{token_hex(4)}-{path.name}")


def stage(path: Path, content: bytes) -> Path:
    """Write `content` beside `path` under a temporary name, flush, read back and compare; return that name.

    Raises:
        OSError: as `write_whole`; nothing is left behind.
    """
    temporary = temporary_path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_symlink():
            raise OSError(errno.EINVAL, "it is no regular file, and is not replaced by one", str(path))
        with os.fdopen(os.open(temporary, _ONLY_NEW, 0o666), "w+b") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # drop the page cache, so that the disk is read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            same = all(file.read(_CHUNK) == content[i : i + _CHUNK] for i in range(0, len(content), _CHUNK))
            if not same or file.read(1):
                raise OSError(errno.EIO, "the disk returned other bytes than were written", str(path))
    except OSError as error:
        error.filename = str(path)  # none where a write fails
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Rename what `stage` wrote.

    Raises:
        OSError: it cannot be renamed; nothing is left behind.
    """
    try:
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def serialise(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> bytes:
    """Return the file's content: equal arguments give equal bytes.

    Raises:
        UserError: `read_file` would refuse it: it is too large, an array's type is not among `DTYPES` in this machine's
            byte order, or JSON would change `meta`.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in contiguous.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or not array.dtype.isnative:
            raise UserError(f"the array {name!r:.120} cannot be written: its type is {array.dtype.str}")
    text = json.dumps({"meta": meta, "sha256": _digest(contiguous, meta)}, sort_keys=True, allow_nan=False)
    blob: bytes = make_safetensors(contiguous, metadata={_KEY: text})
    size = int.from_bytes(blob[:8], "little")
    if size > MAX_HEADER_BYTES or len(blob) > MAX_BYTES or len(arrays) > MAX_ARRAYS:
        raise UserError(f"{len(arrays):,} arrays of {len(blob):,} bytes are too much for one file; use fewer n_envs")
    check_content(blob)
    return blob


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `write_file` and check its content against its sha256.

    Sizes are checked before anything is allocated; it takes about three times the file's size in memory.

    Raises:
        UserError: the file is missing, no regular file, foreign or damaged.
    """
    blob = read_small(path, MAX_BYTES)
    if blob.startswith(b"PK\x03\x04"):
        raise UserError(
            f"{path} is no srwm-rl file: it is a zip archive, as model.save() of Stable-Baselines3 writes it, and "
            "reading it can run code; if you trust it, use srwm-rl eval --trust"
        )
    try:
        content = _read_header(blob)
        arrays = parse_safetensors(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        is_ours = type(error) is ValueError and str(error).startswith("it")
        reason = error if is_ours else "its header cannot be read"
        raise UserError(f"{path} is no srwm-rl file, or is damaged: {reason}; use another checkpoint") from error
    if content["sha256"] != _digest(arrays, content["meta"]):
        raise UserError(f"{path} is damaged: its content does not match its sha256; use another checkpoint")
    return arrays, content["meta"]


def check_content(blob: bytes) -> dict[str, Any]:
    """Return the JSON data in what `serialise` returned, as `read_file` will: its limits hold for every file.

    Raises:
        UserError: it will refuse the file.
    """
    try:
        meta: dict[str, Any] = _read_header(blob)["meta"]
    except ValueError as error:
        raise UserError(f"{error}; use fewer n_envs, or an observation space with fewer parts") from error
    return meta


def _read_header(blob: bytes) -> dict[str, Any]:
    """Return our JSON from safetensors' header; the header's sizes and types are checked."""
    header_size = int.from_bytes(blob[:8], "little")
    if header_size > len(blob) - 8:
        raise ValueError("it is cut off, or of another format")
    header = parse_json(blob[8 : 8 + header_size])
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {_KEY}:
        raise ValueError("it has no metadata of srwm-rl")
    if len(header) > MAX_ARRAYS:
        raise ValueError(f"it has {len(header):,} arrays, more than the {MAX_ARRAYS:,} that are read")
    if not all(isinstance(array, dict) and array.get("dtype") in DTYPES for array in header.values()):
        raise ValueError("it has an array of a type that srwm-rl never writes")
    text = metadata[_KEY]
    content = parse_json(text.encode()) if isinstance(text, str) else None
    if not isinstance(content, dict) or content.keys() != {"meta", "sha256"} or not isinstance(content["meta"], dict):
        raise ValueError("its metadata is not srwm-rl's")
    if json.dumps(content, sort_keys=True) != text:  # a flipped bit may turn 1e-05 into 1E-05, unseen by the checksum
        raise ValueError("its metadata is not as srwm-rl writes it")
    return content


def _digest(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(tree: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Split a tree of dicts, lists, numbers, texts, None, arrays and bytes into arrays by path and a JSON tree."""
    arrays: dict[str, np.ndarray] = {}

    def split(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {key: split(value, f"{path}/{key}") for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [split(value, f"{path}/{i}") for i, value in enumerate(node)]
        if isinstance(node, bytes | np.ndarray):
            arrays[path] = np.frombuffer(node, np.uint8) if isinstance(node, bytes) else node
            return {"$bytes" if isinstance(node, bytes) else "$array": path}
        return node.item() if isinstance(node, np.generic) else node

    return arrays, split(tree, "")


def unpack(arrays: dict[str, np.ndarray], node: Any) -> Any:
    """Undo `pack`; tuples come back as lists.

    Raises:
        UserError: the tree names an array that does not exist.
    """
    if isinstance(node, list):
        return [unpack(arrays, value) for value in node]
    if not isinstance(node, dict):
        return node
    if node.keys() not in ({"$bytes"}, {"$array"}):
        return {key: unpack(arrays, value) for key, value in node.items()}
    ((kind, name),) = node.items()
    if not isinstance(name, str) or name not in arrays:
        raise UserError(f"it is damaged: it has no array {name!r:.120}")
    return arrays[name].tobytes() if kind == "$bytes" else arrays[name]
