"""The gateway's configuration: what `headgate run` reads. Every key has a default but what only its owner knows.

A driver's own keys (`[device.options]`, and the point keys beyond the common ones) are checked by the driver's types
when the device is built, with the same kind of error.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

Table: TypeAlias = dict[str, Any]
"""A table that belongs to a driver; its types check it."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Gateway(_Strict, frozen=True, kw_only=True):
    tenant: str
    name: str
    state_dir: str = "/var/lib/headgate"  #: buffer, status and last-known-good configuration
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Buffer(_Strict, frozen=True, kw_only=True):
    max_mb: int = 1024  #: byte cap of buffer and WAL together
    free_disk_mb: int = 64  #: never fill the disk beyond this
    ballast_kb: int = 1024  #: released when the disk is full, so that acked data can be removed
    commit_interval_s: float = 1.0  #: the published loss window
    commit_max_kb: int = 256  #: commit earlier when this much is pending
    low_latency: bool = False  #: commit every 100 ms instead
    quick_check_s: float = 5.0  #: time budget for the check at start
    max_age_days: float = 0.0  #: 0: no age limit, only bytes


class Uplink(_Strict, frozen=True, kw_only=True):
    kind: Literal["mqtt", "https", "none"] = "mqtt"
    host: str = "localhost"
    port: int = 0  #: 0: 8883 / 1883 (mqtt with / without TLS), 443 / 8080 (https)
    tls: bool = True  #: plaintext is refused except to loopback
    ca_file: str | None = None  #: the CA to trust; the system's where unset
    token_file: str | None = None  #: the gateway's credential
    token_env: str | None = None
    keepalive_s: float = 20.0  #: a half-open link is found within 1.5 times this
    connect_timeout_s: float = 10.0
    ack_timeout_s: float = 10.0  #: resend after this
    window: int = 16  #: batches under way at once
    backlog_share: float = 0.5  #: of the window, for frames older than the live lane
    backoff_min_s: float = 0.5
    backoff_max_s: float = 60.0
    heartbeat_s: float = 30.0


class Device(_Strict, frozen=True, kw_only=True):
    name: str
    driver: str
    period_ms: int = 1000
    phase_ms: int | None = None  #: unset: spread evenly by the device's name
    timeout_ms: int | None = (
        None  #: deadline of one read; unset: the driver's suggestion, else the period or 5 s
    )
    measurement: str | None = None  #: the InfluxDB measurement; unset: the driver's name
    tags: dict[str, str] = {}
    enabled: bool = True
    options: Table = {}
    point: list[Table] = []


class Agent(_Strict, frozen=True, kw_only=True):
    gateway: Gateway
    buffer: Buffer = Buffer()
    uplink: Uplink = Uplink()
    device: list[Device] = []
