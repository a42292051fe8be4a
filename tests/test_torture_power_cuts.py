"""Power cuts at a few hundred places: the short form of `python -m tests.torture.power_cuts`, with its controls."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from tests.torture.power_cuts import explore, told, trace
from tests.torture.recording import Disk, Kind, Operation, RecordingError, Variant, read_log

SEED = 7


@pytest.mark.parametrize("subject", ["buffer", "journal"])
def test_no_power_cut_costs_what_was_promised(subject: str) -> None:
    found = explore(subject, seed=SEED, states=300, steps=120, synchronous="FULL", processes=1)
    print(told(found))
    assert found.states >= 300
    assert not found.kinds, "\n".join(found.first)


@pytest.mark.parametrize("subject", ["buffer", "journal"])
def test_without_a_sync_at_each_commit_losses_are_found(subject: str) -> None:
    """Else the enumeration would be blind, and its silence no proof."""
    found = explore(subject, seed=SEED, states=120, steps=60, synchronous="NORMAL", processes=1)
    print(told(found))
    assert found.lost, "synchronous=NORMAL lost nothing: the recorder or the check is broken"


def test_a_seed_gives_the_same_workload_again() -> None:
    def marks() -> list[bytes]:
        return [op.data for op in trace("journal", SEED, 20, "FULL") if op.kind is Kind.MARK]

    first = marks()
    assert first
    assert marks() == first


def test_the_buffer_workload_vacuums_checkpoints_and_evicts() -> None:
    """What is not gone through cannot be said to be proven."""
    operations = trace("buffer", 1, 200, "FULL")
    sizes = [op.offset for op in operations if op.kind is Kind.TRUNCATE and op.name == "buffer.db"]
    assert any(b < a for a, b in itertools.pairwise(sizes)), "the file never shrank"
    assert any(op.kind is Kind.WRITE and op.name == "buffer.db" for op in operations)
    assert any(op.kind is Kind.MARK and b'"Gone"' in op.data for op in operations)
    assert any(op.kind is Kind.ALLOCATE and op.name == "buffer.db.ballast" for op in operations)


def _write(offset: int, data: bytes) -> Operation:
    return Operation(Kind.WRITE, "f", "", 1, offset, len(data), data)


def _disk(*more: Operation) -> Disk:
    disk = Disk()
    for op in (
        Operation(Kind.CREATE, "f", "", 1, 0, 0, b""),
        Operation(Kind.FOLDER_SYNC, "", "", 9, 0, 0, b""),
        _write(0, b"a" * 1024),
        Operation(Kind.SYNC, "f", "", 1, 0, 0, b""),
        *more,
    ):
        disk.take(op)
    return disk


def test_what_was_synced_is_there_and_what_came_after_may_be() -> None:
    disk = _disk(_write(0, b"b" * 1024))
    assert disk.uncertain
    assert disk.left(Variant.NONE, random.Random(1)) == {"f": b"a" * 1024}
    assert disk.left(Variant.ALL, random.Random(1)) == {"f": b"b" * 1024}
    torn = {disk.left(Variant.SECTORS, random.Random(seed))["f"] for seed in range(50)}
    assert b"a" * 512 + b"b" * 512 in torn
    assert b"b" * 512 + b"a" * 512 in torn


def test_a_file_may_have_grown_without_its_bytes() -> None:
    disk = _disk(_write(1024, b"b" * 10))
    left = {disk.left(Variant.ZEROS, random.Random(seed))["f"] for seed in range(50)}
    assert left == {b"a" * 1024 + b"b" * 10, b"a" * 1024 + bytes(10)}


def test_a_name_is_durable_once_its_folder_is_synced() -> None:
    disk = _disk(Operation(Kind.RENAME, "f", "g", 1, 0, 0, b""))
    assert disk.left(Variant.NONE, random.Random(1)).keys() == {"f"}
    assert disk.left(Variant.ALL, random.Random(1)).keys() == {"g"}
    disk.take(Operation(Kind.FOLDER_SYNC, "", "", 9, 0, 0, b""))
    assert disk.left(Variant.NONE, random.Random(1)).keys() == {"g"}


def test_a_log_that_cannot_prove_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="nothing was recorded"):
        read_log(b"")
    with pytest.raises(RecordingError, match="mmap"):
        read_log(b"X\x01\x00\x04\x00" + bytes(24) + b"fmmap")
