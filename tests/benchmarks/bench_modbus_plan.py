"""The Modbus planner and decoder by themselves, beside what plain Python takes for the same.

    python -m tests.benchmarks.bench_modbus_plan [--rounds 20] [--json]

The baselines: sorting the 10,000 points (the planner cannot do with less), and one `struct.unpack_from` per value.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import time
from collections.abc import Callable

from drivers.codec import Encoding, Field, RegisterDecoder
from drivers.contract import ValueType
from drivers.modbus_plan import NETWORK, Limits, Span, Table, cost_of, plan, serial_cost

POINTS = 10_000
SERIAL = serial_cost(11 / 9600, 3.5 * 11 / 9600)


def _best_s(once: Callable[[], object], rounds: int, times: int = 1) -> float:
    """Seconds of one call; the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(times):
            once()
        best = min(best, (time.perf_counter() - begun) / times)
    return best


def measure(rounds: int) -> list[dict[str, float | str]]:
    rng = random.Random(7)
    rows: list[dict[str, float | str]] = []
    layouts = {
        "adjacent u16": [Span(Table.HOLDING, n) for n in range(POINTS)],
        "scattered f32": [Span(Table.HOLDING, n * 7919 % 65_000, 2) for n in range(POINTS)],
        "coils": [Span(Table.COIL, n) for n in rng.sample(range(65_536), POINTS)],
        "all four tables": [
            Span(rng.choice(list(Table)), rng.randrange(65_000), rng.choice((1, 2, 4))) for _ in range(POINTS)
        ],
    }
    for name, spans in layouts.items():
        sort_s = _best_s(lambda s=spans: sorted(s, key=lambda span: (span.first, -span.end)), rounds)  # type: ignore[misc]
        for line, cost in (("network", NETWORK), ("9600 baud", SERIAL)):
            took_s = _best_s(lambda s=spans, c=cost: plan(s, Limits(), c), rounds)  # type: ignore[misc]
            blocks = plan(spans, Limits(), cost)
            rows.append(
                {
                    "case": f"plan {POINTS} points, {name}, {line}",
                    "ms": round(took_s * 1000, 2),
                    "requests": len(blocks),
                    "line_s": round(cost_of(blocks, cost), 2),
                    "ratio_to_sorting": round(took_s / sort_s, 1),
                }
            )
    data = struct.pack(">62f", *(rng.uniform(-1e4, 1e4) for _ in range(62))) + b"\0\0"
    kinds = {
        "62 x f32": [Field(at=4 * n, type=ValueType.F32) for n in range(62)],
        "62 x f32 CDAB": [Field(at=4 * n, type=ValueType.F32, order="CDAB") for n in range(62)],
        "125 x u16": [Field(at=2 * n, type=ValueType.U16) for n in range(125)],
        "62 x bcd": [Field(at=4 * n, type=ValueType.U32, encoding=Encoding.BCD) for n in range(62)],
        "61 x i16 with a scale register": [
            Field(at=4 * n, type=ValueType.F64, encoding=Encoding.I16, scale_at=4 * n + 2) for n in range(61)
        ],
        "125 x 16 bits": [
            Field(at=2 * n, type=ValueType.BOOL, bit=bit) for n in range(125) for bit in range(16)
        ],
    }
    floats = struct.Struct(">f")
    baseline_s = _best_s(lambda: [floats.unpack_from(data, 4 * n)[0] for n in range(62)], rounds, 200)
    for name, fields in kinds.items():
        decoder = RegisterDecoder(fields)
        took_s = _best_s(lambda d=decoder: d.decode(data), rounds, 200)  # type: ignore[misc]
        rows.append(
            {
                "case": f"decode {name}",
                "us": round(took_s * 1e6, 2),
                "ns_per_value": round(took_s * 1e9 / len(fields)),
                "ratio_to_unpack_per_float": round(took_s / len(fields) / (baseline_s / 62), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row.pop('case'):>52}: " + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
