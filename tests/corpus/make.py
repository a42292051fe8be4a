"""Makes the corpus that byte figures are measured on: `python -m tests.corpus.make`.

A physical model of a small plant room, 32 points once a second for ten minutes: three-phase mains with load steps, a
boiler and its loop with thermal lags, flows, pressures, counters that integrate what flows, a few states. Two files:
`quantised.csv` as instruments give it (integers of their own resolution plus their noise), `float32.csv` the same
signals as raw 32-bit floats with full noise. The files are kept, so a figure can be compared over the years.
"""

from __future__ import annotations

import csv
import math
import random
import struct
from pathlib import Path

HERE = Path(__file__).parent
SCANS = 600
# name, type, scale, unit, noise (standard deviation, in the unit)
POINTS = (
    *[(f"voltage_l{k}", "u16", 0.1, "V", 0.12) for k in (1, 2, 3)],
    *[(f"current_l{k}", "u16", 0.01, "A", 0.015) for k in (1, 2, 3)],
    *[(f"power_l{k}", "i16", 1.0, "W", 3.0) for k in (1, 2, 3)],
    *[(f"power_factor_l{k}", "i16", 0.001, "", 0.0015) for k in (1, 2, 3)],
    ("frequency", "u16", 0.01, "Hz", 0.006),
    ("energy", "u32", 0.01, "kWh", 0.0),
    ("boiler_flow_temperature", "i16", 0.1, "Cel", 0.05),
    ("boiler_return_temperature", "i16", 0.1, "Cel", 0.05),
    ("loop_1_temperature", "i16", 0.1, "Cel", 0.05),
    ("loop_2_temperature", "i16", 0.1, "Cel", 0.05),
    ("tank_top_temperature", "i16", 0.1, "Cel", 0.04),
    ("tank_bottom_temperature", "i16", 0.1, "Cel", 0.04),
    ("outdoor_temperature", "i16", 0.1, "Cel", 0.04),
    ("room_temperature", "i16", 0.1, "Cel", 0.03),
    ("room_humidity", "u16", 0.1, "%", 0.08),
    ("loop_pressure", "u16", 0.01, "bar", 0.006),
    ("loop_flow", "u16", 0.1, "l/min", 0.3),
    ("tap_flow", "u16", 0.1, "l/min", 0.05),
    ("volume", "u32", 1.0, "l", 0.0),
    ("heat", "u32", 0.1, "kWh", 0.0),
    ("pump_speed", "u16", 1.0, "1/min", 4.0),
    ("valve_position", "u16", 0.1, "%", 0.0),
    ("burner_on", "bool", 1.0, "", 0.0),
    ("alarm_word", "u16", 1.0, "", 0.0),
)


def rows() -> list[list[float]]:
    rng = random.Random(20261123)
    load = [800.0, 1200.0, 400.0]
    boiler, back, loops, tank = 62.0, 50.0, [45.0, 41.0], [58.0, 46.0]
    room, outdoor, humidity = 21.0, 4.0, 45.0
    energy, heat, volume = 48_211.0, 9_120.0, 182_004.0
    burner, tap = False, 0.0
    out = []
    for t in range(SCANS):
        for k in range(3):
            if rng.random() < 0.02:
                load[k] = rng.choice((150.0, 400.0, 800.0, 1200.0, 2300.0))
        if rng.random() < 0.01:
            tap = rng.choice((0.0, 0.0, 6.0, 9.5))
        burner = boiler < 58.0 or (burner and boiler < 68.0)
        boiler += (0.12 if burner else -0.05) - 0.002 * tap
        back += (boiler - 11.0 - back) / 40
        loops = [
            x + (boiler - offset - x) / lag
            for x, offset, lag in zip(loops, (17.0, 21.0), (60, 90), strict=True)
        ]
        tank = [
            x + (boiler - offset - x) / lag
            for x, offset, lag in zip(tank, (5.0, 15.0), (300, 500), strict=True)
        ]
        room += (20.5 + 0.4 * math.sin(t / 200) - room) / 400
        outdoor += 0.0006
        humidity += (45 + 2 * math.sin(t / 300) - humidity) / 100
        mains = [230.4 + 1.2 * math.sin(t / 90 + k) - load[k] / 900 for k in range(3)]
        factor = [0.98 - 80 / max(100.0, load[k]) * 0.1 for k in range(3)]
        amps = [load[k] / mains[k] / factor[k] for k in range(3)]
        flow = 14.0 + 2 * math.sin(t / 50)
        energy += sum(load) / 3.6e6
        heat += flow / 60 * 4.19 * (boiler - back) / 3600
        volume += (flow + tap) / 60
        out.append([
            *mains, *amps, *load, *factor, 50.0 + 0.02 * math.sin(t / 30), energy,
            boiler, back, *loops, *tank, outdoor, room, humidity, 1.82 + 0.001 * (boiler - 60), flow, tap, volume, heat,
            1450 + 10 * flow, 40 + 15 * math.sin(t / 120) // 1, float(burner), 0.0,
        ])  # fmt: skip
    return out


def main() -> None:
    rng = random.Random(7)
    model = rows()
    with (HERE / "quantised.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(
            ([p[0] for p in POINTS], [p[1] for p in POINTS], [p[2] for p in POINTS], [p[3] for p in POINTS])
        )
        for row in model:
            noisy = [
                value + rng.gauss(0, point[4]) if point[4] else value
                for value, point in zip(row, POINTS, strict=True)
            ]
            writer.writerow(
                [
                    max(0, round(v / p[2])) if p[1][0] != "i" else round(v / p[2])
                    for v, p in zip(noisy, POINTS, strict=True)
                ]
            )
    with (HERE / "float32.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(([p[0] for p in POINTS], ["f32"] * 32, [1.0] * 32, [p[3] for p in POINTS]))
        for row in model:
            noisy = [
                value + rng.gauss(0, max(point[4], 0.001)) for value, point in zip(row, POINTS, strict=True)
            ]
            writer.writerow([repr(struct.unpack("<f", struct.pack("<f", v))[0]) for v in noisy])


if __name__ == "__main__":
    main()
