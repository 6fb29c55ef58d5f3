"""Traces: a recording in a few kilobytes, with what it takes to play it again."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.scripts.video.panel import RATE_LABELS, choice_names
from srwm_rl.scripts.video.scene import Scene
from srwm_rl.storage.safe_file import TEMPORARY

FORMAT = 1
_META = "meta"  # JSON, as bytes: an array of text would be four times as large
MAX_BYTES = 1 << 30
ABOUT = {
    **dict.fromkeys(("run", "core", "game", "levels", "eval_levels"), str),
    "num_timesteps": int,
    "deterministic": bool,
}
KINDS = {
    **dict.fromkeys(("rewards", "values", "entropy"), "f"),
    **dict.fromkeys(("starts", "dones"), "b"),
    **dict.fromkeys(("solved", "levels"), "i"),
    "links": "u",
}
"""Arrays `[T]`, and the kind of their numbers; the others have more axes."""


@dataclass(frozen=True)
class Trace:
    """A recording.

    Attributes:
        scene: what was played.
        arrays: what `srwm_rl.agents.evaluation.recording.collect` gave, and `links` `[T]`, the running digest of what was seen.
        digest: the sha256 over all observations.
        action_space: of the agent.
        observation_space: of the agent.
        versions: distribution -> version that the environment came from.
        about: `ABOUT`, for the titles.
    """

    scene: Scene
    arrays: dict[str, npt.NDArray[Any]]
    digest: str
    action_space: spaces.Space[Any]
    observation_space: spaces.Space[Any]
    versions: dict[str, str]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the trace, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        from srwm_rl.storage.space_json import space_to_json

        meta = {
            "format": FORMAT,
            "kind": "trace",
            "scene": self.scene.to_json(),
            "sha256": self.digest,
            "action_space": space_to_json(self.action_space),
            "observation_space": space_to_json(self.observation_space),
            "versions": self.versions,
            "about": self.about,
        }
        text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        content = io.BytesIO()
        np.savez_compressed(content, **{_META: text, **self.arrays})
        unfinished = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            unfinished.write_bytes(content.getvalue())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def load_trace(path: Path) -> Trace:
    """Read a trace, without executing anything in it.

    Raises:
        UserError: it is missing, foreign, damaged, or of a newer format.
    """
    try:
        arrays, meta = _read(path)
        if meta["kind"] != "trace":
            raise ValueError("kind")
        if meta["format"] > FORMAT:
            raise UserError(f"{path} has format {meta['format']}; upgrade srwm-rl, which reads up to {FORMAT}")
        return _understand(arrays, meta)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, IndexError) as error:
        raise UserError(f"{path} is no trace of srwm-rl, or is damaged; srwm-rl watch --trace writes one") from error


def _read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(each.file_size for each in archive.infolist()) > MAX_BYTES:
                raise ValueError("size")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return arrays, json.loads(arrays.pop(_META).tobytes())


def _understand(arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> Trace:
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.storage.space_json import space_from_json

    n_steps = len(arrays["rewards"])
    action_space, observation_space = (space_from_json(meta[f"{kind}_space"]) for kind in ("action", "observation"))
    _check_arrays(arrays, n_steps, action_space)
    scene = Scene.from_json(meta["scene"])
    if scene.n_levels > n_steps:
        raise ValueError("n_levels")
    about = {key: meta["about"][key] for key in ABOUT}
    if any(type(about[key]) is not kind for key, kind in ABOUT.items()):
        raise ValueError("about")
    for key in ("levels", "eval_levels"):
        LevelRange.parse(about[key])
    versions = {str(name): str(version) for name, version in meta["versions"].items()}
    return Trace(scene, arrays, str(meta["sha256"]), action_space, observation_space, versions, about)


def _check_arrays(arrays: dict[str, npt.NDArray[Any]], n_steps: int, space: spaces.Space[Any]) -> None:
    """Raise a ValueError or KeyError unless the arrays are those of T steps."""
    columns, heads = (n_steps, len(choice_names(space, False))), arrays["edit"].shape
    shapes: dict[str, Any] = {**dict.fromkeys(KINDS, (n_steps,)), "choices": columns, "edit": heads, "drift": heads}
    optional = {"rates": (*heads, len(RATE_LABELS)), "std": columns}
    if not n_steps or len(heads) != 3 or heads[0] != n_steps or not {*shapes, "actions"} <= set(arrays):
        raise ValueError("arrays")
    if isinstance(space, spaces.Box) != ("std" in arrays) or not arrays["starts"][0]:
        raise ValueError("std or starts")
    if len(arrays["actions"]) != n_steps or not all(action in space for action in arrays["actions"]):
        raise ValueError("actions")
    for name, array in arrays.items():
        if name == "actions":
            continue
        if array.shape != (shapes | optional)[name] or array.dtype.kind != KINDS.get(name, "f"):
            raise ValueError(name)
        if not np.isfinite(array).all():
            raise ValueError(name)
