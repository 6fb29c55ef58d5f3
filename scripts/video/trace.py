"""Traces: a recording in a few kilobytes, with everything needed to play it again."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError
from srwm_rl.scripts.video.panel import RATE_LABELS, column_names
from srwm_rl.scripts.video.scene import Scene
from srwm_rl.storage.safe_file import write_whole
from srwm_rl.storage.space_json import space_from_json, space_to_json

FORMAT = 1
_META = "meta"  # JSON, as bytes: an array of text would be four times as large
MAX_BYTES = 1 << 30
KINDS = {
    **dict.fromkeys(("rewards", "values", "entropy"), "f"),
    **dict.fromkeys(("starts", "dones"), "b"),
    **dict.fromkeys(("solved", "levels"), "i"),
    "links": "u",
}
"""Arrays `[T]`, and the kind of their dtype; the others have more axes."""


class About(msgspec.Struct, frozen=True):
    """What a film's titles say about the agent."""

    run: str
    core: str
    game: str
    levels: str
    eval_levels: str
    num_timesteps: int
    deterministic: bool

    def describe_level(self, level: int) -> str:
        """Return, for example, "held-out level 1003"."""
        kinds = {"training level": self.levels, "held-out level": self.eval_levels}
        kind = next((kind for kind, levels in kinds.items() if level in LevelRange.parse(levels)), "unseen level")
        return f"{kind} {level}"

    def describe_agent(self) -> str:
        """Return the run, its core, its training steps and how actions are chosen."""
        actions = "most probable actions" if self.deterministic else "sampled actions"
        return f"{self.run}, core {self.core}, {self.num_timesteps:,} steps of training, {actions}"


class _Header(msgspec.Struct):
    kind: Literal["trace"]
    format: int


class _Meta(_Header):
    scene: Scene
    sha256: str
    action_space: Any
    observation_space: Any
    versions: dict[str, str]
    about: About


@dataclass(frozen=True)
class Trace:
    """A recording."""

    scene: Scene
    arrays: dict[str, npt.NDArray[Any]]
    """From `recording.collect`; and `links` `[T]`, the running digest of the observations."""
    digest: str
    """The sha256 of all observations."""
    action_space: spaces.Space[Any]
    observation_space: spaces.Space[Any]
    versions: dict[str, str]
    """By name, of the distribution that the environment came from."""
    about: About

    def save(self, path: Path) -> None:
        """Write the trace, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        action_space, observation_space = space_to_json(self.action_space), space_to_json(self.observation_space)
        meta = _Meta(
            "trace", FORMAT, self.scene, self.digest, action_space, observation_space, self.versions, self.about
        )
        content = io.BytesIO()
        np.savez_compressed(content, **{_META: np.frombuffer(msgspec.json.encode(meta), np.uint8), **self.arrays})
        write_whole(path, content.getvalue())


def load_trace(path: Path) -> Trace:
    """Read a trace, without executing anything in it.

    Raises:
        UserError: it is missing, of another program, damaged, or of a newer format.
    """
    try:
        arrays = _read(path)
        content = arrays.pop(_META).tobytes()
        if (header := msgspec.json.decode(content, type=_Header)).format > FORMAT:
            raise UserError(f"{path} has format {header.format}; upgrade srwm-rl, which reads up to {FORMAT}")
        return _make_trace(arrays, msgspec.json.decode(content, type=_Meta))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as error:
        raise UserError(f"{path} is no trace of srwm-rl, or is damaged; srwm-rl watch --trace writes one") from error


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError("size")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error


def _make_trace(arrays: dict[str, npt.NDArray[Any]], meta: _Meta) -> Trace:
    n_steps = len(arrays["rewards"])
    action_space, observation_space = space_from_json(meta.action_space), space_from_json(meta.observation_space)
    _check_arrays(arrays, n_steps, action_space)
    if meta.scene.n_levels > n_steps:
        raise ValueError("n_levels")
    for levels in (meta.about.levels, meta.about.eval_levels):
        LevelRange.parse(levels)
    return Trace(meta.scene, arrays, meta.sha256, action_space, observation_space, meta.versions, meta.about)


def _check_arrays(arrays: dict[str, npt.NDArray[Any]], n_steps: int, space: spaces.Space[Any]) -> None:
    """Raise a ValueError or KeyError unless the arrays are those of T steps."""
    columns, heads = (n_steps, len(column_names(space, False))), arrays["edit"].shape
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
