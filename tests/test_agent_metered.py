"""A link that costs: what may go when, and a count that no crash and no clock makes too small."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from agent.metered import METER_NAME, Meter, connect_bytes, judge, message_bytes, rules_of
from config.agent import Metered
from drivers.contract import Priority

NIGHT = Metered(hours=("22:00-06:00", "12:00-13:00"))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "held", "why"),
    [
        ("2026-03-01 22:00", False, ""),
        ("2026-03-01 23:59:59", False, ""),
        ("2026-03-02 00:00", False, ""),
        ("2026-03-02 05:59:59", False, ""),
        ("2026-03-02 06:00", True, "metered, until 12:00 UTC"),
        ("2026-03-02 12:30", False, ""),
        ("2026-03-02 13:00", True, "metered, until 22:00 UTC"),
    ],
)
def test_outside_its_hours_a_link_is_held_until_they_begin(now: str, held: bool, why: str) -> None:
    verdict = judge(at(now), 0, rules_of(NIGHT))
    assert (verdict.held, verdict.why) == (held, why)


def test_a_whole_day_is_hours_too_and_none_means_always() -> None:
    for hours in ((), ("00:00-24:00",)):
        rules = rules_of(Metered(hours=hours))
        assert not any(judge(at("2026-03-01") + timedelta(minutes=n), 0, rules).held for n in range(1440))


def test_hours_are_those_of_the_timezone_also_where_the_clock_is_put_forward() -> None:
    rules = rules_of(Metered(hours=("22:00-06:00",), timezone="Europe/Zurich"))
    assert not judge(at("2026-07-01 20:00"), 0, rules).held  # 22:00 there
    assert judge(at("2026-07-01 19:59"), 0, rules).why == "metered, until 22:00"
    assert judge(at("2026-03-29 04:00"), 0, rules).held  # 06:00, an hour earlier than the day before
    assert not judge(at("2026-03-29 03:59"), 0, rules).held


def test_a_day_s_bytes_that_are_used_up_hold_until_midnight() -> None:
    rules = rules_of(Metered(bytes_per_day=1_000_000))
    assert not judge(at("2026-03-01 10:00"), 999_999, rules).held
    verdict = judge(at("2026-03-01 10:00"), 1_000_000, rules)
    assert verdict.why == "metered, the day's 1,000,000 bytes are used up, until 00:00 UTC"
    assert judge(at("2026-03-01 23:59:59.5"), 1_000_000, rules).again_s == pytest.approx(0.5)


def test_of_two_reasons_the_one_that_lasts_longer_is_told() -> None:
    rules = rules_of(Metered(hours=("22:00-23:00",), bytes_per_day=10))
    assert "until 00:00" in judge(at("2026-03-01 10:00"), 10, rules).why
    assert "until 22:00" in judge(at("2026-03-01 23:30"), 10, rules).why


def test_what_goes_at_any_time_is_a_priority_and_what_is_above_it() -> None:
    assert rules_of(Metered(always="none")).lowest is None
    assert rules_of(Metered()).lowest is Priority.ALARM
    assert rules_of(Metered(always="normal")).lowest is Priority.NORMAL


# --- counting ---


class Times:
    def __init__(self) -> None:
        self.wall = at("2026-03-01 10:00")
        self.s = 100.0

    def go(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.s += seconds

    def meter(self, folder: Path, *, bytes_per_day: int = 10_000_000) -> Meter:
        meter = Meter(
            Metered(bytes_per_day=bytes_per_day), folder, keepalive_s=20.0,
            now=lambda: self.wall, monotonic_s=lambda: self.s,
        )  # fmt: skip
        meter.load()
        return meter


async def test_a_crash_never_makes_the_count_smaller_and_an_orderly_end_keeps_it_exactly(
    tmp_path: Path,
) -> None:
    times = Times()
    meter = times.meter(tmp_path)
    for n in range(200):
        await meter.message(1000 * (n % 7), https=n % 2 == 0)
        times.go(0.5)
        again = times.meter(tmp_path)  # as after a kill
        assert meter.used <= again.used <= meter.used + 100_000
    await meter.close()
    assert times.meter(tmp_path).used == meter.used


async def test_the_file_is_not_written_for_every_message(tmp_path: Path) -> None:
    times = Times()
    meter = times.meter(tmp_path)
    states = set()
    for _ in range(300):
        await meter.message(1000, https=False)
        states.add((tmp_path / METER_NAME).stat().st_ino)
    assert len(states) < 30


async def test_a_new_day_begins_at_midnight_and_not_when_the_clock_is_set_back(tmp_path: Path) -> None:
    times = Times()
    meter = times.meter(tmp_path, bytes_per_day=5_000)
    await meter.message(10_000, https=False)
    assert meter.verdict().held
    times.wall = at("1970-01-01")
    assert meter.verdict().held
    assert times.meter(tmp_path, bytes_per_day=5_000).verdict().held  # not by a restart either
    times.go(86_400)
    assert not meter.verdict().held  # a day has passed, whatever the clock says
    await meter.message(10_000, https=False)
    times.wall = at("2026-03-02 00:00")
    assert not meter.verdict().held


async def test_an_idle_connection_costs_too(tmp_path: Path) -> None:
    times = Times()
    meter = times.meter(tmp_path)
    await meter.connected()
    await meter.message(100, https=False)
    before = meter.used
    times.go(3600)
    await meter.message(100, https=False)
    assert meter.used - before > message_bytes(100, https=False) + 240 * 4  # a ping every 15 s
    before = meter.used
    times.go(10)
    await meter.message(100, https=True)  # an idle HTTPS connection was closed
    assert meter.used - before == message_bytes(100, https=True) + connect_bytes()


async def test_a_damaged_file_is_told_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METER_NAME).write_bytes(b"\0\0")
    meter = Times().meter(tmp_path)
    assert "counted from 0" in caplog.text
    await meter.message(100, https=False)
    assert msgspec.json.decode((tmp_path / METER_NAME).read_bytes())["day"] == "2026-03-01"
