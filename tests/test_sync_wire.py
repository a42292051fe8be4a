"""The wire format: stored vectors, limits, damage, and what an older or newer peer sends."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.contract import Point, Reason, Scan, ValueType
from sync import wire

VECTORS = sorted(Path(__file__).parent.joinpath("vectors").glob("v*.json"))
_RANGES: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.BOOL: st.booleans(),
    ValueType.I8: st.integers(-128, 127),
    ValueType.U8: st.integers(0, 255),
    ValueType.I16: st.integers(-(2**15), 2**15 - 1),
    ValueType.U16: st.integers(0, 2**16 - 1),
    ValueType.I32: st.integers(-(2**31), 2**31 - 1),
    ValueType.U32: st.integers(0, 2**32 - 1),
    ValueType.I64: st.integers(-(2**63), 2**63 - 1),
    ValueType.U64: st.integers(0, 2**64 - 1),
    ValueType.F32: st.floats(allow_nan=False, width=32),
    ValueType.F64: st.floats(allow_nan=False),
    ValueType.STR: st.text(max_size=20),
}


def _points(types: list[ValueType]) -> tuple[Point, ...]:
    return tuple(Point(name=f"p{i}", type=kind) for i, kind in enumerate(types))


def _sealed(frames: int = 3, *, gateway: str = "acme/plant-1", epoch: int = 7, first: int = 1) -> wire.Sealed:
    points = _points([ValueType.U16] * 4)
    packing = wire.Packing(wire.layout_of("d", "simulator", "m", points))
    data = [wire.encode_scan(packing, Scan(i, points, (i, i + 1, i + 2, i + 3)), 1) for i in range(frames)]
    clock = wire.ClockRow(1, "boot", 0, 10**18, True)
    return wire.seal(gateway, epoch, first, data, [packing.layout], [clock], 4 * frames)


@st.composite
def _scans(draw: st.DrawFn) -> Scan:
    types = draw(st.lists(st.sampled_from(list(ValueType)), min_size=1, max_size=20))
    values = [draw(st.none() | _RANGES[kind]) for kind in types]
    reasons = {i: Reason.TIMEOUT for i, value in enumerate(values) if value is None}
    return Scan(draw(st.integers(0, 2**62)), _points(types), values, reasons)


@given(_scans())
@settings(max_examples=300, deadline=None)
def test_any_scan_comes_back_as_it_was(scan: Scan) -> None:
    packing = wire.Packing(wire.layout_of("d", "x", "m", scan.points))
    frame = wire.decode_frame(wire.encode_scan(packing, scan, 2))
    assert isinstance(frame, wire.ScanFrame)
    values = packing.unpack(frame.values, frame.texts)
    reasons = wire.unpack_reasons(frame.reasons, len(scan.points))
    assert reasons == dict(scan.reasons)
    assert [None if i in reasons else v for i, v in enumerate(values)] == list(scan.values)
    assert frame.taken_at_ns == scan.taken_at_ns


@pytest.mark.parametrize("file", VECTORS, ids=lambda f: f.stem)
def test_stored_vectors_of_every_version_decode_to_what_they_say(file: Path) -> None:
    vector = json.loads(file.read_text())
    head, body = wire.open_body(bytes.fromhex(vector["batch"]["bytes"]))
    told = vector["batch"]
    assert (head.gateway, head.epoch, head.first, head.last) == (
        told["gateway"],
        told["epoch"],
        told["first"],
        told["last"],
    )
    layout = body.layouts[0]
    assert msgspec.json.decode(msgspec.json.encode(layout)) == vector["layout"]
    assert wire.layout_id(layout) == vector["layout_id"]
    packing = wire.Packing(layout)
    for stored, raw in zip(vector["scans"], body.frames, strict=False):
        assert bytes(raw) == bytes.fromhex(stored["frame"])
        frame = wire.decode_frame(raw)
        assert isinstance(frame, wire.ScanFrame)
        reasons = wire.unpack_reasons(frame.reasons, len(layout.names))
        assert {str(i): int(r) for i, r in reasons.items()} == stored["reasons"]
        shown = wire.shown(layout, packing.unpack(frame.values, frame.texts))
        for i, value in enumerate(stored["shown"]):
            if i not in reasons or reasons[i].has_value:
                assert shown[i] == value
    gap, event = (wire.decode_frame(raw) for raw in body.frames[3:])
    assert isinstance(gap, wire.GapFrame)
    fields = vector["gap"]["fields"]
    assert msgspec.json.decode(msgspec.json.encode(gap))[: len(fields)] == fields
    assert (gap.priority, gap.frames, gap.sparse) == ("", 0, False)  # what it did not say yet
    assert msgspec.json.decode(msgspec.json.encode(event)) == vector["event"]["fields"]
    for kind in ("ack", "nack"):
        reply = wire.decode_reply(bytes.fromhex(vector[kind]["bytes"]))
        fields = vector[kind]["fields"]
        assert msgspec.json.decode(msgspec.json.encode(reply))[: len(fields)] == fields
        assert isinstance(reply, wire.Nack) or reply.spread_s == 0  # what it did not say yet


def test_an_ack_of_a_small_fleet_is_as_it_was_before_there_was_a_spread() -> None:
    plain, spread = wire.Ack(7, ((1, 3),), 99), wire.Ack(7, ((1, 3),), 99, 66)
    assert wire.encode_reply(plain) == bytes((0x10,)) + msgspec.msgpack.encode([0, 7, [[1, 3]], 99])
    for ack in (plain, spread):
        assert wire.decode_reply(wire.encode_reply(ack)) == ack


def test_this_version_still_encodes_its_stored_vectors_to_the_same_bytes() -> None:
    from tests.vectors.make import examples

    stored = json.loads(Path(__file__).parent.joinpath(f"vectors/v{wire.VERSION}.json").read_text())
    made = json.loads(json.dumps(examples()))
    # zstd's output may change with its version; what is inside may not
    before, after = (bytes.fromhex(v["batch"].pop("bytes")) for v in (stored, made))
    assert made == stored
    assert wire.open_body(after)[1] == wire.open_body(before)[1]


def test_fields_that_came_later_are_read_and_written_as_stored() -> None:
    from tests.vectors.make import added

    stored = json.loads((Path(__file__).parent / "vectors/added.json").read_text())
    assert json.loads(json.dumps(added())) == stored
    for told in stored["gaps"]:
        gap = wire.decode_frame(bytes.fromhex(told["frame"]))
        assert isinstance(gap, wire.GapFrame)
        assert msgspec.json.decode(msgspec.json.encode(gap)) == told["fields"]
        assert gap.sparse is told["sparse"]


def test_a_newer_peers_trailing_fields_are_ignored() -> None:
    pack = msgspec.msgpack.encode
    head, body = wire.open_body(_sealed().payload)
    raw = pack(
        [
            [[*msgspec.to_builtins(layout), "new"] for layout in body.layouts],
            [[*msgspec.to_builtins(row), 5] for row in body.clocks],
            [[*msgspec.msgpack.decode(f), "new", 1] for f in body.frames],
            {"new": 1},
        ]
    )
    packed = zstandard.compress(raw)
    newer = [*msgspec.to_builtins(head)[:5], len(raw), 0, "new", 2**40, None]
    got_head, got = wire.open_body(_crafted(newer, packed))
    assert got_head.last == 3
    assert [wire.decode_frame(f) for f in got.frames] == [wire.decode_frame(f) for f in body.frames]
    reply = bytes((0x10,)) + pack([0, 7, [[1, 3]], 99, 0, "new"])
    assert wire.decode_reply(reply) == wire.Ack(7, ((1, 3),), 99)


def test_a_reason_that_only_a_newer_agent_knows_keeps_its_quality() -> None:
    packed = struct.pack("<HBHBHB", 0, 40, 1, 100, 2, 250)
    reasons = wire.unpack_reasons(packed, 3)
    assert [reasons[i].quality for i in range(3)] == [1, 0, 0]
    assert [reasons[i].has_value for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda b: b"", "truncated"),
        (lambda b: b[:4], "truncated"),
        (lambda b: b[: len(b) // 2], "crc"),
        (lambda b: b[:-1] + bytes((b[-1] ^ 1,)), "crc"),
        (lambda b: bytes((0x21,)) + b[1:], "version"),
        (lambda b: bytes((0x17,)) + b[1:], "version"),
        (lambda b: b[:1] + b"\xc1" + b[2:], "head"),
        (lambda b: b + b"\0" * wire.MAX_BATCH_BYTES, "size"),
    ],
    ids=[
        "empty",
        "cut-in-head",
        "cut-in-body",
        "bit-flip",
        "version-2",
        "compression-7",
        "no-array",
        "oversized",
    ],
)
def test_a_damaged_batch_is_refused_by_name(damage: Any, code: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.open_head(damage(_sealed().payload))
    assert caught.value.code == code


def _crafted(head: list[Any], packed: bytes) -> bytes:
    """A batch that an attacker with our source would make: its CRC is right (the last of seven fields)."""
    if len(head) >= 7:
        head[6] = zlib.crc32(packed, zlib.crc32("|".join(str(field) for field in head[:6]).encode()))
    return bytes((0x11,)) + msgspec.msgpack.encode(head) + packed


def test_a_decompression_bomb_is_refused_before_it_grows() -> None:
    bomb = zstandard.compress(bytes(200 * 1024 * 1024))
    assert len(bomb) < wire.MAX_BATCH_BYTES
    with pytest.raises(wire.WireError, match="limit"):
        wire.open_head(_crafted(["a/b", 1, 1, 1, 1, 200 * 1024 * 1024, 0], bomb))
    with pytest.raises(wire.WireError, match="its head says 100"):
        wire.open_body(_crafted(["a/b", 1, 1, 1, 1, 100, 0], bomb))


def test_a_stream_of_unknown_size_is_refused() -> None:
    streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    packed = streamed.compress(bytes(10**6)) + streamed.flush()
    with pytest.raises(wire.WireError):
        wire.open_body(_crafted(["a/b", 1, 1, 1, 1, 100, 0], packed))


@pytest.mark.parametrize(
    "head",
    [
        ["a/b", 0, 1, 1, 1, 0, 0],
        ["a/b", 1, 0, 1, 1, 0, 0],
        ["a/b", 1, 5, 4, 1, 0, 0],
        ["a/b", 1, 1, 10**9, 1, 0, 0],
        ["a/b", 2**63, 1, 1, 1, 0, 0],
        ["a/b", 1, 1, 1, -1, 0, 0],
        ["a/b", 1, 1, 1, 1, 2**40, 0],
        [5, 1, 1, 1, 1, 0, 0],
        ["a/b"],
    ],
)
def test_a_head_that_no_gateway_writes_is_refused(head: list[Any]) -> None:
    with pytest.raises(wire.WireError):
        wire.open_head(_crafted(head, b""))


def test_a_batch_with_fewer_frames_than_its_range_is_refused() -> None:
    head, body = wire.open_body(_sealed().payload)
    raw = msgspec.msgpack.encode(wire.Body(body.layouts, body.clocks, body.frames[:2]))
    packed = zstandard.compress(raw)
    with pytest.raises(wire.WireError, match=r"2 frames for seqs 1\.\.3"):
        wire.open_body(_crafted(["a/b", 7, 1, 3, 12, len(raw), 0], packed))
    assert head.last == 3


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_arbitrary_bytes_never_do_more_than_raise_the_wires_own_error(data: bytes) -> None:
    for prefix in (b"", b"\x11", b"\x10", b"\x11\x97"):
        for read in (wire.open_body, wire.decode_reply, wire.decode_frame):
            with contextlib.suppress(wire.WireError):
                read(prefix + data)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_is_found_or_changes_nothing_that_is_stored(data: st.DataObject) -> None:
    good = _sealed()
    at = data.draw(st.integers(0, len(good.payload) - 1))
    changed = bytearray(good.payload)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = wire.open_body(bytes(changed))
    except wire.WireError:
        return
    assert found == wire.open_body(good.payload)


def test_sealing_the_same_frames_again_gives_the_same_bytes() -> None:
    assert _sealed(20).payload == _sealed(20).payload


def test_a_batch_above_the_limit_is_refused_at_the_sealing_gateway() -> None:
    points = (Point(name="s", type=ValueType.STR),)
    packing = wire.Packing(wire.layout_of("d", "x", "m", points))
    frame = wire.encode_scan(packing, Scan(1, points, ("x" * 1000,)), 1)
    with pytest.raises(wire.WireError) as caught:
        wire.seal("a/b", 1, 1, [frame] * 5000, [packing.layout], [], 5000)
    assert caught.value.code == "size"


def test_a_value_that_does_not_fit_its_type_is_named() -> None:
    points = _points([ValueType.U16, ValueType.I8, ValueType.STR])
    packing = wire.Packing(wire.layout_of("d", "x", "m", points))
    with pytest.raises(struct.error):
        packing.pack((70_000, 1, "a"))
    assert packing.fit((70_000, 200, 5)) == [0, 1, 2]
    assert packing.fit((7, None, "a")) == []


def test_wall_time_comes_from_the_last_synchronized_row_of_the_boot() -> None:
    rows = [
        wire.ClockRow(1, "a", 0, 100, False),
        wire.ClockRow(1, "a", 5, 1000, True),
        wire.ClockRow(1, "a", 9, 50, False),
        wire.ClockRow(2, "b", 0, 7, False),
        wire.ClockRow(2, "b", 3, 9, False),
    ]
    best = wire.wall_clock(rows)
    assert best[1].wall_ns == 1000
    assert best[2].wall_ns == 9


def test_scaled_values_are_shown_as_a_person_wrote_them() -> None:
    points = (
        Point(name="a", type=ValueType.U16, scale=0.1),
        Point(name="b", type=ValueType.I16, scale=0.01, offset=-40.0),
        Point(name="c", type=ValueType.U32),
        Point(name="d", type=ValueType.U16, scale=10.0),
    )
    layout = wire.layout_of("d", "x", "m", points)
    assert wire.shown(layout, (234, 6250, 5, 3)) == [23.4, 22.5, 5, 30.0]
