"""Health: counted exactly, told in words that say what to do."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import status as status_file
from agent.buffer import BufferState, Condition
from agent.health import DeviceHealth, Gauge, State, duration_in_words, percentile, remedy
from agent.status import AgentStatus, ConfigHealth, LinkHealth, LinkState, RunState, problems
from drivers.contract import Point, Reason, Scan

S = 1_000_000_000
NOW = 1_800_000_000 * S
POINTS = (Point(name="a"), Point(name="b"), Point(name="c"))


class Wall:
    """A wall clock that the test moves."""

    def __init__(self) -> None:
        self.now_ns = NOW

    def __call__(self) -> int:
        return self.now_ns


def gauge() -> tuple[Gauge, Wall]:
    wall = Wall()
    return Gauge(DeviceHealth(name="boiler", driver="modbus"), wall), wall


def test_readings_are_counted_by_quality_and_reason() -> None:
    made, _ = gauge()
    made.count(Scan(10 * S, POINTS, (1.0, 2.0, 3.0)))
    made.count(Scan(11 * S, POINTS, (1.0, None, 3.0), {0: Reason.RATE, 1: Reason.TIMEOUT}))
    made.count(Scan(12 * S, POINTS, (None,) * 3, dict.fromkeys(range(3), Reason.TIMEOUT)))
    told = made.told(12 * S)
    assert (told.scans, told.readings, told.bad_readings, told.uncertain_readings) == (3, 9, 4, 1)
    assert told.reasons == {"RATE": 1, "TIMEOUT": 4}


def test_a_reason_that_no_encoding_takes_does_not_end_the_status() -> None:
    made, _ = gauge()
    made.enter(State.FAULT, "no such file: /dev/\udc80", Reason.DRIVER)
    assert b"/dev/?" in msgspec.json.encode(made.told(0))


def test_last_good_is_the_last_scan_with_a_usable_value() -> None:
    made, wall = gauge()
    assert made.told(S).last_good_ns is None
    made.count(Scan(100 * S, POINTS, (1.0, None, None), {1: Reason.CRC, 2: Reason.CRC}))
    made.count(Scan(130 * S, POINTS, (None,) * 3, dict.fromkeys(range(3), Reason.CRC)))
    wall.now_ns += 40 * S
    assert made.told(140 * S).last_good_ns == wall.now_ns - 40 * S


def test_percentiles_are_of_the_last_reads_only() -> None:
    made, _ = gauge()
    for duration in [10**9] * 100 + [2_000_000] * 512:
        made.took(duration)
    told = made.told(S)
    assert (told.p50_ms, told.p99_ms) == (2.0, 2.0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(1, 100))
def test_a_percentile_has_that_share_at_or_below_it(durations: list[int], percent: int) -> None:
    ordered = sorted(durations)
    found = percentile(ordered, percent)
    assert sum(d <= found for d in ordered) * 100 >= percent * len(ordered)
    assert sum(d < found for d in ordered) * 100 < percent * len(ordered)


def test_a_state_is_new_only_once() -> None:
    made, wall = gauge()
    assert made.enter(State.DOWN, "no answer", Reason.TIMEOUT)
    since = made.health.since_ns
    wall.now_ns += 60 * S
    assert not made.enter(State.DOWN, "still no answer", Reason.TIMEOUT)
    assert made.health.since_ns == since
    assert made.health.why == "still no answer"
    assert made.enter(State.OK)
    assert (made.health.why, made.health.remedy) == ("", "")


def test_counting_goes_on_after_a_restart() -> None:
    before, _ = gauge()
    before.count(Scan(S, POINTS, (None,) * 3, dict.fromkeys(range(3), Reason.CRC)))
    before.health.overruns = 4
    after, _ = gauge()
    after.health.restore(before.told(S))
    after.count(Scan(S, POINTS, (1.0, 2.0, 3.0)))
    told = after.told(S)
    assert (told.scans, told.readings, told.bad_readings, told.overruns) == (2, 6, 3, 4)
    assert before.health.reasons is not after.health.reasons


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.85, "850 ms"),
        (4, "4 s"),
        (119, "119 s"),
        (240, "4 min"),
        (3 * 3600, "3 h"),
        (2 * 86400, "2 days"),
        (-1, "0 ms"),
    ],
)
def test_durations_are_told_as_people_do(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words


@pytest.mark.parametrize("reason", [Reason.TIMEOUT, Reason.DISCONNECTED, Reason.CRC, Reason.DRIVER])
def test_the_reasons_a_device_fails_for_have_a_remedy(reason: Reason) -> None:
    assert remedy(reason)


# --- judging a status ---


def buffer_state(
    condition: Condition = Condition.OK, detail: str = "", *, gapped: int = 0, parked: int = 0
) -> BufferState:
    return BufferState(
        condition=condition, detail=detail, epoch=1, next_seq=1, boot=1, kept_frames=10, kept_readings=100,
        settled_frames=5, settled_readings=50, gapped_frames=gapped, gapped_readings=gapped, pending_frames=0,
        pending_readings=0, overrun_scans=0, overrun_readings=0, parked_frames=parked, size_bytes=1, max_bytes=2,
        oldest_age_s=1.0, commits=1, commit_s=0.0, commit_max_s=0.0,
    )  # fmt: skip


def healthy() -> AgentStatus:
    return AgentStatus(
        version="1",
        gateway="acme/plant-1",
        state=RunState.RUNNING,
        pid=7,
        started_ns=NOW - 3600 * S,
        written_ns=NOW - 2 * S,
        link=LinkHealth(state=LinkState.UP, since_ns=NOW - 60 * S, target="mqtt cloud.example"),
        buffer=buffer_state(),
        devices=[DeviceHealth(name="boiler", driver="modbus", state=State.OK, since_ns=NOW - 60 * S)],
    )


def told(status: AgentStatus, *, running: bool | None = True) -> str:
    return "\n".join(map(str, problems(status, running=running, now_ns=NOW)))


def test_a_healthy_agent_has_no_problem() -> None:
    assert told(healthy()) == ""


def test_a_device_that_does_not_answer_is_told_with_how_long_and_what_to_do() -> None:
    status = healthy()
    status.devices = [
        DeviceHealth(
            name="boiler",
            driver="modbus",
            state=State.DOWN,
            since_ns=NOW - 240 * S,
            why="no answer within 5 s",
            remedy=remedy(Reason.TIMEOUT),
        )
    ]
    assert told(status).startswith("boiler: no answer within 5 s, for 4 min: check that it has power")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (RunState.STOPPED, "it was stopped 4 min ago"),
        (RunState.FAILED, "it failed 4 min ago (ZeroDivisionError)"),
        (RunState.RUNNING, "last seen 4 min ago and did not leave in order"),
    ],
)
def test_an_agent_that_does_not_run_is_told_with_how_it_ended(state: RunState, text: str) -> None:
    status = healthy()
    status.state, status.why, status.written_ns = state, "ZeroDivisionError", NOW - 240 * S
    assert text in told(status, running=False)
    assert "boiler" not in told(status, running=False)


def test_an_agent_that_hangs_is_noticed() -> None:
    status = healthy()
    status.written_ns = NOW - 240 * S
    assert "said nothing for 4 min" in told(status)


def test_a_lost_link_says_that_nothing_is_lost() -> None:
    status = healthy()
    status.link = LinkHealth(
        state=LinkState.DOWN, since_ns=NOW - 240 * S, target="mqtt x", why="connect: refused"
    )
    assert "no way to mqtt x for 4 min (connect: refused)" in told(status)
    assert "kept in the buffer" in told(status)


def test_a_bad_file_and_a_full_disk_and_refusals_are_told() -> None:
    status = healthy()
    status.config = ConfigHealth(file="a.toml", last_known_good=True, errors=["a.toml:3: x"])
    status.buffer = buffer_state(Condition.HOLDING, "the disk is full: make room", parked=3)
    text = told(status)
    assert "the last good one is in force (a.toml:3: x)" in text
    assert "holding: the disk is full: make room" in text
    assert "3 frames were refused" in text


def test_gaps_of_the_past_are_shown_and_are_no_problem() -> None:
    status = healthy()
    status.buffer = buffer_state(gapped=7)
    assert told(status) == ""
    assert "gaps 7" in "\n".join(status_file.lines(status, running=True, now_ns=NOW))


@pytest.mark.parametrize("period_ms", [0, 1000])
def test_a_device_never_heard_of_is_noticed(period_ms: int) -> None:
    status = healthy()
    status.devices = [
        DeviceHealth(name="scale", driver="serial_line", period_ms=period_ms, since_ns=NOW - 120 * S)
    ]
    assert told(status).startswith("scale: ")


def test_every_state_can_be_written_and_read_back() -> None:
    for state in State:
        status = healthy()
        status.devices[0].state = state
        assert status_file.encode(status)
        assert status_file.lines(status, running=None, now_ns=NOW)
