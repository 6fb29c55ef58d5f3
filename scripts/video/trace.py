"""Traces: a recording in a few kilobytes, with everything needed to play it again."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.agents.evaluation.head_costs import HeadCost
from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.video.panel import RATE_LABELS, column_names
from srwm_rl.scripts.video.scene import Scene
from srwm_rl.storage.safe_file import write_whole
from srwm_rl.storage.space_json import space_from_json, space_to_json

FORMAT = 1
NOTES = {"label", "told", "own", "answer", "seen", "query", "part"}
"""Arrays of few-shot episodes, see `srwm_rl.envs.tasks.fewshot.FewShotBatch.step_notes`."""
_META = "meta"  # JSON, as bytes: an array of text would be four times as large
MAX_FILE_BYTES, MAX_BYTES, MAX_ARRAYS, MAX_HEADER = 2**24, 2**26, 64, 4096
KINDS = {
    **dict.fromkeys(("rewards", "values", "entropy"), "f"),
    **dict.fromkeys(("starts", "dones"), "b"),
    **dict.fromkeys(("solved", "levels"), "i"),
    "links": "u",
}
OPTIONAL_KINDS = {"attempts": "i", **dict.fromkeys(NOTES, "i")}
"""Arrays `[T]`, and the kind of their dtype, then those that only some traces have; the others have more axes."""


class About(msgspec.Struct, frozen=True):
    """What a film's titles say about the agent."""

    run: str
    core: str
    game: str
    levels: str
    eval_levels: str
    num_timesteps: int
    deterministic: bool
    intervention: str = ""  # which edits were suppressed

    def describe_level(self, level: int) -> str:
        """Return, for example, "held-out level 1003"."""
        kinds = {"training level": self.levels, "held-out level": self.eval_levels}
        kind = next((kind for kind, levels in kinds.items() if level in LevelRange.parse(levels)), "unseen level")
        return f"{kind} {level}"

    def describe_agent(self) -> str:
        """Return the run, its core, its training steps and how actions are chosen."""
        actions = "most probable actions" if self.deterministic else "sampled actions"
        changed = f", {self.intervention}" if self.intervention else ""
        return f"{self.run}, core {self.core}{changed}, {self.num_timesteps:,} steps of training, {actions}"


class Trace(msgspec.Struct, frozen=True, tag_field="kind", tag="trace", omit_defaults=True):
    """A recording."""

    format: int
    scene: Scene
    digest: str = msgspec.field(name="sha256")
    """Of all observations."""
    action_space: spaces.Space[Any]
    observation_space: spaces.Space[Any]
    versions: dict[str, str]
    """By name, of the distribution that the environment came from."""
    about: About
    head_costs: tuple[HeadCost, ...] = ()
    """What lesioning each head costs on the scene's game; (): not known."""
    arrays: dict[str, Any] = {}
    """From `recording.collect`."""

    def describe(self) -> str:
        """Return what was played, and how it ended."""
        arrays, solved = self.arrays, self.arrays["solved"]
        known = solved[arrays["dones"] & (solved >= 0)]
        played = f"{len(solved)} steps, {arrays['starts'].sum()} episode(s)"
        played += "" if arrays["dones"][-1] else ", the last one cut short"
        played += f", {known.sum()} of {len(known)} solved" if len(known) else ""
        level = self.about.describe_level(self.scene.level)
        return f"{self.about.game}, {level}, {played}, reward {arrays['rewards'].sum():g} in all"

    def save(self, path: Path) -> None:
        """Write the trace, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        meta = msgspec.json.encode(msgspec.structs.replace(self, arrays={}), enc_hook=space_to_json)
        content = io.BytesIO()
        np.savez_compressed(content, **{_META: np.frombuffer(meta, np.uint8), **self.arrays})
        write_whole(path, content.getvalue())


def load_trace(path: Path) -> Trace:
    """Read a trace, without executing anything in it.

    Raises:
        UserError: it is missing, of another program, damaged, or of a newer format.
    """
    try:
        arrays = _read(path)
        meta = msgspec.json.decode(arrays.pop(_META).tobytes())
        if meta["kind"] == "trace" and meta["format"] > FORMAT:
            raise UserError(f"{path} has format {meta['format']}; upgrade srwm-rl, which reads up to {FORMAT}")
        trace = msgspec.convert(meta | {"arrays": arrays}, Trace, dec_hook=lambda _, space: space_from_json(space))
        _check_arrays(trace)
        return trace
    except UserError:
        raise
    except Exception as error:  # of damaged files zipfile, zlib, NumPy and msgspec raise a dozen kinds
        raise UserError(f"{path} is no trace of srwm-rl, or is damaged; srwm-rl watch --trace writes one") from error


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(read_small(path, MAX_FILE_BYTES))) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_BYTES or len(members) > MAX_ARRAYS:
            raise ValueError("size")
        arrays = {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}
        if len(arrays) < len(members):
            raise ValueError("names")
        return arrays


def _array(data: bytes) -> npt.NDArray[Any]:
    """Return the array in a .npy file's bytes, which must be as many as its shape says."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("version")
    # numpy's stubs lack the bound.
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER)  # type: ignore[call-arg]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell() or not dtype.itemsize:
        raise ValueError("shape")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if in_columns else "C")


def _check_arrays(trace: Trace) -> None:
    """Raise a ValueError or KeyError unless the arrays are those of T steps."""
    arrays, space = trace.arrays, trace.action_space
    n_steps, heads = len(arrays["rewards"]), arrays["edit"].shape
    columns = (n_steps, len(column_names(space)))
    shapes: dict[str, Any] = {**dict.fromkeys(KINDS, (n_steps,)), "choices": columns, "edit": heads, "drift": heads}
    if isinstance(space, spaces.Box):
        shapes["std"] = columns
    shapes |= {name: (n_steps,) for name in OPTIONAL_KINDS if name in arrays}
    if arrays.keys() - {"rates"} != {*shapes, "actions"}:
        raise ValueError("names")
    if 0 < len(arrays.keys() & NOTES) < len(NOTES):
        raise ValueError("notes")
    if len(heads) != 3 or heads[0] != n_steps or trace.scene.n_levels > n_steps or not arrays["starts"][0]:
        raise ValueError("steps")
    if len(arrays["actions"]) != n_steps or not all(action in space for action in arrays["actions"]):
        raise ValueError("actions")
    kinds = KINDS | OPTIONAL_KINDS
    for name, shape in (shapes | {"rates": (*heads, len(RATE_LABELS))}).items():
        array = arrays.get(name, np.zeros(shape))
        if array.shape != shape or array.dtype.kind != kinds.get(name, "f") or not np.isfinite(array).all():
            raise ValueError(name)
    for levels in (trace.about.levels, trace.about.eval_levels):
        LevelRange.parse(levels)
