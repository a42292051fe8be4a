"""Bytes on the wire per reading, and the cost of the wire format, on the corpus of `tests/corpus/`.

Baselines of the same run: the same scans as JSON (the usual way), and a bare `struct.pack` of each scan.
"""

from __future__ import annotations

import csv
import json
import struct
import time
import zlib
from pathlib import Path

from drivers.contract import Point, Scan, Value, ValueType
from sync import wire

CORPUS = Path(__file__).parents[1] / "corpus"
BATCHES = (1, 10, 60, 300)


def read(name: str) -> tuple[tuple[Point, ...], list[list[Value | None]]]:
    with (CORPUS / name).open() as file:
        names, types, scales, units, *rows = csv.reader(file)
    points = tuple(
        Point(name=n, type=ValueType(t), scale=float(s), unit=u)
        for n, t, s, u in zip(names, types, scales, units, strict=True)
    )
    cast = {"f32": float, "bool": lambda text: text == "1"}
    return points, [
        [cast.get(p.type.value, int)(cell) for p, cell in zip(points, row, strict=True)] for row in rows
    ]


def main() -> None:
    for name in ("quantised.csv", "float32.csv"):
        points, rows = read(name)
        packing = wire.Packing(wire.layout_of("plant-room", "modbus", "plant", points))
        start = 86_400 * 10**9
        scans = [Scan(start + k * 10**9 + (k * 7919) % 200_000, points, row) for k, row in enumerate(rows)]
        began = time.process_time()
        frames = [wire.encode_scan(packing, scan, 1) for scan in scans]
        encode_s = time.process_time() - began
        bare = struct.Struct(
            "<"
            + "".join({"bool": "B", "u16": "H", "i16": "h", "u32": "I", "f32": "f"}[p.type] for p in points)
        )
        began = time.process_time()
        for row in rows:
            bare.pack(*row)
        bare_s = time.process_time() - began
        clocks = [
            wire.ClockRow(1, "0b5c9f0e-5a9b-4b59-8f34-1f1fd4f6a001", start, 1_790_000_000 * 10**9, True)
        ]
        readings = len(rows) * len(points)
        for size in BATCHES:
            sealed = [
                wire.seal(
                    "acme/plant-1",
                    2**61 + 17,
                    1 + at,
                    frames[at : at + size],
                    [packing.layout],
                    clocks,
                    32 * size,
                )
                for at in range(0, len(frames), size)
            ]
            total = sum(len(batch.payload) for batch in sealed)
            told = [
                json.dumps(
                    {
                        "ts": scan.taken_at_ns // 10**6,
                        "values": dict(zip(packing.layout.names, row, strict=True)),
                    }
                )
                for scan, row in zip(scans, rows, strict=True)
            ]
            plain = sum(len(text) for text in told)
            squeezed = sum(
                len(zlib.compress(("[" + ",".join(told[at : at + size]) + "]").encode()))
                for at in range(0, len(told), size)
            )
            print(
                f"{name:14} {size:4} scans a batch: {total / readings:5.2f} bytes per reading on the wire"
                f" ({total / plain:.3f} of JSON, {total / squeezed:.2f} of JSON with zlib)"
            )
        began = time.process_time()
        for batch in sealed:
            _, body = wire.open_body(batch.payload)
            for raw in body.frames:
                frame = wire.decode_frame(raw)
                assert isinstance(frame, wire.ScanFrame)
                packing.unpack(frame.values, frame.texts)
        decode_s = time.process_time() - began
        print(
            f"{name:14} encode {readings / encode_s / 1e6:.1f} M readings/s ({encode_s / bare_s:.1f} x a struct.pack),"
            f" decode {readings / decode_s / 1e6:.1f} M readings/s"
        )


if __name__ == "__main__":
    main()
