"""The gateway's configuration: what `headgate run` reads. Every key has a default but what only its owner knows.

A driver's own keys (`[device.options]`, and the point keys beyond the common ones) are checked by the driver's types
when the device is built, with the same kind of error.
"""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

Table: TypeAlias = dict[str, Any]
"""A table that belongs to a driver; its types check it."""

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
"""A name that a person reads: not empty, one line."""
Id: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""A name that stands in topics and paths (`sync.identity.ID_PATTERN`)."""
FilePath: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65_535)]
Timeout: TypeAlias = Annotated[float, Meta(gt=0, le=3_600)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Gateway(_Strict, frozen=True, kw_only=True):
    tenant: Id
    name: Id
    state_dir: FilePath = "/var/lib/headgate"  #: buffer, status and last-known-good configuration
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Buffer(_Strict, frozen=True, kw_only=True):
    max_mb: Annotated[int, Meta(ge=4, le=1_048_576)] = 1024  #: byte cap of buffer and WAL together
    free_disk_mb: Annotated[int, Meta(ge=0, le=1_048_576)] = 64  #: never fill the disk beyond this
    ballast_kb: Annotated[int, Meta(ge=0, le=65_536)] = (
        1024  #: released when the disk is full, so that acked data can be removed
    )
    commit_interval_s: Annotated[float, Meta(ge=0.01, le=60)] = 1.0  #: the published loss window
    commit_max_kb: Annotated[int, Meta(ge=1, le=16_384)] = 256  #: commit earlier when this much is pending
    low_latency: bool = False  #: commit every 100 ms instead
    quick_check_s: Annotated[float, Meta(ge=0, le=600)] = 0.5  #: time budget for the check at start
    keep_damaged_mb: Annotated[int, Meta(ge=0, le=1_048_576)] = (
        1024  #: damaged files kept after they were salvaged
    )
    max_age_days: Annotated[float, Meta(ge=0, le=36_500)] = 0.0  #: 0: no age limit, only bytes
    clock_hold_s: Annotated[float, Meta(ge=0, le=604_800)] = (
        3600.0  #: readings of a start whose clock is not set yet wait so long for it, where it is to be expected
    )
    when_full: Literal["drop", "thin"] = (
        "drop"  #: the oldest of the lowest priority, at once or one in `thin_keep` kept
    )
    thin_keep: Annotated[int, Meta(ge=2, le=1_000)] = 10  #: of so many scans of a device, one stays


class Fallback(_Strict, frozen=True, kw_only=True):
    """The second way to the cloud; waits, window and shares are those of `[uplink]`."""

    kind: Literal["mqtt", "https", "none"] = "none"
    host: Name = "localhost"
    port: Port = 0
    tls: bool = True
    ca_file: FilePath | None = None
    token_file: FilePath | None = None
    token_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z")] | None = None
    after_failures: Annotated[int, Meta(ge=1, le=100)] = 3  #: of the first way, in a row
    return_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0  #: how often the first is looked at meanwhile


Hours: TypeAlias = Annotated[
    str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)\Z")
]
"""A part of each day, "22:00-06:00": from the first minute up to the last, which may be tomorrow's."""


class Metered(_Strict, frozen=True, kw_only=True):
    """What a link that costs may carry, and when. The defaults hold nothing back."""

    hours: tuple[Hours, ...] = ()  #: when all may go; none: at any time
    timezone: Name = "UTC"  #: of the hours and of the day; an IANA name
    bytes_per_day: Annotated[int, Meta(ge=0, le=1 << 50)] = 0  #: 0: no limit
    always: Literal["none", "alarm", "normal"] = (
        "alarm"  #: this and what is above it goes at any time, and counts
    )
    applies_to: Literal["all", "fallback"] = "all"  #: fallback: only the second way costs

    def __post_init__(self) -> None:
        if self.timezone == "UTC":
            return  # known on a system without zone files, too
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                f"timezone: {self.timezone!r} is not known here; give an IANA name as Europe/Zurich, or UTC"
            ) from None

    @property
    def limits(self) -> bool:
        """Whether anything is ever held back."""
        return bool(self.hours or self.bytes_per_day)


class Uplink(_Strict, frozen=True, kw_only=True):
    kind: Literal["mqtt", "https", "none"] = "mqtt"
    host: Name = "localhost"
    port: Port = 0  #: 0: 8883 / 1883 (mqtt with / without TLS), 443 / 8080 (https)
    tls: bool = True  #: plaintext is refused except to loopback
    ca_file: FilePath | None = None  #: the CA to trust; the system's where unset
    token_file: FilePath | None = None  #: the gateway's credential
    token_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z")] | None = None
    keepalive_s: Annotated[float, Meta(ge=1, le=3_600)] = (
        20.0  #: a half-open link is found within 1.5 times this
    )
    connect_timeout_s: Timeout = 10.0
    ack_timeout_s: Timeout = 10.0  #: resend after this
    window: Annotated[int, Meta(ge=1, le=1_024)] = 16  #: batches under way at once
    backlog_share: Annotated[float, Meta(ge=0, le=1)] = (
        0.5  #: of the window, for frames older than the live lane
    )
    backoff_min_s: Annotated[float, Meta(gt=0, le=3_600)] = 0.5
    backoff_max_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    heartbeat_s: Annotated[float, Meta(ge=1, le=86_400)] = 30.0
    fallback: Fallback = Fallback()
    metered: Metered = Metered()

    def __post_init__(self) -> None:
        if self.kind == "none" and self.fallback.kind != "none":
            raise ValueError('fallback.kind: there is nothing to fall back from; kind is "none"')
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(
                f"backoff_min_s: {self.backoff_min_s:g} is more than backoff_max_s {self.backoff_max_s:g}"
            )

    @property
    def ways(self) -> dict[str, Uplink]:
        """Each way to the cloud as if it were the only one, by its place in the file, the first one first."""
        if self.kind == "none":
            return {}
        other, alone = self.fallback, msgspec.structs.replace(self, fallback=Fallback())
        if other.kind == "none":
            return {"uplink": alone}
        second = msgspec.structs.replace(
            alone,
            kind=other.kind,
            host=other.host,
            port=other.port,
            tls=other.tls,
            ca_file=other.ca_file,
            token_file=other.token_file,
            token_env=other.token_env,
        )
        return {"uplink": alone, "uplink.fallback": second}


SHORTEST_PERIOD_MS = 20


class Device(_Strict, frozen=True, kw_only=True):
    name: Name
    driver: Name | None = None  #: unset: the profile's
    profile: Name | None = None  #: a device model that we or you described; its options and points come first
    only: list[Name] | None = None  #: of the profile's points, these; unset: all
    isolate: bool = False  #: a process of its own, for a driver that blocks or crashes
    period_ms: Annotated[int, Meta(ge=0, le=2_592_000_000)] = (
        1000  #: 20 and more; 0: as fast as it answers (to measure)
    )
    phase_ms: Annotated[int, Meta(ge=0)] | None = None  #: unset: spread evenly by the device's name
    timeout_ms: Annotated[int, Meta(ge=1, le=3_600_000)] | None = (
        None  #: deadline of one read; unset: 5 s, or the period where that is longer (30 s at most)
    )
    measurement: Name | None = None  #: the InfluxDB measurement; unset: the driver's name
    tags: dict[Name, Name] = {}
    priority: Literal["alarm", "normal", "bulk"] = "normal"  #: of its readings; a point may say otherwise
    enabled: bool = True
    options: Table = {}
    point: list[Table] = []

    def __post_init__(self) -> None:
        if self.driver is None and self.profile is None:
            raise ValueError(
                "driver: missing; name the driver, or a profile that knows it (headgate profiles)"
            )
        if self.only is not None and self.profile is None:
            raise ValueError("only: chooses from a profile's points, and no profile is named")
        if 0 < self.period_ms < SHORTEST_PERIOD_MS:
            raise ValueError(
                f"period_ms: {self.period_ms} is too short; the shortest is {SHORTEST_PERIOD_MS} (0: as fast as "
                "it answers)"
            )
        if self.phase_ms is not None and self.phase_ms >= max(self.period_ms, 1):
            raise ValueError(
                f"phase_ms: {self.phase_ms} is not within the period of {self.period_ms} ms; give 0 to "
                f"{max(self.period_ms - 1, 0)}"
            )


class Agent(_Strict, frozen=True, kw_only=True):
    gateway: Gateway
    buffer: Buffer = Buffer()
    uplink: Uplink = Uplink()
    device: list[Device] = []
