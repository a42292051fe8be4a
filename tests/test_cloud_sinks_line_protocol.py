"""Lines that InfluxDB reads as they were meant (on the real server: test_cloud_sinks_influxdb.py)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.sinks.contract import EventRecord, GapRecord, Record, ScanRecord
from cloud.sinks.line_protocol import (
    MAX_NS,
    LineWriter,
    Unwritable,
    field_name,
    quality_word,
    stamp,
)
from drivers.contract import Reason, Value
from sync.wire import EventFrame, GapFrame, Layout, layout_id

AT_NS = 1_795_446_640_123_456_789


def layout(
    *points: tuple[str, str],
    device: str = "boiler",
    measurement: str = "heat",
    tags: tuple[tuple[str, str], ...] = (),
    scale: float = 1.0,
) -> Layout:
    return Layout(
        device, "modbus", measurement, tuple(name for name, _ in points), tuple(kind for _, kind in points),
        ("",) * len(points), (scale,) * len(points), (0.0,) * len(points), tags,
    )  # fmt: skip


def scan(
    of: Layout,
    *values: Value | None,
    reasons: dict[int, Reason] | None = None,
    seq: int = 1,
    at_ns: int = AT_NS,
    synchronized: bool = True,
    gateway: str = "plant-1",
) -> ScanRecord:
    return ScanRecord(
        1, "acme", gateway, 7, seq, of, layout_id(of), at_ns, synchronized, at_ns, list(values), reasons or {}
    )


def line_of(record: Record) -> str:
    return LineWriter().line(record).decode()


def test_a_good_scan_is_one_line_with_sorted_tags_and_a_field_per_point() -> None:
    of = layout(
        ("flow", "f64"), ("pump", "bool"), ("count", "u16"), tags=(("site", "north"), ("area", "a 1"))
    )
    assert line_of(scan(of, 1.5, True, 3)) == (
        r"heat,area=a\ 1,device=boiler,gateway=plant-1,site=north,tenant=acme "
        "flow=1.5,pump=true,count=3 1795446640123456001"
    )


def test_numbers_have_no_integer_suffix_so_that_a_later_scale_does_not_change_the_fields_type() -> None:
    for kind in ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"):
        assert " a=5 " in line_of(scan(layout(("a", kind)), 5))


def test_an_integer_that_no_double_holds_also_stands_as_text() -> None:
    of = layout(("energy", "u64"))
    assert " energy=9007199254740992 " in line_of(scan(of, 2**53))
    line = line_of(scan(of, 2**64 - 1))
    assert ' energy=18446744073709551615,energy.exact="18446744073709551615" ' in line


def test_a_reading_that_is_not_good_has_its_quality_and_its_value_where_there_is_one() -> None:
    of = layout(("a", "f64"), ("b", "f64"), ("c", "f64"))
    line = line_of(scan(of, 1.0, 2.0, None, reasons={1: Reason.RANGE, 2: Reason.TIMEOUT}))
    assert ' a=1.0,b=2.0,b.quality="bad:range",c.quality="bad:timeout" ' in line


def test_a_scan_without_any_value_still_leaves_a_trace_of_every_point() -> None:
    of = layout(("a", "f64"), ("b", "str"))
    gone = dict.fromkeys(range(2), Reason.DISCONNECTED)
    line = line_of(scan(of, None, None, reasons=gone))
    assert ' a.quality="bad:disconnected",b.quality="bad:disconnected" ' in line
    assert ' a.quality="bad:missing",' in line_of(scan(of, None, "x"))


def test_an_estimated_time_is_said_once_per_scan() -> None:
    line = line_of(scan(layout(("a", "f64")), 1.0, synchronized=False))
    assert ' a=1.0,time.quality="uncertain:clock" ' in line


def test_text_is_quoted_and_escaped() -> None:
    line = line_of(scan(layout(("state", "str")), 'say "hi" \\ bye'))
    assert r' state="say \"hi\" \\ bye" ' in line


@pytest.mark.parametrize(
    ("point", "field"),
    [
        ("time", "time_"), ("time_", "time__"), ("_value", "_value_"), ("device", "device_"),
        ("a.quality", "a.quality_"), ("a.exact", "a.exact_"), ("timer", "timer"), ("quality", "quality"), ("", "_"),
    ],
)  # fmt: skip
def test_names_that_are_influxdbs_or_ours_are_changed(point: str, field: str) -> None:
    assert field_name(point) == field


def test_tags_that_are_influxdbs_or_ours_are_changed_and_empty_ones_left_out() -> None:
    tags = (("_field", "a"), ("device", "b"), ("empty", ""), ("label_device", "d"), ("time", "c"))
    line = line_of(scan(layout(("x", "f64"), tags=tags), 1.0))
    assert line.startswith(
        "heat,device=boiler,gateway=plant-1,label__field=a,label_device=b,label_device_=d,label_time=c,tenant=acme "
    )


def test_a_measurement_never_starts_a_comment_and_is_never_empty() -> None:
    assert line_of(scan(layout(("x", "f64"), measurement="#1"), 1.0)).startswith("_#1,")
    assert line_of(scan(layout(("x", "f64"), measurement=""), 1.0)).startswith("modbus,")


def test_percent_signs_in_names_survive_the_template() -> None:
    of = layout(("rh%", "f64"), ("%s=%d", "f64"), device="50%d", measurement="%s")
    line = line_of(scan(of, 1.0, 2.0))
    assert line.startswith("%s,device=50%d,")
    assert r" rh%=1.0,%s\=%d=2.0 " in line


def test_two_points_of_one_name_keep_two_fields() -> None:
    assert " a=1.0,a_=2.0 " in line_of(scan(layout(("a", "f64"), ("a", "f64")), 1.0, 2.0))


@given(st.integers(0, MAX_NS - 1000), st.integers(1, 2**62))
def test_the_stored_time_is_within_a_microsecond_and_the_same_every_time(at_ns: int, seq: int) -> None:
    stored = stamp(at_ns, seq)
    assert abs(stored - at_ns) < 1000
    assert stored // 1000 == at_ns // 1000
    assert stamp(at_ns, seq) == stored


def test_scans_of_one_instant_have_times_of_their_own() -> None:
    assert len({stamp(AT_NS, seq) for seq in range(5_000_000, 5_001_000)}) == 1000


def test_a_time_beyond_influxdbs_range_is_refused_by_name() -> None:
    of = layout(("a", "f64"))
    for at_ns in (2**63 + 1000, -(2**63) - 1000):
        with pytest.raises(Unwritable, match="1677 to 2262"):
            line_of(scan(of, 1.0, at_ns=at_ns))


def test_gaps_and_events_are_lines_of_their_own_measurements() -> None:
    gap = GapRecord(
        1,
        "acme",
        "plant-1",
        7,
        9,
        GapFrame(7, 3, 5, 3, 12, "evicted", "", 1, 0, 1, "bulk", 2),
        AT_NS,
        AT_NS + 5,
        0,
    )
    assert line_of(gap) == (
        "headgate_gaps,gateway=plant-1,priority=bulk,reason=evicted,tenant=acme epoch=7i,first=3i,last=5i,scans=3i,"
        f"readings=12i,frames=2i,from_ns={AT_NS}i,to_ns={AT_NS + 5}i 1795446640123456009"
    )
    event = EventRecord(
        1, "acme", "plant-1", 7, 10, EventFrame(1, 0, "driver_failed", 'no "x"', "boiler"), AT_NS, 0
    )
    assert line_of(event) == (
        r"headgate_events,code=driver_failed,device=boiler,gateway=plant-1,tenant=acme "
        r'text="no \"x\"" 1795446640123456010'
    )


def test_a_part_of_a_scan_holds_only_the_points_asked_and_fields_lead_back_to_points() -> None:
    writer = LineWriter()
    record = scan(
        layout(("a", "f64"), ("time", "u64"), ("c", "f64")), 1.0, 2**60, 3.0, reasons={1: Reason.STUCK}
    )
    part = writer.part(record, (1,)).decode()
    assert f' time_={2**60},time_.exact="{2**60}",time_.quality="uncertain:stuck" ' in part
    assert [writer.point_of(record, f) for f in ("a", "time_", "time_.exact", "c.quality", "time", "zz")] == [
        0, 1, 1, 2, None, None,
    ]  # fmt: skip


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True), st.text(max_size=8))
def test_no_name_can_break_out_of_its_line(names: list[str], label: str) -> None:
    of = layout(*((name, "f64") for name in names), device=label, measurement=label, tags=((label, label),))
    line = line_of(scan(of, *([1.0] * len(names))))
    assert "\n" not in line
    head, _, rest = _split(line, " ")
    _, _, tags = _split(head, ",")
    fields, _, at = _split(rest, " ")
    assert at == str(stamp(AT_NS, 1))
    assert _count(fields, ",") == len(names) - 1
    assert _count(fields, "=") == len(names)
    assert _count(tags, "=") == _count(tags, ",") + 1


def test_qualities_are_the_published_words() -> None:
    words = {quality_word(reason) for reason in Reason}
    assert len(words) == len(Reason)
    assert {word.split(":")[0] for word in words} == {"good", "uncertain", "bad"}


def test_templates_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.sinks.line_protocol.MAX_TEMPLATES", 3)
    writer = LineWriter()
    for n in range(10):
        record = scan(layout(("a", "f64"), device=f"d{n}"), 1.0)
        assert f"device=d{n}," in writer.line(record).decode()
        assert f"device=d{n}," in writer.line(msgspec.structs.replace(record, seq=2)).decode()
    assert len(writer._templates) == 3


def _split(text: str, at: str) -> tuple[str, str, str]:
    """At the first `at` that is not escaped."""
    escaped = False
    for i, char in enumerate(text):
        if char == at and not escaped:
            return text[:i], at, text[i + 1 :]
        escaped = char == "\\"  # a backslash is itself unless something to escape follows it
    return text, "", ""


def _count(text: str, char: str) -> int:
    count = 0
    while True:
        _, found, text = _split(text, char)
        if not found:
            return count
        count += 1


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_every_double_is_written_so_that_it_is_read_back_as_itself(values: list[float]) -> None:
    line = line_of(scan(layout(*((f"p{i}", "f64") for i in range(len(values)))), *values))
    fields = line.split(" ")[1].split(",")
    assert [float(field.partition("=")[2]) for field in fields] == values
