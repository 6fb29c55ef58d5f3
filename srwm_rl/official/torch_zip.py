"""Files of `torch.save`, read without torch and without running anything in them.

Such a file is a zip archive: `<name>/data.pkl`, a pickle in which tensors refer to storages, and the storages' bytes,
one member each, uncompressed (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from srwm_rl.errors import UserError, named
from srwm_rl.official.data_unpickler import Named, PersistentId, read_pickle
from srwm_rl.regular_file import read_small
from srwm_rl.storage.strict_json import convert

DTYPES = dict(Float="f4", Double="f8", Half="f2", Long="i8", Int="i4", Short="i2", Char="i1", Byte="u1", Bool="?")
BYTE_ORDERS = {b"little": "<", b"big": ">"}
MAX_BYTES = 2**31  # of a file; stored members are no longer than their file
OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickled number
OLD_FORMAT = (
    "in torch's format from before 1.6, which can only be read by running its code: if you trust it, write "
    "torch.save(torch.load(old), new) with torch 1.6 or later, and give the new file"
)
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, struct.error)
Count = Annotated[int, Meta(ge=0, lt=2**40)]


class _Storage(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The persistent id of a storage: numbers of one type in one member of the archive."""

    kind: Literal["storage"]
    type: Named
    key: str
    device: Any
    numel: Count


class _View(msgspec.Struct, array_like=True):
    """The arguments with which torch rebuilds a tensor; what follows these four is not used."""

    storage: PersistentId
    offset: Count
    size: Annotated[tuple[Annotated[int, Meta(ge=1, lt=2**40)], ...], Meta(max_length=8)]
    stride: tuple[Count, ...]


class TorchArchive:
    """A file of `torch.save`.

    Attributes:
        path: the file.
        content: what was saved; tensors and other objects are placeholders, see `array`.

    Raises:
        UserError: no such file, too large, of another format, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        blob = read_small(path, MAX_BYTES)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(blob))
        except ZIP_ERRORS as error:
            is_old = blob.startswith(OLD_MAGIC) or blob[257:262] == b"ustar"
            raise UserError(f"{path} is {OLD_FORMAT if is_old else 'no file of torch.save, or is damaged'}") from error
        self._members = {member.filename: member for member in self._zip.infolist()}
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(self._members) != len(self._zip.infolist()):
            raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
        self._folder = pickles[0].removesuffix("data.pkl")
        # Files of torch below 2.1 do not name their byte order.
        has_order = f"{self._folder}byteorder" in self._members
        self._byte_order = BYTE_ORDERS.get(self._member("byteorder")) if has_order else "<"
        if self._byte_order is None:
            raise UserError(f"{path} is damaged: its byte order is unknown")
        data = self._member("data.pkl")
        with named(f"{path} cannot be read"):
            self.content = read_pickle(data)

    def array(self, value: Any, name: str) -> np.ndarray:
        """Return a copy of the numbers of a tensor in `content`, in their own type; `name` is its name in errors.

        Raises:
            UserError: the value is no tensor, or not inside its storage; the storage is missing, damaged or of a type
                that numpy does not have.
        """
        what = f"{self.path} is damaged: weight {name!r}"
        if isinstance(value, Named) and value.name == "torch._utils._rebuild_parameter" and value.arguments:
            value = value.arguments[0]
        if not isinstance(value, Named) or value.name != "torch._utils._rebuild_tensor_v2":
            raise UserError(f"{what} is no tensor")
        view = convert(value.arguments, _View, f"{what} has a description that does not fit")
        storage = convert(view.storage.value, _Storage, f"{what} has a description that does not fit")
        kind = DTYPES.get(storage.type.name.removeprefix("torch.").removesuffix("Storage"))
        if kind is None:
            raise UserError(
                f"{self.path}: weight {name!r} is of type {storage.type.name!r:.60}, which is not supported"
            )
        last = sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=False))
        inside = len(view.size) == len(view.stride) and view.offset + last < storage.numel
        # With a stride of 0 one number could become a terabyte.
        if not inside or prod(view.size) > storage.numel:
            raise UserError(f"{what} does not lie inside its storage")
        dtype = np.dtype(f"{self._byte_order}{kind}")
        data = self._member(f"data/{storage.key}")
        if len(data) != storage.numel * dtype.itemsize:
            raise UserError(f"{what} has a storage of {len(data):,} bytes")
        strides = [stride * dtype.itemsize for stride in view.stride]
        return np.array(np.ndarray(view.size, dtype, data, view.offset * dtype.itemsize, strides), kind, order="C")

    def _member(self, name: str) -> bytes:
        member = self._members.get(self._folder + name)
        if member is None:
            raise UserError(f"{self.path} is damaged: it has no {name}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UserError(f"{self.path}: {name} is compressed, which torch.save never does; save the file anew")
        try:
            return self._zip.read(member)  # checks the CRC
        except ZIP_ERRORS as error:
            raise UserError(f"{self.path} is damaged: {name} cannot be read; get the file anew") from error
