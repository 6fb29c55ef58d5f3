"""Flipped bits on the disk: each is detected, anywhere in a file."""

import random
from pathlib import Path

import pytest

from srwm_rl import UserError
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file


def undetected(blob: bytes, flips: int, path: Path) -> list[tuple[int, int]]:
    """Flip random bits, one at a time, and return those that were not detected."""
    rng = random.Random(0)
    missed = []
    changed = bytearray(blob)
    for _ in range(flips):
        position, bit = rng.randrange(len(blob)), rng.randrange(8)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        changed[position] ^= 1 << bit
        try:
            read_file(path)
        except UserError:
            continue
        missed.append((position, bit))
    assert bytes(changed) == blob
    return missed


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_every_flipped_bit_is_detected(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    assert undetected(blob, 500, tmp_path / "file") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_10000_flipped_bits_are_detected(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    assert undetected(blob, 10_000, tmp_path / "file") == []


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_every_flipped_bit_of_the_header_is_detected(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    path = tmp_path / "file"
    header = 8 + int.from_bytes(blob[:8], "little")
    for position in [*range(80), *range(80, header, 17)]:  # every 17th byte, to be fast
        bit = 1 << position % 8
        path.write_bytes(blob[:position] + bytes([blob[position] ^ bit]) + blob[position + 1 :])
        with pytest.raises(UserError):
            read_file(path)


@pytest.mark.slow
def test_every_single_bit_of_a_models_header_is_detected(recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files("model")[-1].read_bytes()
    path = tmp_path / "file"
    for position in range(8 + int.from_bytes(blob[:8], "little")):
        for bit in range(8):
            path.write_bytes(blob[:position] + bytes([blob[position] ^ 1 << bit]) + blob[position + 1 :])
            with pytest.raises(UserError):
                read_file(path)
