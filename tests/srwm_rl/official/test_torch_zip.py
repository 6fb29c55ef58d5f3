"""Files of torch.save without torch: the same numbers, everything checked, nothing run, whatever the file holds."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl import UserError
from srwm_rl.official.data_unpickler import Named, PersistentId
from srwm_rl.official.torch_zip import TorchArchive

GOLDEN = Path(__file__).parents[2] / "golden" / "full_srwm_model.tar"


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def read(path: Path) -> np.ndarray:
    archive = TorchArchive(path)
    return archive.array(archive.content["x"], "x")


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], **kwargs: Any) -> Path:
    """Write the archive anew with its members changed; the checksums fit."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, data in members.items():
            archive.writestr(f"anything/{name}", data)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_every_type_comes_back(dtype: str, tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    array = read(save(tmp_path / "x", {"x": tensor}))
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, tensor.numpy())


def test_views_of_one_storage_come_back(tmp_path: Path) -> None:
    whole = torch.randn(4, 5, 6)
    views = [whole, whole[1:3, :, 2], whole.permute(2, 0, 1), whole[0, 0, 0], torch.nn.Parameter(whole[3])]
    archive = TorchArchive(save(tmp_path / "x", views))
    for view, tensor in zip(views, archive.content, strict=True):
        np.testing.assert_array_equal(archive.array(tensor, "x"), view.detach().numpy())


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    def swap(members: dict[str, bytes]) -> None:
        members["byteorder"] = b"big"
        members["data/0"] = np.frombuffer(members["data/0"], "<f4").astype(">f4").tobytes()

    assert read(rewrite(save(tmp_path / "x", {"x": torch.arange(3.0)}), swap)).tolist() == [0, 1, 2]


def test_files_without_a_byte_order_record_are_read(tmp_path: Path) -> None:
    path = rewrite(save(tmp_path / "x", {"x": torch.arange(3.0)}), lambda members: members.pop("byteorder"))
    assert read(path).tolist() == [0, 1, 2]


DAMAGE: list[tuple[Callable[[dict[str, bytes]], Any], str]] = [
    (lambda m: m.pop("data.pkl"), r"not one that torch\.save wrote"),
    (lambda m: m.update({"sub/data.pkl": b""}), r"not one that torch\.save wrote"),
    (lambda m: m.update({"data.pkl": b"\x80\x02N"}), "is damaged"),
    (lambda m: m.update({"data.pkl": b"\x80\x02" + b"N" * 2**22 + b"."}), "at most"),
    (lambda m: m.update({"data.pkl": m["data.pkl"].replace(b"storage", b"sturage")}), "is damaged"),
    (
        lambda m: m.update({"data.pkl": m["data.pkl"].replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")}),
        "no tensor",
    ),
    (lambda m: m.update(byteorder=b"middle"), "its byte order is unknown"),
    (lambda m: m.pop("data/0"), "has no data/0"),
    (lambda m: m.update({"data/0": m["data/0"][:-1]}), "'x' has a storage of 11 bytes"),
    (lambda m: m.update({"data.pkl": m["data.pkl"].replace(b"FloatStorage", b"ComplexStorage")}), "which is not"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_damage_is_named(change: Callable[[dict[str, bytes]], None], message: str, tmp_path: Path) -> None:
    path = rewrite(save(tmp_path / "x", {"x": torch.arange(3.0)}), change)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def tensor(offset: Any, size: Any, stride: Any) -> Named:
    storage = PersistentId(("storage", Named("torch.FloatStorage"), "0", "cpu", 3))
    return Named("torch._utils._rebuild_tensor_v2", (storage, offset, size, stride, False, {}))


def test_a_view_is_described_by_offset_size_and_stride(tmp_path: Path) -> None:
    archive = TorchArchive(save(tmp_path / "x", {"x": torch.arange(3.0)}))
    assert archive.array(tensor(1, (2,), (1,)), "x").tolist() == [1, 2]
    assert archive.array(tensor(2, (), ()), "x").tolist() == 2


@pytest.mark.parametrize(
    "description",
    [
        None,
        3,
        [],
        Named("torch.Tensor"),
        Named("torch._utils._rebuild_tensor_v2"),
        Named("torch._utils._rebuild_parameter"),
    ]
    + [tensor(0, (3,), (1,)).arguments, Named("torch._utils._rebuild_tensor_v2", (1, 0, (3,), (1,)))]
    + [
        Named("torch._utils._rebuild_tensor_v2", (PersistentId(value), 0, (3,), (1,)))
        for value in (
            None,
            3,
            ("storage",),
            ("storage", "torch.FloatStorage", "0", "cpu", 3),
            ("x", Named("a"), "0", 0, 3),
        )
    ],
)
def test_other_descriptions_are_refused(description: Any, tmp_path: Path) -> None:
    archive = TorchArchive(save(tmp_path / "x", {"x": torch.arange(3.0)}))
    with pytest.raises(UserError, match=r"weight 'x' (is no tensor|has a)") as error:
        archive.array(description, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (4,), (1,)),
        (1, (3,), (1,)),
        (-1, (3,), (1,)),
        (0, (3,), (-1,)),
        (0, (-3,), (1,)),
        (0, (0,), (1,)),
        (0, (2,), (3,)),
        (0, (2**30,), (0,)),  # one number, a billion times
        (0, (2**41,), (1,)),
        (0, (3,), (1, 1)),
        (0, (1,) * 9, (1,) * 9),
        (0, (3.0,), (1,)),
        (0, (True,), (1,)),
        ("0", (3,), (1,)),
        (None, (), ()),
    ],
)
def test_a_view_must_lie_inside_its_storage(offset: Any, size: Any, stride: Any, tmp_path: Path) -> None:
    archive = TorchArchive(save(tmp_path / "x", {"x": torch.arange(3.0)}))
    with pytest.raises(UserError, match=r"'x' (does not lie inside its storage|has a description that does not fit)"):
        archive.array(tensor(offset, size, stride), "x")


def test_compressed_members_are_refused_before_they_grow(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"x": torch.zeros(2**20)})
    rewrite(path, lambda _: None, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**16
    with pytest.raises(UserError, match="is compressed"):
        TorchArchive(path)


def test_a_duplicate_member_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"x": torch.zeros(3)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(UserError, match=r"not one that torch\.save wrote"):
        TorchArchive(path)


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    for missing in (path, tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            TorchArchive(missing)
    for content in (b"", b"PK\x03\x04", b"hello" * 100, GOLDEN.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is no file of torch\.save, or is damaged"):
            TorchArchive(path)
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"from before 1\.6.*torch\.save\(torch.load\(old\), new\)"):
        TorchArchive(path)


def test_an_oversized_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no space on the disk
    with pytest.raises(UserError, match="more than the"):
        TorchArchive(path)


def test_damaged_files_are_imported_or_refused_and_run_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "hostile" / "fuzz_official.py"
    command = [sys.executable, str(script), str(tmp_path), str(GOLDEN)]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr[-3000:]
