"""What the cloud counts, and how it is shown to Prometheus.

Counting is plain integer addition in the loop's thread, done per group and not per batch: it costs the hot path
nothing. The text is made when somebody asks for it.

Rule: whatever is refused or dropped anywhere has a counter here; nothing disappears uncounted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cloud.accounting import NOT_YET, Accounts

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cloud.api.models import FrameAccount, SinkAccount
    from cloud.registry import GapTally
    from cloud.runner import SinkState

LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Seconds in buckets."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.sum_s += seconds * times

    @property
    def total(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        running, out = 0, []
        for bound, n in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += n
            out.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
        return out


class Metrics:
    """One per server. Every counter only grows."""

    __slots__ = (
        "ack_latency",
        "batches",
        "bytes",
        "door_drops",
        "duplicate_batches",
        "duplicate_frames",
        "frames",
        "readings",
        "refused",
        "replies_lost",
        "retry",
        "states",
        "states_refused",
        "unauthorized",
    )

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()  #: by door, as received
        self.bytes: Counter[str] = Counter()  #: by door
        self.frames = 0  #: of batches that were acknowledged
        self.readings = 0  #: of batches that were acknowledged and not entirely duplicates
        self.duplicate_batches = 0  #: nothing in them was new
        self.duplicate_frames = 0
        self.refused: Counter[str] = Counter()  #: permanently, by code
        self.retry: Counter[str] = Counter()  #: with retry-after, by code
        self.unauthorized = 0  #: HTTP requests without a valid credential
        self.states: Counter[str] = Counter()  #: heartbeats, by door
        self.states_refused = 0
        self.door_drops: Counter[str] = (
            Counter()
        )  #: messages a door let go unanswered, by reason; agents resend
        self.replies_lost = 0  #: acks and nacks that the broker's link did not take
        self.ack_latency = Histogram()  #: from the door to the reply


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is measured at the moment of asking."""

    journal_bytes: int = 0
    journal_max_bytes: int = 0
    journal_last_offset: int = 0
    journal_oldest_age_s: float = 0.0
    journal_ok: bool = True
    broker_connected: bool | None = None
    sinks: tuple[SinkState, ...] = ()
    dead_letters: tuple[tuple[str, int], ...] = ()  #: (sink, letters)
    dead_letters_dropped: int = 0
    trimmed: int = 0
    memory_bytes: int = 0
    new_series_refused: tuple[tuple[str, int], ...] = ()  #: (gateway, readings), by every sink that asked
    skewed_batches: tuple[tuple[str, int], ...] = ()  #: (gateway, batches)
    clock_skew_s: tuple[
        tuple[str, float], ...
    ] = ()  #: (gateway, seconds ahead of this machine; behind: below 0)
    accounts: Accounts = NOT_YET
    problems: tuple[str, ...] = ()  #: codes of `cloud.health`
    gateway_problems: tuple[tuple[str, str], ...] = ()  #: (gateway, the agent's code)
    missed: tuple[tuple[str, str, int], ...] = ()  #: (sink, gateway, readings)
    quota_refused: tuple[tuple[str, int], ...] = ()  #: (gateway, batches)
    gaps: tuple[GapTally, ...] = ()


def exposition(metrics: Metrics, gauges: Gauges) -> bytes:
    """The Prometheus text."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Now(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from _counted(metrics)
            yield from _measured(gauges)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    return generate_latest(registry)


def _counted(metrics: Metrics) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    labelled: list[tuple[str, str, str, Counter[str]]] = [
        ("batches_received", "Batches that came in.", "door", metrics.batches),
        ("bytes_received", "Bytes of batches that came in.", "door", metrics.bytes),
        ("batches_refused", "Batches refused for ever.", "code", metrics.refused),
        ("batches_deferred", "Batches answered with retry-after.", "code", metrics.retry),
        ("states_received", "Heartbeats that came in.", "door", metrics.states),
        ("door_dropped", "Messages that a door let go unanswered; agents send them again.", "reason",
         metrics.door_drops),
    ]  # fmt: skip
    for name, text, label, counter in labelled:
        family = CounterMetricFamily(f"headgate_{name}", text, labels=[label])
        for key, value in sorted(counter.items()):
            family.add_metric([key], value)
        yield family
    plain = [
        ("frames_acknowledged", "Frames in acknowledged batches.", metrics.frames),
        ("readings_received", "Readings in acknowledged batches that were not duplicates.", metrics.readings),
        ("duplicate_batches", "Batches of which everything was already held.", metrics.duplicate_batches),
        ("duplicate_frames", "Frames that were already held.", metrics.duplicate_frames),
        ("unauthorized", "HTTP requests without a valid credential.", metrics.unauthorized),
        ("states_refused", "Heartbeats that were not what they should be.", metrics.states_refused),
        ("replies_lost", "Replies that the broker's link did not take.", metrics.replies_lost),
    ]
    for name, text, number in plain:
        yield CounterMetricFamily(f"headgate_{name}", text, value=number)
    histogram = metrics.ack_latency
    latency = HistogramMetricFamily(
        "headgate_ack_latency_seconds", "From a batch's arrival at the door to its reply."
    )
    latency.add_metric([], histogram.buckets(), histogram.sum_s)
    yield latency


def _measured(gauges: Gauges) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    plain = [
        ("journal_bytes", "Bytes that the journal takes.", gauges.journal_bytes),
        ("journal_max_bytes", "Bytes that the journal may take.", gauges.journal_max_bytes),
        ("journal_last_offset", "The newest offset.", gauges.journal_last_offset),
        ("journal_oldest_age_seconds", "Age of the oldest entry held.", gauges.journal_oldest_age_s),
        ("journal_ok", "1 where the last write to the journal worked.", int(gauges.journal_ok)),
        ("memory_bytes", "Resident memory of the server.", gauges.memory_bytes),
    ]
    for name, text, number in plain:
        yield GaugeMetricFamily(f"headgate_{name}", text, value=number)
    if gauges.broker_connected is not None:
        yield GaugeMetricFamily(
            "headgate_broker_connected", "1 where the MQTT door is open.", value=int(gauges.broker_connected)
        )
    families: list[tuple[GaugeMetricFamily | CounterMetricFamily, Callable[[SinkState], float]]] = [
        (GaugeMetricFamily("headgate_sink_lag_seconds", "Age of the oldest batch not yet in the sink.",
                           labels=["sink"]), lambda s: s.lag_s),
        (GaugeMetricFamily("headgate_sink_up", "1 where the sink takes records.", labels=["sink"]),
         lambda s: s.word == "running"),
        (GaugeMetricFamily("headgate_sink_position", "The offset up to which all is settled.", labels=["sink"]),
         lambda s: s.position),
        (CounterMetricFamily("headgate_sink_records", "Records written.", labels=["sink"]),
         lambda s: s.accepted_records),
        (CounterMetricFamily("headgate_sink_readings", "Readings written.", labels=["sink"]),
         lambda s: s.accepted_readings),
        (CounterMetricFamily("headgate_sink_rejected", "Records sent to the dead letters.", labels=["sink"]),
         lambda s: s.rejected_records),
        (CounterMetricFamily("headgate_sink_retries", "Calls that had to be made again.", labels=["sink"]),
         lambda s: s.retries),
        (CounterMetricFamily("headgate_sink_missed", "Batches trimmed before the sink had them.", labels=["sink"]),
         lambda s: s.missed_entries),
        (CounterMetricFamily("headgate_sink_expired", "Readings older than the sink keeps anything; the archive has "
                             "them.", labels=["sink"]),
         lambda s: s.expired_readings),
    ]  # fmt: skip
    for family, value in families:
        for sink in gauges.sinks:
            family.add_metric([sink.name], value(sink))
        yield family
    letters = GaugeMetricFamily("headgate_dead_letters", "Dead letters that are kept.", labels=["sink"])
    for name, number in gauges.dead_letters:
        letters.add_metric([name], number)
    yield letters
    yield CounterMetricFamily(
        "headgate_dead_letters_dropped",
        "Dead letters that had to go for want of room.",
        value=gauges.dead_letters_dropped,
    )
    yield CounterMetricFamily(
        "headgate_journal_trimmed", "Journal entries removed by trim.", value=gauges.trimmed
    )
    by_gateway = [
        ("new_series_refused", "Readings to the dead letters for too many new series; each sink counts its own.",
         gauges.new_series_refused),
        ("quota_refused_batches", "Batches of a gateway that was over its quota.", gauges.quota_refused),
        ("clock_skewed_batches", "Batches of a gateway whose clock was ahead by more than limits.skew_alarm_s.",
         gauges.skewed_batches),
    ]  # fmt: skip
    skew = GaugeMetricFamily(
        "headgate_clock_skew_seconds",
        "A gateway's clock less this one, as it found by its last ack; below 0: behind.",
        labels=["tenant", "gateway"],
    )
    for gateway, seconds in gauges.clock_skew_s:
        skew.add_metric(gateway.split("/"), seconds)
    yield skew
    for name, text, numbers in by_gateway:
        family = CounterMetricFamily(f"headgate_{name}", text, labels=["tenant", "gateway"])
        for gateway, number in numbers:
            family.add_metric(gateway.split("/"), number)
        yield family
    yield from _troubled(gauges)
    yield from _accounted(gauges.accounts)


def _troubled(gauges: Gauges) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily("headgate_problem", "1 for each thing that is wrong now.", labels=["code"])
    for code in gauges.problems:
        family.add_metric([code], 1)
    yield family
    family = GaugeMetricFamily(
        "headgate_gateway_problem", "1 for each thing that an agent says is wrong.",
        labels=["tenant", "gateway", "code"],
    )  # fmt: skip
    for gateway, code in gauges.gateway_problems:
        family.add_metric([*gateway.split("/", 1), code], 1)
    yield family
    family = GaugeMetricFamily(
        "headgate_missed_readings", "Readings (at most) trimmed before the sink had them, and not replayed since.",
        labels=["sink", "tenant", "gateway"],
    )  # fmt: skip
    for sink, gateway, readings in gauges.missed:
        family.add_metric([sink, *gateway.split("/", 1)], readings)
    yield family
    family = GaugeMetricFamily(
        "headgate_gap_readings", "Readings that a gateway reported as lost, at the last account.",
        labels=["tenant", "gateway", "reason", "priority"],
    )  # fmt: skip
    for gap in gauges.gaps:
        family.add_metric([gap.tenant, gap.gateway, gap.reason, gap.priority], gap.lost_readings)
    yield family


def _accounted(accounts: Accounts) -> Iterator[Metric]:
    """journaled = stored + dead + pending + expired + missed + missing - doubled, at the last check."""
    from prometheus_client.core import GaugeMetricFamily

    plain = [
        ("account_ok", "1 where the last account balanced in every sink.", int(accounts.ok)),
        ("account_checked_timestamp_seconds", "When the last account was made; 0: not yet.", accounts.checked_at_s),
        ("account_duration_seconds", "How long the last account took.", accounts.took_s),
        ("account_unasked_sinks", "Sinks that the last account could not ask.", accounts.unasked),
    ]  # fmt: skip
    for name, text, number in plain:
        yield GaugeMetricFamily(f"headgate_{name}", text, value=number)
    counted: list[tuple[str, str, Callable[[FrameAccount], int]]] = [
        ("received_frames", "Frames that came in.", lambda a: a.received),
        ("duplicate_frames", "Frames of those that the journal held before.", lambda a: a.duplicate),
        ("absent_frames", "Frames between others that never came and no gap reports.", lambda a: a.absent),
        ("missing_frames", "Those of them whose gateway holds nothing more.", lambda a: a.missing),
    ]
    for name, text, count in counted:
        family = GaugeMetricFamily(f"headgate_account_{name}", text, labels=["tenant", "gateway"])
        for frames in accounts.frames:
            family.add_metric(frames.gateway.split("/"), count(frames))
        yield family
    columns: list[tuple[str, str, Callable[[SinkAccount], int]]] = [
        ("journaled", "Readings that the journal took.", lambda a: a.journaled),
        ("stored", "Readings that the sink holds.", lambda a: a.stored),
        ("dead", "Readings in the sink's dead letters.", lambda a: a.dead),
        ("pending", "Readings that the sink is still to take.", lambda a: a.pending),
        ("expired", "Readings that the sink's retention removed.", lambda a: a.expired),
        (
            "missed",
            "Readings trimmed before the sink had them; a replay gives them to it.",
            lambda a: a.missed,
        ),
        ("missing", "Readings that are nowhere.", lambda a: a.missing),
        ("doubled", "Readings that the sink holds too often.", lambda a: a.doubled),
    ]
    for name, text, value in columns:
        family = GaugeMetricFamily(f"headgate_account_{name}", text, labels=["tenant", "gateway", "sink"])
        for row in accounts.rows:
            tenant, _, gateway = row.gateway.partition("/")
            family.add_metric([tenant, gateway, row.sink], value(row))
        yield family
