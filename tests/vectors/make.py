"""Writes the test vectors of the current envelope version: `python -m tests.vectors.make`.

A version's vectors are written once, when the version is made, and never again: tests read the stored file. Fields
that a version gained later are in `added.json`, where only new entries are ever added.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from drivers.contract import Point, Reason, Scan, ValueType
from sync import wire

HERE = Path(__file__).parent


def examples() -> dict[str, object]:
    points = (
        Point(name="voltage", type=ValueType.U16, unit="V", scale=0.1),
        Point(name="power", type=ValueType.F32, unit="W"),
        Point(name="energy", type=ValueType.U64, unit="Wh"),
        Point(name="running", type=ValueType.BOOL),
        Point(name="serial", type=ValueType.STR),
        Point(name="temperature", type=ValueType.I16, unit="Cel", scale=0.01, offset=-40.0),
    )
    layout = wire.layout_of("meter", "modbus", "energy", points, (("site", "north"),))
    packing = wire.Packing(layout)
    scans = [
        Scan(1_000_000_000, points, (2304, 1500.5, 2**40 + 1, True, "A1-é", 6250), {}),
        Scan(
            2_000_000_000,
            points,
            (65535, None, 2**40 + 2, False, None, -5),
            {0: Reason.SENTINEL, 1: Reason.NAN, 4: Reason.MISSING},
        ),
        Scan(3_000_000_000, points, (None,) * 6, dict.fromkeys(range(6), Reason.TIMEOUT)),
    ]
    frames = [wire.encode_scan(packing, scan, 3) for scan in scans]
    gap = wire.GapFrame(77, 5, 9, 5, 30, "evicted", "", 3, 10, 20)
    event = wire.EventFrame(3, 4_000_000_000, "link-down", "connect: refused", "")
    gap_then = msgspec.msgpack.encode(_gap_fields(gap, 11))  # before a gap had a priority
    frames += [gap_then, wire.encode_frame(event)]
    clocks = [
        wire.ClockRow(3, "0b5c9f0e-5a9b-4b59-8f34-1f1fd4f6a001", 500, 1_790_000_000_000_000_500, True, 1000)
    ]
    sealed = wire.seal("acme/plant-1", 77, 10, frames, [layout], clocks, 18)
    ack = wire.Ack(77, ((10, 14), (20, 25)), 1_790_000_001_000_000_000)
    nack = wire.Nack(77, 10, 14, "full", "the journal is full", 30.0)
    return {
        "version": wire.VERSION,
        "layout": msgspec.to_builtins(layout),
        "layout_id": packing.id,
        "clocks": [msgspec.to_builtins(row) for row in clocks],
        "scans": [
            {
                "taken_at_ns": s.taken_at_ns,
                "values": list(s.values),
                "shown": wire.shown(layout, s.values),
                "reasons": {str(i): int(r) for i, r in s.reasons.items()},
                "frame": f.hex(),
            }
            for s, f in zip(scans, frames, strict=False)
        ],
        "gap": {"fields": _gap_fields(gap, 11), "frame": frames[3].hex()},
        "event": {"fields": msgspec.to_builtins(event), "frame": frames[4].hex()},
        "batch": {
            "gateway": "acme/plant-1",
            "epoch": 77,
            "first": 10,
            "last": 14,
            "bytes": sealed.payload.hex(),
        },
        "ack": {"fields": msgspec.to_builtins(ack)[:4], "bytes": wire.encode_reply(ack).hex()},
        "nack": {"fields": msgspec.to_builtins(nack), "bytes": wire.encode_reply(nack).hex()},
    }


def _gap_fields(gap: wire.GapFrame, count: int) -> list[object]:
    fields: list[object] = msgspec.to_builtins(gap)
    return fields[:count]


def added() -> dict[str, object]:
    """What version 1 gained after its vectors were written."""
    whole = wire.GapFrame(77, 5, 9, 5, 30, "evicted", "", 3, 10, 20, "bulk", 5)
    sparse = wire.GapFrame(77, 5, 904, 300, 1800, "thinned", "", 3, 10, 20, "normal", 300)
    return {
        "gaps": [
            {"fields": msgspec.to_builtins(gap), "sparse": gap.sparse, "frame": wire.encode_frame(gap).hex()}
            for gap in (whole, sparse)
        ]
    }


if __name__ == "__main__":
    target = HERE / f"v{wire.VERSION}.json"
    if target.exists():
        raise SystemExit(f"{target} exists: the vectors of a version never change")
    target.write_text(json.dumps(examples(), indent=1, ensure_ascii=False) + "\n")
