"""Files that nobody has to trust: safetensors and one JSON text, written whole or not at all, checked on every load."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as make_safetensors

from srwm_rl.errors import UserError

# One metadata key only: safetensors writes several in random order, and equal contents would differ between processes.
_KEY = "srwm_rl"
TEMPORARY = ".tmp-"


def write_file(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and JSON data to `path` so that a reader sees the old state or the whole new file, never a part.

    Serialised in memory, written under a temporary name that no reader matches, flushed to the disk, then renamed.

    Raises:
        OSError: the disk is full, or the folder cannot be written; whatever stood at `path` is untouched.
    """
    blob = serialise(arrays, meta)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def serialise(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> bytes:
    """Return the file's content: equal arguments give equal bytes."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps({"meta": meta, "sha256": _digest(contiguous, meta)}, sort_keys=True, allow_nan=False)
    blob: bytes = make_safetensors(contiguous, metadata={_KEY: text})
    return blob


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_file` wrote and check its content against its sha256.

    Raises:
        UserError: the file is missing, foreign or damaged.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        header_size = int.from_bytes(blob[:8], "little")
        text = json.loads(blob[8 : 8 + header_size])["__metadata__"][_KEY]
        content = json.loads(text)
        arrays = parse_safetensors(blob)
        intact = content["sha256"] == _digest(arrays, content["meta"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no srwm-rl file, or is damaged; use another checkpoint") from error
    if not intact:
        raise UserError(f"{path} is damaged: its content does not match its sha256; use another checkpoint")
    return arrays, content["meta"]


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
    return arrays, _pack(tree, "", arrays)


def _pack(node: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(node, dict):
        return {key: _pack(each, f"{path}/{key}", arrays) for key, each in node.items()}
    if isinstance(node, list | tuple):
        return [_pack(each, f"{path}/{i}", arrays) for i, each in enumerate(node)]
    if isinstance(node, bytes):
        arrays[path] = np.frombuffer(node, np.uint8)
        return {"$bytes": path}
    if isinstance(node, np.ndarray):
        arrays[path] = node
        return {"$array": path}
    return node.item() if isinstance(node, np.generic) else node


def unpack(arrays: dict[str, np.ndarray], node: Any) -> Any:
    """Undo `pack`; tuples come back as lists."""
    if isinstance(node, list):
        return [unpack(arrays, each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$bytes"}:
        return arrays[node["$bytes"]].tobytes()
    if node.keys() == {"$array"}:
        return arrays[node["$array"]]
    return {key: unpack(arrays, each) for key, each in node.items()}
