"""The status as Prometheus text, in a file beside it: for node_exporter's textfile collector, so no port is opened.

Rules: the same numbers as the status, nothing counted twice; what is not known has no line, never 0; a reader sees the
old file or the new one. The format is Prometheus' text format 0.0.4
(prometheus.io/docs/instrumenting/exposition_formats).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from agent.health import State
from agent.status import AgentStatus, LinkState, RunState

METRICS_NAME: Final = "metrics.prom"

_Label: TypeAlias = tuple[str, str]
_Sample: TypeAlias = tuple[Sequence[_Label], float | None]


def exposition(status: AgentStatus) -> str:
    """The whole file."""
    return "".join(_families(status))


def write(folder: Path, status: AgentStatus) -> None:
    """Replace the file. Raises `OSError`. Not synced: after a power cut the next one comes within seconds."""
    path = folder / METRICS_NAME
    aside = path.with_name(
        f".{METRICS_NAME}.{os.getpid()}.{threading.get_native_id()}.tmp"
    )  # not *.prom: the collector passes it over
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(exposition(status))
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _families(status: AgentStatus) -> Iterator[str]:
    def one(name: str, kind: str, text: str, value: float | None) -> str:
        return _family(name, kind, text, [((), value)])

    about = (("gateway", status.gateway), ("version", status.version))
    yield _family("info", "gauge", "Which gateway this is.", [(about, 1)])
    yield one("running", "gauge", "1 while the agent runs.", int(status.state is RunState.RUNNING))
    yield one("status_time_seconds", "gauge", "When this was written.", status.written_ns / 1e9)
    yield one("starts_total", "counter", "Starts on this state folder.", status.starts)
    yield one("resident_bytes", "gauge", "Memory of the process.", status.rss_bytes)
    yield one("cpu_seconds_total", "counter", "CPU time of the process.", status.cpu_s)
    yield one(
        "config_last_known_good", "gauge", "1 where the file is bad and the last good one is in force.",
        int(status.config.last_known_good),
    )  # fmt: skip
    link = status.link
    if link.state is not LinkState.OFF:
        yield one("link_up", "gauge", "1 while there is a way to the cloud.", int(link.state is LinkState.UP))
        if link.skew_s is not None:
            yield one(
                "clock_skew_seconds", "gauge", "This clock less the cloud's, by the last ack.", link.skew_s
            )
        yield one("batches_in_flight", "gauge", "Sent, and not yet answered.", link.in_flight)
        yield one("batches_acked_total", "counter", "Acknowledged by the cloud.", link.acked_batches)
        yield one("batches_resent_total", "counter", "Sent again.", link.resent_batches)
        yield one("batches_refused_total", "counter", "Refused for good.", link.refused_batches)
        latencies = [
            ((("quantile", of),), None if ms is None else ms / 1000)
            for of, ms in (("0.5", link.ack_p50_ms), ("0.99", link.ack_p99_ms))
        ]
        yield _family("ack_latency_seconds", "gauge", "From sending to the cloud's ack, lately.", latencies)
        yield one(
            "drain_eta_seconds", "gauge", "Until the backlog is delivered at the recent pace.", status.drain_eta_s
        )  # fmt: skip
    if (buffer := status.buffer) is not None:
        yield one("readings_kept_total", "counter", "Readings on disk, ever.", buffer.kept_readings)
        yield one("readings_delivered_total", "counter", "Of these, acknowledged.", buffer.settled_readings)
        yield one("readings_gapped_total", "counter", "Of these, lost and told.", buffer.gapped_readings)
        yield one("readings_overrun_total", "counter", "Never kept, and told.", buffer.overrun_readings)
        yield one("readings_buffered", "gauge", "Waiting to be delivered.", buffer.buffered_readings)
        yield one("oldest_reading_age_seconds", "gauge", "Of what waits.", buffer.oldest_age_s)
        yield one("frames_parked", "gauge", "Refused by the cloud, kept aside.", buffer.parked_frames)
        yield one("buffer_bytes", "gauge", "On disk.", buffer.size_bytes)
        yield one("buffer_max_bytes", "gauge", "The cap.", buffer.max_bytes)
        conditions = [((("condition", buffer.condition.value),), 1)]
        yield _family("buffer_condition", "gauge", "How the buffer is.", conditions)
    wrong = [((("code", p.code), ("device", p.device)), 1) for p in status.problems]
    yield _family("problem", "gauge", "What is wrong now; no line: all well.", dict(wrong).items())
    devices = [((("device", d.name), ("driver", d.driver)), d) for d in status.devices]
    yield _family(
        "device_up", "gauge", "1 while it answers.", ((at, int(d.state is State.OK)) for at, d in devices)
    )
    yield _family(
        "device_last_good_time_seconds", "gauge", "When it last gave a value that is not bad.",
        ((at, None if d.last_good_ns is None else d.last_good_ns / 1e9) for at, d in devices),
    )  # fmt: skip
    yield _family("device_scans_total", "counter", "Scans kept.", ((at, d.scans) for at, d in devices))
    yield _family(
        "device_readings_total", "counter", "Readings kept.", ((at, d.readings) for at, d in devices)
    )
    yield _family(
        "device_bad_readings_total", "counter", "Of these, bad.", ((at, d.bad_readings) for at, d in devices)
    )
    yield _family(
        "device_overruns_total", "counter", "Polls skipped.", ((at, d.overruns) for at, d in devices)
    )
    yield _family("device_missed_total", "counter", "Polls not tried.", ((at, d.missed) for at, d in devices))
    yield _family(
        "device_failures_total", "counter", "Reads that failed.", ((at, d.failures) for at, d in devices)
    )
    yield _family(
        "device_restarts_total", "counter", "Of its driver.", ((at, d.restarts) for at, d in devices)
    )


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> str:
    """One metric with its samples; nothing at all where none is known."""
    lines = []
    for labels, value in samples:
        if value is None:
            continue
        within = ",".join(f'{key}="{_escaped(said)}"' for key, said in labels)
        lines.append(f"headgate_{name}{{{within}}} {value}\n" if within else f"headgate_{name} {value}\n")
    if not lines:
        return ""
    return f"# HELP headgate_{name} {text}\n# TYPE headgate_{name} {kind}\n{''.join(lines)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
