"""The clock table: when a row is due, and what the kernel says."""

from __future__ import annotations

import time

from agent.clock import ClockReading, ClockWatch, Hold, SystemClock

S = 10**9


def reading(boot_s: float, offset_s: float = 1e9, *, synchronized: bool = True) -> ClockReading:
    return ClockReading(int(boot_s * S), int((boot_s + offset_s) * S), synchronized, 0)


def why(watch: ClockWatch, now: ClockReading) -> str | None:
    due = watch.look(now)
    return due.why if due else None


def test_a_row_is_due_at_the_start_and_then_once_a_minute() -> None:
    watch = ClockWatch()
    assert [why(watch, reading(t)) for t in (10, 11, 69, 70, 71, 130)] == [
        "start", None, None, "minute", None, "minute",
    ]  # fmt: skip


def test_a_row_is_due_when_the_kernel_changes_its_word_on_synchronization() -> None:
    watch = ClockWatch()
    watch.look(reading(1, synchronized=False))
    assert why(watch, reading(2, synchronized=True)) == "sync"
    assert why(watch, reading(3, synchronized=True)) is None
    assert why(watch, reading(4, synchronized=False)) == "sync"


def test_a_step_above_half_a_second_is_told_with_its_size_and_slewing_is_not() -> None:
    watch = ClockWatch()
    watch.look(reading(1, offset_s=1000.0))
    assert why(watch, reading(2, offset_s=1000.4)) is None
    assert why(watch, reading(3, offset_s=1000.8)) is None
    due = watch.look(reading(4, offset_s=-500.0))
    assert due is not None
    assert due.why == "step"
    assert round(due.step_ns / S, 1) == -1500.8


def test_slow_drift_over_hours_is_no_step() -> None:
    watch = ClockWatch()
    found = {why(watch, reading(t, offset_s=1000 + t * 0.0004)) for t in range(1, 20_000)}
    assert found == {"start", None, "minute"}


def test_the_machines_clocks_agree_with_python_and_the_boot_id_is_the_kernels() -> None:
    clock = SystemClock()
    now = clock.read()
    assert abs(now.wall_ns - time.time_ns()) < S
    assert abs(now.boot_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < S
    assert now.error_ns >= 0
    assert SystemClock().boot_id == clock.boot_id
    assert len(clock.boot_id) >= 8


def test_readings_wait_only_for_a_clock_that_is_to_be_expected() -> None:
    hour = 3_600 * S
    now = reading(100, 1.8e9, synchronized=False)
    assert not Hold(hour).waits(now), "a time that can be, and no word of a better one"
    assert Hold(hour).waits(reading(100, 0, synchronized=False)), "1970"
    earlier = Hold(hour)
    earlier.learn(synchronized=True, wall_ns=1)
    assert earlier.waits(now), "an earlier boot had a time server"
    behind = Hold(hour)
    behind.learn(synchronized=False, wall_ns=now.wall_ns + 1)
    assert behind.waits(now), "an earlier boot has shown more"
    assert not Hold(0).waits(reading(100, 0, synchronized=False)), "turned off"


def test_the_wait_is_counted_from_the_first_time_one_could_have_been_sent() -> None:
    hold = Hold(3_600 * S)
    assert hold.waits(reading(90_000, 0, synchronized=False)), "a day offline costs none of it"
    assert hold.waits(reading(93_599, 0, synchronized=False))
    assert not hold.waits(reading(93_600, 0, synchronized=False))
