"""Decoding gives exactly what the wire module itself would show, and one bad frame costs itself alone."""

from __future__ import annotations

import math
import random
import struct
import time
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.decode import (
    AHEAD_NS,
    EARLIEST_NS,
    MAX_LAYOUTS,
    Decoder,
    alone,
    frame_of,
    overlap,
)
from cloud.journal.contract import Range, Stored
from cloud.sinks.contract import EventRecord, GapRecord, ScanRecord
from cloud.skew import SKEW_NS, Skews
from drivers.contract import Point, Reason, Scan, Value, ValueType
from sync.wire import (
    MAX_EPOCH,
    ClockRow,
    EventFrame,
    GapFrame,
    Layout,
    Packing,
    encode_frame,
    encode_scan,
    layout_of,
    open_body,
    seal,
    shown,
)

S = 1_000_000_000
WALL_NS = 1_795_000_000 * S
RECEIVED_NS = WALL_NS + 3_600 * S
CLOCKS = (ClockRow(1, "boot", 0, WALL_NS, True),)
AB = (Point(name="a", type=ValueType.U16, scale=0.1, unit="Cel"), Point(name="b", type=ValueType.F32))
UNKNOWN_FRAME = b"\x91\x63"


def stored(
    frames: Sequence[bytes],
    layouts: Sequence[Layout] = (),
    *,
    clocks: Sequence[ClockRow] = CLOCKS,
    first: int = 1,
    fresh: tuple[Range, ...] | None = None,
    received_at_ns: int = RECEIVED_NS,
) -> Stored:
    sealed = seal("acme/plant-1", 7, first, frames, layouts, clocks, 0)
    return Stored(
        5, "acme/plant-1", 7, first, sealed.last, 0, received_at_ns, fresh or ((first, sealed.last),), sealed.payload
    )  # fmt: skip


def scans(entry: Stored) -> list[ScanRecord]:
    decoded = Decoder().decode(entry)
    assert decoded.poison == []
    return [record for record in decoded.records if isinstance(record, ScanRecord)]


def ab(*values: tuple[int, float], at_s: int = 10, boot: int = 1) -> tuple[list[bytes], list[Layout]]:
    packing = Packing(layout_of("boiler", "modbus", "heating", AB))
    return [encode_scan(packing, Scan((at_s + n) * S, AB, pair), boot) for n, pair in enumerate(values)], [
        packing.layout
    ]


def test_a_scan_becomes_what_a_person_sees() -> None:
    (record,) = scans(stored(*ab((234, 1.5)), first=41))
    assert record == ScanRecord(
        5, "acme", "plant-1", 7, 41, layout_of("boiler", "modbus", "heating", AB), record.layout_id,
        WALL_NS + 10 * S, True, RECEIVED_NS, [23.4, 1.5], {}, 1, 10 * S,
    )  # fmt: skip


NUMBERS: dict[str, st.SearchStrategy[Value]] = {
    "bool": st.booleans(),
    "i8": st.integers(-(2**7), 2**7 - 1),
    "u8": st.integers(0, 2**8 - 1),
    "i16": st.integers(-(2**15), 2**15 - 1),
    "u16": st.integers(0, 2**16 - 1),
    "i32": st.integers(-(2**31), 2**31 - 1),
    "u32": st.integers(0, 2**32 - 1),
    "i64": st.integers(-(2**63), 2**63 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "f32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "f64": st.floats(allow_nan=False, allow_infinity=False, max_value=1e300, min_value=-1e300),
    "str": st.text(max_size=20),
}
SCALES = st.sampled_from([1.0, 0.1, 0.01, 0.001, 0.5, 10.0, 0.025, -1.0, 1 / 3, 0.2])
OFFSETS = st.sampled_from([0.0, 0.0, -40.0, 273.15])


@st.composite
def layouts_and_values(draw: st.DrawFn) -> tuple[tuple[Point, ...], list[list[Value]]]:
    kinds = draw(st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, max_size=12))
    points = tuple(
        Point(name=f"p{i}", type=ValueType(kind), scale=draw(SCALES), offset=draw(OFFSETS))
        for i, kind in enumerate(kinds)
    )
    rows = draw(st.lists(st.tuples(*(NUMBERS[kind] for kind in kinds)).map(list), min_size=1, max_size=4))
    return points, rows


@settings(max_examples=300, deadline=None)
@given(layouts_and_values())
def test_the_compiled_conversion_is_the_wires_own_for_every_layout(
    given_: tuple[tuple[Point, ...], list[list[Value]]],
) -> None:
    points, rows = given_
    layout = layout_of("boiler", "modbus", "heating", points)
    packing = Packing(layout)
    frames = [encode_scan(packing, Scan(n * S, points, row), 1) for n, row in enumerate(rows)]
    for record, row in zip(scans(stored(frames, [layout])), rows, strict=True):
        raw = packing.unpack(*packing.pack(row))
        for got, wanted in zip(record.values, shown(layout, raw), strict=True):
            assert got == wanted
            assert type(got) is type(wanted)
        assert record.reasons == {}


def test_no_value_is_none_and_a_doubtful_value_is_kept() -> None:
    packing = Packing(layout_of("boiler", "modbus", "heating", AB))
    frames = [
        encode_scan(packing, Scan(S, AB, (None, 99.5), {0: Reason.TIMEOUT, 1: Reason.RANGE}), 1),
        encode_scan(packing, Scan(S, AB, (None, None), dict.fromkeys((0, 1), Reason.DISCONNECTED)), 1),
        encode_scan(packing, Scan(S, AB, (7, 1.0), {0: Reason.STUCK}), 1),
    ]
    found = scans(stored(frames, [packing.layout]))
    assert [list(record.values) for record in found] == [[None, 99.5], [None, None], [0.7, 1.0]]
    assert found[0].reasons == {0: Reason.TIMEOUT, 1: Reason.RANGE}
    assert found[1].reasons == {0: Reason.DISCONNECTED, 1: Reason.DISCONNECTED}
    assert found[2].reasons == {0: Reason.STUCK}


def test_what_is_not_a_number_never_gets_through() -> None:
    points = (
        Point(name="f", type=ValueType.F32), Point(name="s", type=ValueType.STR), Point(name="d", type=ValueType.F64),
        Point(name="scaled", type=ValueType.F64, scale=1e10), Point(name="u", type=ValueType.U16),
    )  # fmt: skip
    packing = Packing(layout_of("boiler", "modbus", "heating", points))
    values: list[Value | None] = [math.nan, "x", -math.inf, 1e305, 5]
    (record,) = scans(
        stored([encode_scan(packing, Scan(S, points, values, {0: Reason.RANGE}), 1)], [packing.layout])
    )
    assert list(record.values) == [None, "x", None, None, 5]
    assert record.reasons == {0: Reason.NAN, 2: Reason.INFINITE, 3: Reason.INFINITE}


def test_finite_values_whose_sum_is_not_stay() -> None:
    points = (Point(name="a", type=ValueType.F64), Point(name="b", type=ValueType.F64))
    packing = Packing(layout_of("boiler", "modbus", "heating", points))
    (record,) = scans(
        stored([encode_scan(packing, Scan(S, points, (1.7e308, 1.7e308)), 1)], [packing.layout])
    )
    assert list(record.values) == [1.7e308, 1.7e308]
    assert record.reasons == {}


def test_a_text_that_is_missing_has_a_reason() -> None:
    points = (Point(name="s", type=ValueType.STR),)
    packing = Packing(layout_of("boiler", "modbus", "heating", points))
    (record,) = scans(stored([encode_scan(packing, Scan(S, points, (None,)), 1)], [packing.layout]))
    assert (list(record.values), record.reasons) == ([None], {0: Reason.MISSING})


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, 5e-324, 1e308, -1e-320])
def test_a_senseless_scale_harms_nothing(scale: float) -> None:
    points = (
        Point(name="a", type=ValueType.U64, scale=scale, offset=1.0),
        Point(name="b", type=ValueType.F64, scale=scale),
    )
    packing = Packing(layout_of("boiler", "modbus", "heating", points))
    (record,) = scans(
        stored([encode_scan(packing, Scan(S, points, (2**64 - 1, 1e308)), 1)], [packing.layout])
    )
    for i, value in enumerate(record.values):
        assert (value is None) == (i in record.reasons)
        assert value is None or math.isfinite(value)  # type: ignore[arg-type]


# --- what is taken ---


def test_only_fresh_seqs_become_records() -> None:
    frames, layouts = ab(*((n, 1.0) for n in range(10)))
    entry = stored(frames, layouts, first=100, fresh=((101, 102), (109, 109)))
    assert [record.seq for record in scans(entry)] == [101, 102, 109]


def test_the_same_entry_gives_the_same_records_every_time() -> None:
    frames, layouts = ab(
        *((n, 1.0) for n in range(10)), boot=2
    )  # a boot with no clock row: its time is estimated
    entry = stored(frames, layouts)
    decoder = Decoder()
    assert decoder.decode(entry) == decoder.decode(entry) == Decoder().decode(entry)
    split = [
        msgspec.structs.replace(entry, fresh=((1, 4),)),
        msgspec.structs.replace(entry, fresh=((5, 10),)),
    ]
    assert [r for part in split for r in decoder.decode(part).records] == decoder.decode(entry).records


def test_gaps_and_events_become_records_with_their_times() -> None:
    gap = GapFrame(7, 3, 9, 7, 21, "evicted", "boiler", 1, 2 * S, 8 * S)
    event = EventFrame(1, 9 * S, "start", "agent 0.1.0")
    decoded = Decoder().decode(stored([encode_frame(gap), encode_frame(event)]))
    assert decoded.records == [
        GapRecord(5, "acme", "plant-1", 7, 1, gap, WALL_NS + 2 * S, WALL_NS + 8 * S, RECEIVED_NS),
        EventRecord(5, "acme", "plant-1", 7, 2, event, WALL_NS + 9 * S, RECEIVED_NS),
    ]
    assert decoded.poison == []


# --- what does not decode ---


def test_a_frame_that_does_not_decode_costs_itself_alone() -> None:
    frames, layouts = ab((1, 1.0), (2, 2.0))
    good = frames[0]
    fields = msgspec.msgpack.decode(good)
    absent = msgspec.msgpack.encode([*fields[:1], 12345, *fields[2:]])
    short = msgspec.msgpack.encode([*fields[:4], b"\0", *fields[5:]])
    triple = msgspec.msgpack.encode([*fields[:5], struct.pack("<HB", 9, 1), *fields[6:]])
    endless = encode_frame(GapFrame(7, 1, MAX_EPOCH + 1, 1, 1, "evicted", "", 1, 0, 0))
    negative = encode_frame(GapFrame(7, 1, 2, 1, -5, "evicted", "", 1, 0, 0))
    bad = [UNKNOWN_FRAME, absent, short, triple, endless, negative, b"\xc0", b"\x90", b"\xa3abc"]
    entry = stored([good, *bad, frames[1]], layouts)
    decoded = Decoder().decode(entry)
    assert [record.seq for record in decoded.records] == [1, 11]
    assert [(one.first, one.last) for one in decoded.poison] == [(n, n) for n in range(2, 11)]
    assert all(one.gateway == "acme/plant-1" and one.offset == 5 and one.reason for one in decoded.poison)
    assert "0000000000003039" in decoded.poison[1].reason


def test_a_frame_nested_a_thousandfold_is_poison_and_no_crash() -> None:
    frames, layouts = ab((1, 1.0))
    nested = b"\x97\x02\x01\x02\xa1a\xa1b\xa0" + b"\x91" * 50_000 + b"\xc0"
    decoded = Decoder().decode(stored([frames[0], nested], layouts))
    assert (decoded.records, [(one.first, one.last) for one in decoded.poison]) == ([], [(1, 2)])


def test_clocks_that_no_column_holds_harm_nothing() -> None:
    frames, layouts = ab((1, 1.0))
    fields = msgspec.msgpack.decode(frames[0])
    for boot, taken in ((1, 2**64 - 1), (1, -(2**63)), (2**64 - 1, S), (-1, S)):
        (record,) = scans(stored([msgspec.msgpack.encode([*fields[:2], boot, taken, *fields[4:]])], layouts))
        assert (list(record.values), record.taken_at_ns) == ([0.1, 1.0], record.received_at_ns)
        assert record.boot in (0, 1)
        assert record.boot_ns in (0, S)


def test_a_layout_that_no_frame_can_have_poisons_its_own_frames_only() -> None:
    frames, layouts = ab((1, 1.0))
    broken = msgspec.structs.replace(layouts[0], types=("u16", "x99"), device="pump")
    fields = msgspec.msgpack.decode(frames[0])
    from sync.wire import layout_id

    theirs = msgspec.msgpack.encode([fields[0], layout_id(broken), *fields[2:]])
    decoded = Decoder().decode(stored([frames[0], theirs], [*layouts, broken]))
    assert [record.seq for record in decoded.records] == [1]
    assert "x99" in decoded.poison[0].reason


def test_a_body_that_does_not_decode_is_poison_in_its_fresh_ranges() -> None:
    frames, layouts = ab(*((n, 1.0) for n in range(10)))
    entry = stored(frames, layouts, fresh=((2, 3), (8, 10)))
    for payload in (entry.payload[:-1], b"", entry.payload[:-8] + b"\0" * 8, b"\x21" + entry.payload[1:]):
        decoded = Decoder().decode(msgspec.structs.replace(entry, payload=payload))
        assert decoded.records == []
        assert [(one.first, one.last) for one in decoded.poison] == [(2, 3), (8, 10)]
        assert all(one.reason for one in decoded.poison)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_frame_whatever_makes_the_decoder_fail(data: st.DataObject) -> None:
    frames, layouts = ab((1, 1.0), (2, 2.0))
    wild = data.draw(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats()
            | st.text()
            | st.binary(),
            lambda inner: st.lists(inner, max_size=9),
            max_leaves=20,
        )
    )
    kind = data.draw(st.integers(0, 3))
    spoilt = msgspec.msgpack.encode([kind, *(wild if isinstance(wild, list) else [wild])])
    decoded = Decoder().decode(stored([frames[0], spoilt, frames[1]], layouts))
    taken = {record.seq for record in decoded.records} | {one.first for one in decoded.poison}
    assert taken == {1, 2, 3}
    assert {1, 3} <= {record.seq for record in decoded.records}


# --- time ---


def times(
    clocks: Sequence[ClockRow], *boot_s: int, received_at_ns: int = RECEIVED_NS
) -> list[tuple[int, bool]]:
    packing = Packing(layout_of("boiler", "modbus", "heating", AB))
    frames = [encode_scan(packing, Scan(at * S, AB, (1, 1.0)), 1) for at in boot_s]
    entry = stored(frames, [packing.layout], clocks=clocks, received_at_ns=received_at_ns)
    return [(record.taken_at_ns, record.clock_synchronized) for record in scans(entry)]


def test_the_last_synchronized_row_tells_the_time() -> None:
    clocks = [
        ClockRow(1, "b", 0, WALL_NS - 500 * S, False), ClockRow(1, "b", 10 * S, WALL_NS, True),
        ClockRow(1, "b", 20 * S, WALL_NS + 999 * S, False),
    ]  # fmt: skip
    assert times(clocks, 5, 30) == [(WALL_NS - 5 * S, True), (WALL_NS + 20 * S, True)]


def test_an_unsynchronized_clock_is_believed_and_flagged() -> None:
    assert times([ClockRow(1, "b", 0, WALL_NS, False)], 5) == [(WALL_NS + 5 * S, False)]


@pytest.mark.parametrize(
    "wall_ns",
    [0, EARLIEST_NS - 100 * S, RECEIVED_NS + AHEAD_NS + S, 2**62, -(2**62)],
    ids=["1970", "before 2000", "ahead by more than a day", "2116", "before Christ"],
)
def test_a_time_that_cannot_be_true_is_estimated_from_the_receipt(wall_ns: int) -> None:
    """The newest was taken when the batch came, the others as much earlier as the boot clock says."""
    assert times([ClockRow(1, "b", 10 * S, wall_ns, True)], 10, 40, 25) == [
        (RECEIVED_NS - 30 * S, False),
        (RECEIVED_NS, False),
        (RECEIVED_NS - 15 * S, False),
    ]


def test_a_boot_without_any_clock_row_is_estimated_too() -> None:
    assert times([], 10, 40) == [(RECEIVED_NS - 30 * S, False), (RECEIVED_NS, False)]


def test_a_boot_clock_that_makes_no_sense_ends_at_the_receipt() -> None:
    assert times([], 0, 10**9 * 4) == [(RECEIVED_NS, False), (RECEIVED_NS, False)]


def test_a_clock_that_runs_ahead_keeps_its_time_and_is_flagged() -> None:
    ahead = RECEIVED_NS + SKEW_NS
    assert times([ClockRow(1, "b", 0, ahead, True)], 0, 1) == [(ahead, True), (ahead + S, False)]


def test_a_batch_of_a_clock_that_runs_ahead_counts_once_whoever_decodes_it_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    skews = Skews(60 * S)
    sinks = [Decoder(skews), Decoder(skews)]
    frames, layouts = ab((1, 2.0), (3, 4.0), at_s=0)

    def entry(offset: int, ahead_s: int, *, received_at_ns: int = RECEIVED_NS) -> Stored:
        clocks = [ClockRow(1, "b", 0, received_at_ns + ahead_s * S, True)]
        made = stored(frames, layouts, clocks=clocks, received_at_ns=received_at_ns)
        return msgspec.structs.replace(made, offset=offset)

    for decoder in sinks:
        for at, ahead_s in enumerate((0, 59, 60, 400, 3 * 86_400)):
            records = decoder.decode(entry(at + 1, ahead_s)).records
            flags = [r.clock_synchronized for r in records if isinstance(r, ScanRecord)]
            assert flags == [ahead_s <= 60, ahead_s + 1 <= 60], ahead_s
    assert skews.batches == {"acme/plant-1": 3}
    [said] = [r.getMessage() for r in caplog.records]
    assert "gateway acme/plant-1: its clock is ahead by 61 s, and 60 s are tolerated" in said
    sinks[0].decode(entry(6, 400, received_at_ns=RECEIVED_NS + 7200 * S))
    assert skews.batches == {"acme/plant-1": 4}
    assert len(caplog.records) == 2


def test_data_of_a_month_ago_keeps_its_time() -> None:
    month = 30 * 86_400 * S
    assert times(CLOCKS, 5, received_at_ns=WALL_NS + month) == [(WALL_NS + 5 * S, True)]


# --- alone ---


@pytest.mark.parametrize(
    "clocks", [CLOCKS, (), (ClockRow(1, "b", 0, 0, True),)], ids=["good", "none", "1970"]
)
def test_a_frame_kept_alone_decodes_to_the_same_record(clocks: Sequence[ClockRow]) -> None:
    frames, layouts = ab(*((n, n / 2) for n in range(20)))
    frames.append(encode_frame(GapFrame(7, 3, 9, 7, 21, "evicted", "boiler", 1, 2 * S, 8 * S)))
    frames.append(encode_frame(EventFrame(1, 9 * S, "start", "agent 0.1.0")))
    other = layout_of("pump", "modbus", "heating", AB)
    entry = stored(frames, [*layouts, other], clocks=clocks, first=50)
    decoder = Decoder()
    whole = decoder.decode(entry)
    body = open_body(entry.payload)[1]
    for record in whole.records:
        kept = alone(decoder, entry, body, frame_of(entry, body, record.seq), record)
        assert (kept.first, kept.last, kept.fresh) == (record.seq, record.seq, ((record.seq, record.seq),))
        again = Decoder().decode(kept)
        assert again.poison == []
        assert len(kept.payload) < len(entry.payload) + 200
        assert len(open_body(kept.payload)[1].layouts) == isinstance(record, ScanRecord)
        (same,) = again.records
        if isinstance(record, GapRecord) and clocks is not CLOCKS:
            assert isinstance(same, GapRecord)
            assert (same.from_ns, same.gap) == (record.from_ns, record.gap)
        else:
            assert same == record


def test_overlap_counts_seqs() -> None:
    assert overlap(((1, 3), (7, 9)), 3, 7) == 2
    assert overlap((), 1, 9) == 0


# --- memory and speed ---


def test_layouts_do_not_pile_up() -> None:
    decoder = Decoder()
    points = (Point(name="a", type=ValueType.U8),)
    for n in range(MAX_LAYOUTS + 50):
        decoder.compiled(layout_of(f"d{n}", "modbus", "heating", points))
    assert len(decoder._compiled) == MAX_LAYOUTS


@pytest.mark.parametrize(("points", "scale"), [(32, 1.0), (32, 0.1), (125, 1.0), (125, 0.1)])
def test_a_core_decodes_more_than_a_million_and_a_half_values_a_second(points: int, scale: float) -> None:
    """CPU time, the best of several: other programs share the machine."""
    rng = random.Random(1)
    columns = tuple(Point(name=f"p{i}", type=ValueType.U16, scale=scale) for i in range(points))
    packing = Packing(layout_of("boiler", "modbus", "heating", columns))
    frames = [
        encode_scan(packing, Scan(n * S, columns, [rng.randrange(65536) for _ in columns]), 1)
        for n in range(60)
    ]
    entry = stored(frames, [packing.layout])
    decoder = Decoder()
    best_s = math.inf
    for _ in range(20):
        started = time.process_time()
        decoder.decode(entry)
        best_s = min(best_s, time.process_time() - started)
    assert points * 60 / best_s > 1_500_000


def test_a_gateways_own_word_on_its_skew_is_taken_where_it_is_a_number() -> None:
    from cloud.skew import skew_in

    assert skew_in({"link": {"skew_s": -7.5}}) == -7.5
    odd: tuple[object, ...] = (None, [], {}, {"link": 1}, {"link": {"skew_s": None}})
    assert [skew_in(one) for one in odd] == [None] * 5
