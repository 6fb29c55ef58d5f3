"""Bits that turn over on the disk: every one is noticed, wherever in a file."""

import random
from pathlib import Path

import pytest

from srwm_rl import UserError
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file


def unnoticed(blob: bytes, flips: int, place: Path) -> list[tuple[int, int]]:
    """Return the bits, among so many drawn at random, whose turning over nobody noticed."""
    rng = random.Random(0)
    found = []
    changed = bytearray(blob)
    for _ in range(flips):
        position, bit = rng.randrange(len(blob)), rng.randrange(8)
        changed[position] ^= 1 << bit
        place.write_bytes(changed)
        changed[position] ^= 1 << bit
        try:
            read_file(place)
        except UserError:
            continue
        found.append((position, bit))
    assert bytes(changed) == blob
    return found


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_every_flipped_bit_is_noticed(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    assert unnoticed(blob, 500, tmp_path / "file") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_10000_flipped_bits_are_noticed(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    assert unnoticed(blob, 10_000, tmp_path / "file") == []


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_every_flipped_bit_of_the_header_is_noticed(kind: str, recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files(kind)[-1].read_bytes()
    place = tmp_path / "file"
    header = 8 + int.from_bytes(blob[:8], "little")
    for position in [*range(80), *range(80, header, 17)]:  # of most of it, every seventeenth byte
        bit = 1 << position % 8
        place.write_bytes(blob[:position] + bytes([blob[position] ^ bit]) + blob[position + 1 :])
        with pytest.raises(UserError):
            read_file(place)


@pytest.mark.slow
def test_every_single_bit_of_a_models_header_is_noticed(recall: Path, tmp_path: Path) -> None:
    blob = Run.open(recall).files("model")[-1].read_bytes()
    place = tmp_path / "file"
    for position in range(8 + int.from_bytes(blob[:8], "little")):
        for bit in range(8):
            place.write_bytes(blob[:position] + bytes([blob[position] ^ 1 << bit]) + blob[position + 1 :])
            with pytest.raises(UserError):
                read_file(place)
