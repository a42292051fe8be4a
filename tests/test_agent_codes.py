"""One word for each thing that can be wrong: there while its cause is, and the same wherever it is told."""

from __future__ import annotations

import pytest

from agent import metrics
from agent.buffer import BufferState, Condition
from agent.health import DeviceHealth, Gauge, State
from agent.salvage import Told as OldEpoch
from agent.status import (
    AgentStatus,
    ClockHealth,
    Code,
    ConfigHealth,
    LinkHealth,
    LinkState,
    RunState,
    problems,
)
from drivers.contract import Reason

S = 10**9
NOW = 1_700_000_000 * S


def old(phase: str, held: int) -> OldEpoch:
    return OldEpoch("buffer.db.damaged-1", 7, phase, 9, 90, 0, 0, 0, 0, held, 10 * held, 4096)


def buffer(
    condition: Condition = Condition.OK, cause: str = "", parked: int = 0, salvaged: tuple[OldEpoch, ...] = ()
) -> BufferState:
    return BufferState(
        condition=condition, detail="what to do", epoch=1, next_seq=1, boot=1, kept_frames=10, kept_readings=100,
        settled_frames=5, settled_readings=50, gapped_frames=0, gapped_readings=0, pending_frames=0,
        pending_readings=0, overrun_scans=0, overrun_readings=0, parked_frames=parked, size_bytes=1, max_bytes=2,
        oldest_age_s=1.0, commits=1, commit_s=0.0, commit_max_s=0.0, cause=cause, old=salvaged,
    )  # fmt: skip


def well() -> AgentStatus:
    return AgentStatus(
        gateway="acme/plant-1", state=RunState.RUNNING, started_ns=NOW - 3600 * S, written_ns=NOW - 2 * S,
        link=LinkHealth(state=LinkState.UP, since_ns=NOW - 60 * S), buffer=buffer(),
        devices=[DeviceHealth(name="boiler", driver="modbus", state=State.OK, since_ns=NOW - 60 * S)],
    )  # fmt: skip


def link(cause: str) -> LinkHealth:
    return LinkHealth(state=LinkState.DOWN, since_ns=NOW - 60 * S, why="in words", cause=cause)


def device(state: State, reason: Reason | None = None) -> DeviceHealth:
    gauge = Gauge(DeviceHealth(name="boiler", driver="modbus", period_ms=1000), lambda: NOW - 90 * S)
    gauge.enter(state, "in words", reason)
    return gauge.health


FAULTS: list[tuple[str, dict[str, object]]] = [
    (Code.CONFIG_BAD, {"config": ConfigHealth(file="a.toml", last_known_good=True, errors=["e"])}),
    (Code.CONFIG_RESTART, {"config": ConfigHealth(file="a.toml", notes=["uplink"])}),
    (Code.BUFFER_FULL, {"buffer": buffer(Condition.EVICTING)}),
    (Code.DISK_LOW, {"buffer": buffer(Condition.EVICTING, "disk_low")}),
    (Code.BUFFER_HOLDING, {"buffer": buffer(Condition.HOLDING)}),
    (Code.DISK_FULL, {"buffer": buffer(Condition.HOLDING, "disk_full")}),
    (Code.DISK_READONLY, {"buffer": buffer(Condition.HOLDING, "disk_readonly")}),
    (Code.DISK_ERROR, {"buffer": buffer(Condition.HOLDING, "disk_error")}),
    (Code.BUFFER_PARKED, {"buffer": buffer(parked=3)}),
    (Code.LINK_DOWN, {"link": link("down")}),
    (Code.LINK_DNS, {"link": link("dns")}),
    (Code.LINK_REFUSED, {"link": link("refused")}),
    (Code.LINK_TIMEOUT, {"link": link("timeout")}),
    (Code.LINK_TLS, {"link": link("tls")}),
    (Code.LINK_CREDENTIAL, {"link": link("credential")}),
    (Code.LINK_SILENT, {"link": link("silent")}),
    (Code.CLOCK_UNSYNCHRONIZED, {"clock": ClockHealth(synchronized=False, expected=True, waiting=True)}),
    (Code.CLOCK_SKEW, {"link": LinkHealth(state=LinkState.UP, since_ns=NOW, skew_s=-7.5, skew_bound_s=1.0)}),
    ("device_timeout", {"devices": [device(State.DOWN, Reason.TIMEOUT)]}),
    ("device_crc", {"devices": [device(State.DOWN, Reason.CRC)]}),
    ("device_driver", {"devices": [device(State.FAULT, Reason.DRIVER)]}),
    ("device_misconfigured", {"devices": [device(State.MISCONFIGURED)]}),
    ("device_unread", {"devices": [device(State.STARTING)]}),
    (Code.AGENT_STALLED, {"stalls": 1, "stalled_ns": NOW - S}),
]


@pytest.mark.parametrize(("code", "wrong"), FAULTS, ids=[str(code) for code, _ in FAULTS])
def test_each_fault_has_a_code_of_its_own_with_words(code: str, wrong: dict[str, object]) -> None:
    status = well()
    assert problems(status, running=True, now_ns=NOW) == []
    for key, value in wrong.items():
        setattr(status, key, value)
    found = problems(status, running=True, now_ns=NOW)
    assert [problem.code for problem in found] == [code]
    assert found[0].text


@pytest.mark.parametrize(
    ("phase", "held", "wrong"), [("walk", 0, 1), ("carve", 5, 1), ("done", 5, 1), ("done", 0, 0)]
)
def test_a_damaged_file_is_told_until_what_was_in_it_is_delivered(phase: str, held: int, wrong: int) -> None:
    status = well()
    status.buffer = buffer(salvaged=(old(phase, held),))
    assert [p.code for p in problems(status, running=True, now_ns=NOW)] == [Code.BUFFER_SALVAGE] * wrong


def test_a_disk_that_others_filled_is_full_and_not_just_short_of_room() -> None:
    """The buffer's own ballast leaves it some room still, and it goes on by evicting: it calls the disk low."""
    status = well()
    status.disk_floor_bytes = 64 * 2**20
    found = {}
    for free_mb in (1, 20, 100):
        status.disk_free_bytes = free_mb * 2**20
        found[free_mb] = [p.code for p in problems(status, running=True, now_ns=NOW)]
    assert found == {1: [Code.DISK_FULL], 20: [Code.DISK_LOW], 100: []}
    status.disk_free_bytes = 2**20
    for cause in ("disk_low", "disk_full"):
        status.buffer = buffer(Condition.EVICTING, cause)
        told = [p.code for p in problems(status, running=True, now_ns=NOW)]
        assert told.count(Code.DISK_FULL) == 1


def test_no_two_faults_share_a_code() -> None:
    assert len({code for code, _ in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (RunState.STOPPED, Code.AGENT_STOPPED),
        (RunState.FAILED, Code.AGENT_FAILED),
        (RunState.RUNNING, Code.AGENT_DIED),
    ],
)
def test_an_agent_that_does_not_run_says_how_it_ended(state: RunState, code: Code) -> None:
    status = well()
    status.state = state
    assert problems(status, running=False, now_ns=NOW)[0].code == code


def test_the_metrics_carry_a_line_for_each_code_and_none_where_all_is_well() -> None:
    status = well()
    assert "headgate_problem" not in metrics.exposition(status)
    status.devices = [device(State.DOWN, Reason.CRC)]
    status.link = link("dns")
    status.problems = problems(status, running=True, now_ns=NOW)
    told = metrics.exposition(status)
    assert 'headgate_problem{code="link_dns",device=""} 1\n' in told
    assert 'headgate_problem{code="device_crc",device="boiler"} 1\n' in told
