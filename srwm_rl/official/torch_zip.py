"""Files of `torch.save`, read without torch and without running anything in them.

Such a file is a zip archive: `<name>/data.pkl`, a pickle in which tensors refer to storages, and the storages' bytes,
one member each, uncompressed (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.official.data_unpickler import Global, Opaque, read_pickle

DTYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
MAX_BYTES = 2**31  # of a file; a stored member is no longer than its file, so this bounds all that is read
MAX_AXES = 8
OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickled magic number
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, struct.error)


@dataclass(frozen=True)
class Storage:
    """Numbers of one type in one member of the archive."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, as the pickle describes it; nothing of it is checked yet."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any


class TorchArchive:
    """A file of `torch.save`.

    Attributes:
        path: the file.
        content: what was saved; tensors are `Tensor`, and objects that only the file's code could make are `Opaque`.

    Raises:
        UserError: no such file, too large, of another format, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        blob = _read(path)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(blob))
        except ZIP_ERRORS as error:
            raise UserError(f"{path} {_what_else(blob)}") from error
        self._members = {member.filename: member for member in self._zip.infolist()}
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(self._members) != len(self._zip.infolist()):
            raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._order = self._byte_order()
        builders = {
            "collections.OrderedDict": _ordered_dict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
        }
        try:
            self.content = read_pickle(self._member("data.pkl"), builders, _storage)
        except UserError as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def array(self, tensor: Tensor, name: str) -> np.ndarray:
        """Return a copy of a tensor's numbers in their own type; `name` is what an error calls it.

        Raises:
            UserError: the tensor does not lie inside its storage, or the storage is missing, damaged or of a type
                unknown here.
        """
        kind = DTYPES.get(tensor.storage.kind.removeprefix("torch."))
        if kind is None:
            raise UserError(f"{self.path}: {name!r} is of type {tensor.storage.kind!r:.60}, which is not supported")
        dtype = np.dtype(self._order + kind)
        _check_view(tensor, f"{self.path} is damaged: {name!r}")
        data = self._member(f"data/{tensor.storage.key}")
        if len(data) != tensor.storage.numel * dtype.itemsize:
            raise UserError(f"{self.path} is damaged: the storage of {name!r} has {len(data):,} bytes")
        flat = np.frombuffer(data, dtype)[tensor.offset :]
        strides = [each * dtype.itemsize for each in tensor.stride]
        view = np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)
        return np.array(view, kind, order="C")

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

    def _byte_order(self) -> str:
        if f"{self._folder}byteorder" not in self._members:
            return "<"  # older than torch 2.1
        orders = {b"little": "<", b"big": ">"}
        order = self._member("byteorder")
        if order not in orders:
            raise UserError(f"{self.path} is damaged: its byte order is none")
        return orders[order]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a checkpoint such as model.tar")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; a checkpoint has a few million")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _what_else(blob: bytes) -> str:
    if blob.startswith(OLD_FORMAT) or blob[257:262] == b"ustar":
        return (
            "is in torch's format from before 1.6, which only running its code could read: "
            "where you trust it, write torch.save(torch.load(old), new) with torch 1.6 or later, and give the new file"
        )
    return "is no file of torch.save, or is damaged"


def _ordered_dict(*items: Any) -> Any:
    return Opaque("collections.OrderedDict") if items else {}  # torch fills it afterwards


def _storage(persistent_id: Any) -> Storage:
    kind, storage_type, key, _device, numel = persistent_id
    fits = kind == "storage" and isinstance(storage_type, Global) and isinstance(key, str) and type(numel) is int
    if not fits:
        raise TypeError(kind)
    return Storage(storage_type.name, key, numel)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise TypeError(storage)
    return Tensor(storage, offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(tensor)
    return tensor


def _check_view(tensor: Tensor, what: str) -> None:
    for numbers, least in ((tensor.size, 1), (tensor.stride, 0), ((tensor.offset,), 0)):
        fits = isinstance(numbers, tuple) and all(type(each) is int and least <= each < 2**40 for each in numbers)
        if not fits or len(numbers) > MAX_AXES:
            raise UserError(f"{what} has no size that can be")
    last = sum((size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=False))
    inside = len(tensor.size) == len(tensor.stride) and tensor.offset + last < tensor.storage.numel
    # A stride of 0 could make a terabyte of one number.
    if not inside or prod(tensor.size) > tensor.storage.numel:
        raise UserError(f"{what} does not lie inside its storage")
