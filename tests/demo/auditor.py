"""The audit: what the plant says it offered against what each sink holds, read through the sink's own interface.

Shares no code with the path: the embedded sink is read by plain SQL, the archive by deltalake and pyarrow, the plant's
own log as text. Every message of the plant carries a counter `n`, stored as the point of that name, so the audit knows
not only how many readings are missing but which, and when they were offered.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
from deltalake import DeltaTable

COUNTER = "n"  #: the point that carries the plant's counter


@dataclass
class Offered:
    """One stream of the plant: what it gave to a listening gateway."""

    readings_each: int = 0
    at_ns: dict[int, int] = field(default_factory=dict)  #: n -> boot clock

    @property
    def readings(self) -> int:
        return len(self.at_ns) * self.readings_each


@dataclass
class Held:
    """One device in one sink."""

    readings: int = 0
    seen: Counter[int] = field(default_factory=Counter)  #: n -> how often
    without_counter: int = 0  #: scans whose counter has no value (a failed read, kept with its reason)


@dataclass
class Sink:
    """What one sink holds, and what gap reports in it say is gone: after it was kept, or before (overruns)."""

    devices: dict[str, Held]
    gaps: int
    overruns: int


def read_log(path: Path) -> dict[str, Offered]:
    streams: dict[str, Offered] = {}
    for line in path.read_text().splitlines():
        stream, n, readings, at = line.split()
        entry = streams.setdefault(stream, Offered(int(readings)))
        entry.at_ns[int(n)] = int(at)
    return streams


def held_by_embedded(file: Path) -> Sink:
    """Per device what SQLite holds, and the readings that gap reports say are gone."""
    held: dict[str, Held] = {}
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        for device, count in db.execute(
            "SELECT d.name, count(*) FROM readings r JOIN points p ON p.id = r.point_id"
            " JOIN devices d ON d.id = p.device_id GROUP BY d.name"
        ):
            held[device] = Held(count)
        for device, value in db.execute(
            "SELECT d.name, r.value FROM readings r JOIN points p ON p.id = r.point_id"
            " JOIN devices d ON d.id = p.device_id WHERE p.name = ?",
            (COUNTER,),
        ):
            _count(held[device], value)
        # a gap without seqs is an overrun: it was never kept
        gaps = db.execute("SELECT coalesce(sum(lost_readings), 0) FROM gaps WHERE first_seq > 0").fetchone()[
            0
        ]
        overruns = db.execute("SELECT coalesce(sum(readings), 0) FROM gaps WHERE first_seq = 0").fetchone()[0]
    return Sink(held, gaps, overruns)


def held_by_archive(folder: Path) -> Sink:
    """The same from the Delta tables."""
    table = DeltaTable(str(folder / "readings")).to_pyarrow_table(columns=["device", "point", "value"])
    held: dict[str, Held] = {}
    for row in table.group_by("device").aggregate([("device", "count")]).to_pylist():
        held[row["device"]] = Held(row["device_count"])
    counters = table.filter(pc.equal(table["point"], COUNTER))
    for device, value in zip(counters["device"].to_pylist(), counters["value"].to_pylist(), strict=True):
        _count(held[device], value)
    gaps = overruns = 0
    if (folder / "gaps").exists():
        told = DeltaTable(str(folder / "gaps")).to_pyarrow_table(columns=["first", "readings"]).to_pylist()
        gaps = sum(row["readings"] for row in told if row["first"] > 0)
        overruns = sum(row["readings"] for row in told if row["first"] == 0)
    return Sink(held, gaps, overruns)


def _count(held: Held, value: float | None) -> None:
    if value is None:
        held.without_counter += 1
    else:
        held.seen[round(value)] += 1


@dataclass
class Verdict:
    """The account, and in words what is wrong with it."""

    offered: int
    kept: int
    uncommitted_lost: int
    overruns: int
    stored: int
    gaps: int
    doubled: int
    wrong: list[str]

    @property
    def ok(self) -> bool:
        return not self.wrong


def audit(
    offered: dict[str, Offered],
    kept: int,
    sinks: dict[str, Sink],
    ends: list[tuple[int, int]],
) -> Verdict:
    """`ends` are the (from, to) boot-clock spans in which an ended agent may have lost what it had not committed."""
    wrong: list[str] = []
    doubled = 0
    missing_most = 0
    for sink, content in sinks.items():
        held = content.devices
        missing_here = 0
        wrong += [f"{sink}: device {device} was never offered" for device in held.keys() - offered.keys()]
        for stream, source in offered.items():
            got = held.get(stream, Held())
            twice = sum(count - 1 for count in got.seen.values())
            if twice:
                doubled += twice * source.readings_each
                wrong.append(f"{sink}: {stream}: {twice} messages are stored more than once")
            strange = got.seen.keys() - source.at_ns.keys()
            if strange:
                wrong.append(f"{sink}: {stream}: counters that the plant never sent: {sorted(strange)[:5]}")
            scans = sum(got.seen.values()) + got.without_counter
            if got.readings != scans * source.readings_each:
                wrong.append(
                    f"{sink}: {stream}: {got.readings} readings in {scans} scans; expected {source.readings_each} each"
                )
            missing = sorted(source.at_ns.keys() - got.seen.keys())
            outside = [n for n in missing if not any(a <= source.at_ns[n] <= b for a, b in ends)]
            # a read that failed on the way back is kept as a scan without values: it stands for one that is missing
            if len(outside) > got.without_counter:
                wrong.append(f"{sink}: {stream}: lost outside the commit window: n = {outside[:5]}")
            missing_here += (len(missing) - got.without_counter) * source.readings_each
        missing_most = max(missing_most, missing_here)
    stored = min(sum(held.readings for held in sink.devices.values()) for sink in sinks.values())
    gaps = max(sink.gaps for sink in sinks.values())
    overruns = max(sink.overruns for sink in sinks.values())
    total = sum(source.readings for source in offered.values())
    lost = total - kept - overruns
    if kept != stored + gaps:
        wrong.append(f"kept {kept} is not stored {stored} + gaps {gaps}")
    if lost != missing_most - gaps - overruns:
        wrong.append(f"uncommitted {lost} by count, {missing_most - gaps - overruns} by counter")
    if lost < 0:
        wrong.append(f"kept {kept} is more than the {total} that were offered")
    return Verdict(total, kept, lost, overruns, stored, gaps, doubled, wrong)
