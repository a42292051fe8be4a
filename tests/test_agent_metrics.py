"""The metrics file: the status's own numbers, in a form that Prometheus reads, whole at every moment."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import metrics
from agent.buffer import BufferState, Condition
from agent.drain import DrainEstimate
from agent.health import DeviceHealth, State
from agent.status import AgentStatus, LinkHealth, LinkState, RunState, lines

# prometheus.io/docs/instrumenting/exposition_formats, one line of a sample
SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-z_]+="(?:[^"\\\n]|\\[\\n"])*"(?:,[a-z_]+="(?:[^"\\\n]|\\[\\n"])*")*\})? (\S+)'
)


def buffered(readings: int) -> BufferState:
    return BufferState(
        condition=Condition.OK, detail="", epoch=7, next_seq=100, boot=1, kept_frames=99, kept_readings=990,
        settled_frames=90, settled_readings=990 - readings - 5, gapped_frames=1, gapped_readings=5, pending_frames=0,
        pending_readings=0, overrun_scans=2, overrun_readings=20, parked_frames=0, size_bytes=4096, max_bytes=2**30,
        oldest_age_s=90.0, commits=3, commit_s=0.01, commit_max_s=0.02,
    )  # fmt: skip


def status(device: str = "boiler") -> AgentStatus:
    return AgentStatus(
        version="1", gateway="acme/plant-1", state=RunState.RUNNING, written_ns=1_700_000_000 * 10**9,
        link=LinkHealth(state=LinkState.UP, acked_batches=12, ack_p50_ms=4.0), buffer=buffered(40), drain_eta_s=75.0,
        devices=[
            DeviceHealth(name=device, driver="modbus", state=State.OK, readings=800, last_good_ns=5 * 10**9),
            DeviceHealth(name="mute", driver="modbus", state=State.DOWN, failures=3),
        ],
    )  # fmt: skip


def samples(text: str) -> dict[str, float]:
    """By name and labels; fails on a line that is no sample, and on a metric that is not announced just before."""
    found: dict[str, float] = {}
    announced = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            announced = line.split()[2]
            assert not any(key.split("{")[0] == announced for key in found), f"{announced} twice"
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == announced
            assert match[1] + (match[2] or "") not in found
            found[match[1] + (match[2] or "")] = float(match[3])
    families = text_string_to_metric_families(text)  # Prometheus' own reader
    assert sorted(s.value for family in families for s in family.samples) == sorted(found.values())
    return found


def test_the_numbers_are_those_of_the_status() -> None:
    found = samples(metrics.exposition(status()))
    assert found['headgate_info{gateway="acme/plant-1",version="1"}'] == 1
    assert found["headgate_running"] == found["headgate_link_up"] == 1
    assert found["headgate_status_time_seconds"] == 1_700_000_000
    assert found["headgate_batches_acked_total"] == 12
    assert found['headgate_ack_latency_seconds{quantile="0.5"}'] == 0.004
    assert found["headgate_drain_eta_seconds"] == 75
    assert found["headgate_readings_kept_total"] == 990
    assert found["headgate_readings_buffered"] == 40
    assert found["headgate_readings_gapped_total"] == 5
    assert found["headgate_readings_overrun_total"] == 20
    assert found['headgate_device_up{device="boiler",driver="modbus"}'] == 1
    assert found['headgate_device_up{device="mute",driver="modbus"}'] == 0
    assert found['headgate_device_failures_total{device="mute",driver="modbus"}'] == 3


def test_what_is_not_known_has_no_line() -> None:
    told = status()
    told.drain_eta_s = None
    found = samples(metrics.exposition(told))
    assert "headgate_drain_eta_seconds" not in found
    assert 'headgate_ack_latency_seconds{quantile="0.99"}' not in found
    assert 'headgate_device_last_good_time_seconds{device="mute",driver="modbus"}' not in found
    assert "headgate_link_up" not in samples(
        metrics.exposition(AgentStatus(link=LinkHealth(state=LinkState.OFF)))
    )


def test_a_name_with_quotes_and_newlines_stays_one_label() -> None:
    found = samples(metrics.exposition(status('a "b"\\\nc')))
    assert found[r'headgate_device_readings_total{device="a \"b\"\\\nc",driver="modbus"}'] == 800


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    metrics.write(tmp_path, status())
    whole = (tmp_path / metrics.METRICS_NAME).read_text()
    over = threading.Event()

    def rewrite() -> None:
        while not over.is_set():
            metrics.write(tmp_path, status())

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(500):
            assert (tmp_path / metrics.METRICS_NAME).read_text() == whole
    finally:
        over.set()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == [metrics.METRICS_NAME]


# --- when the backlog will be delivered ---


def test_a_backlog_that_shrinks_by_100_a_second_takes_a_hundredth_of_it() -> None:
    estimate = DrainEstimate()
    kept, settled, eta_s = 100_000, 0, None
    for second in range(0, 120, 5):
        kept, settled = 100_000 + 50 * second, 150 * second
        eta_s = estimate.eta_s(float(second), settled, kept, kept - settled, 600.0)
    assert eta_s == pytest.approx((kept - settled) / 100, abs=0.1)


def test_only_the_last_minute_counts() -> None:
    estimate = DrainEstimate()
    estimate.eta_s(0.0, 0, 1000, 1000, 60.0)
    estimate.eta_s(5.0, 0, 100_000, 100_000, 60.0)  # long down, and much kept
    eta_s = None
    for second in range(3600, 3700, 5):
        settled = 10 * (second - 3600)
        eta_s = estimate.eta_s(float(second), settled, 100_000, 100_000 - settled, 60.0)
    assert eta_s == pytest.approx((100_000 - 950) / 10, rel=0.001)


def test_it_is_not_known_without_deliveries_or_where_the_backlog_grows_and_0_without_one() -> None:
    estimate = DrainEstimate()
    assert estimate.eta_s(0.0, 10, 10, 0, None) == 0.0
    assert estimate.eta_s(5.0, 10, 500, 490, 4.0) is None  # nothing delivered
    assert estimate.eta_s(10.0, 20, 1000, 980, 60.0) is None  # delivered, and more kept
    assert estimate.eta_s(15.0, 990, 1000, 10, 0.5) == 0.0  # what waits has only just come


def test_the_status_for_a_person_tells_it_while_the_agent_runs() -> None:
    told = status()
    [line] = [line for line in lines(told, running=True, now_ns=told.written_ns) if line.startswith("buffer")]
    assert "oldest 90 s, delivered in about 75 s;" in line
    stopped = lines(told, running=False, now_ns=told.written_ns)
    assert not any("delivered in about" in line for line in stopped)
