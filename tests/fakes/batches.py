"""Sealed batches for the tests of the cloud's side, and every way to spoil one."""

from __future__ import annotations

import random
import zlib

import msgspec
import zstandard

from drivers.contract import Point, Scan, ValueType
from sync import wire

GATEWAY = "acme/plant-1"
EPOCH = 4711
POINTS = tuple(Point(name=f"p{i}", type=ValueType.U16) for i in range(8))
SMALL = zstandard.ZstdCompressor().compress(b"x")
PACKING = wire.Packing(wire.layout_of("boiler", "modbus", "boiler", POINTS))


def batch(first: int, frames: int = 3, *, gateway: str = GATEWAY, epoch: int = EPOCH) -> bytes:
    """`frames` scans of eight points."""
    data = [
        wire.encode_scan(PACKING, Scan(1_000_000 * (first + n), POINTS, [(first + n) % 65536] * 8), 1)
        for n in range(frames)
    ]
    return wire.seal(gateway, epoch, first, data, [PACKING.layout], [], frames * 8).payload


def largest_batch(first: int = 1, *, gateway: str = GATEWAY) -> bytes:
    """As near to the limit as bytes that do not compress come."""
    noise = random.Random(7).randbytes(wire.MAX_BATCH_BYTES - 512)
    frame = b"\xc6" + len(noise).to_bytes(4, "big") + noise
    return wire.seal(gateway, EPOCH, first, [frame], [], [], 1).payload


def forged(
    body: bytes,
    *,
    raw_bytes: int,
    compression: int = wire.COMPRESSION_ZSTD,
    epoch: int = EPOCH,
    first: int = 1,
    last: int = 3,
    readings: int = 24,
) -> bytes:
    """A batch around any body and head, its CRC right: what a clever enemy would send."""
    told = f"{GATEWAY}|{epoch}|{first}|{last}|{readings}|{raw_bytes}"
    head = wire.Head(
        GATEWAY, epoch, first, last, readings, raw_bytes, zlib.crc32(body, zlib.crc32(told.encode()))
    )
    return bytes((wire.VERSION << 4 | compression,)) + msgspec.msgpack.encode(head) + body


def from_the_future() -> dict[str, bytes]:
    """Batches that a later version may write; this one cannot read them yet."""
    good = batch(1)
    return {
        "another version": bytes((15 << 4 | 1,)) + good[1:],
        "another compression": bytes((wire.VERSION << 4 | 9,)) + good[1:],
    }


def spoilt() -> dict[str, tuple[bytes, str]]:
    """Bad input by name: the bytes, and the code of the refusal."""
    good = batch(1)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * 1024 * 1024))
    return {
        "empty": (b"", "truncated"),
        "one byte": (good[:1], "truncated"),
        "within the head": (good[:12], "truncated"),
        "within the body": (good[:-5], "crc"),
        "a flipped bit": (good[:-1] + bytes((good[-1] ^ 1,)), "crc"),
        "oversized": (good + bytes(wire.MAX_BATCH_BYTES), "size"),
        "text": (b"GET / HTTP/1.1\r\n\r\n", "head"),
        "json": (b'{"hello": 1}', "head"),
        "a bomb that says so": (forged(bomb, raw_bytes=64 * 1024 * 1024), "size"),
        "a bomb that lies": (forged(bomb, raw_bytes=1000), "size"),
        "no zstd at all": (forged(b"x" * 100, raw_bytes=100), "compression"),
        "plain and too short": (forged(b"x" * 10, raw_bytes=99, compression=0), "size"),
        "no range": (forged(SMALL, raw_bytes=1, first=9), "head"),
        "an epoch below 1": (forged(SMALL, raw_bytes=1, epoch=0), "head"),
        "an epoch of 64 bits": (forged(SMALL, raw_bytes=1, epoch=2**64 - 1), "head"),
        "too many frames": (forged(SMALL, raw_bytes=1, last=10**9), "head"),
        "too many readings": (forged(SMALL, raw_bytes=1, readings=2**64 - 1), "head"),
    }
