"""The cloud's configuration: what `headgate-cloud serve` reads. Embedded by default: a data folder and a port.

A secret is named by a file or an environment variable (`*_file`, `*_env`), never written here. What one value alone
cannot say (a certificate for an address that is not loopback, two gateways of one name) is in `conflicts`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Days: TypeAlias = Annotated[float, Meta(ge=0, le=36500)]
Rate: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
SinkName: TypeAlias = Literal["embedded", "archive", "influxdb", "mysql"]
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86400)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Server(_Strict, frozen=True, kw_only=True):
    data_dir: Text = "/var/lib/headgate-cloud"
    host: Text = "127.0.0.1"
    port: Port = 8080
    tls_cert_file: Text | None = None  #: required where `host` is not loopback
    tls_key_file: Text | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: Annotated[float, Meta(ge=0, le=600)] = 20.0  #: SIGTERM: how long the sinks may take to finish
    operator_token_file: Text | None = None  #: the operator's API refuses everybody where no token is given
    operator_token_env: Text | None = None


class MqttDoor(_Strict, frozen=True, kw_only=True):
    host: Text = "localhost"
    port: Port = 0  #: 0: 8883 with TLS, else 1883
    tls: bool = True
    ca_file: Text | None = None
    user: Text = "headgate-cloud"
    password_file: Text | None = None
    password_env: Text | None = None
    keepalive_s: Annotated[float, Meta(ge=5, le=3600)] = 20.0


class Gateway(_Strict, frozen=True, kw_only=True):
    """One admitted gateway and its credential (for the HTTP door; a broker checks MQTT passwords itself)."""

    tenant: Name
    name: Name
    token_file: Text | None = None
    token_env: Text | None = None
    readings_per_s: Rate | None = None  #: its quota, where it is not that of [limits]
    batches_per_s: Rate | None = None
    mb_per_s: Rate | None = None


class JournalSettings(_Strict, frozen=True, kw_only=True):
    kind: Literal["sqlite"] = "sqlite"
    max_mb: Annotated[int, Meta(ge=16, le=16_777_216)] = 10_240
    keep_hours: Annotated[float, Meta(ge=0, le=87600)] = 72.0  #: after every sink is past it, for replay
    commit_interval_ms: Annotated[float, Meta(ge=0, le=1000)] = 5.0  #: how long a group may wait for company
    free_disk_mb: Annotated[int, Meta(ge=0, le=16_777_216)] = 128
    required_sinks: list[SinkName] | None = None  #: whom a trim waits for; every enabled one where not set


class Embedded(_Strict, frozen=True, kw_only=True):
    enabled: bool = True
    retention_days: Days = 30.0


class Archive(_Strict, frozen=True, kw_only=True):
    """The Delta archive: in `<data_dir>/archive` unless an S3 endpoint is given."""

    enabled: bool = True
    endpoint: Text | None = None  #: "https://minio.example:9000"
    bucket: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "headgate"
    region: Text = "us-east-1"
    access_key_file: Text | None = None
    access_key_env: Text | None = None
    secret_key_file: Text | None = None
    secret_key_env: Text | None = None
    commit_interval_s: Seconds = 300.0
    commit_mb: Annotated[int, Meta(ge=1, le=1024)] = 32
    retention_days: Days = 3650.0
    compact_hours: Annotated[float, Meta(gt=0, le=8760)] = 1.0
    vacuum_hours: Annotated[float, Meta(gt=0, le=8760)] = 168.0


class InfluxDB(_Strict, frozen=True, kw_only=True):
    url: Annotated[str, Meta(pattern=r"^https?://[^/\s]+/?$")]
    org: Text
    bucket: Text = "headgate"
    token_file: Text | None = None
    token_env: Text | None = None
    retention_days: Days = 0.0  #: 0: for ever; set when the bucket is created
    create_bucket: bool = True
    timeout_s: Seconds = 10.0
    batch_lines: Annotated[int, Meta(ge=1, le=100_000)] = 5_000


class MySQL(_Strict, frozen=True, kw_only=True):
    host: Text
    port: Annotated[int, Meta(ge=1, le=65535)] = 3306
    user: Text = "headgate"
    password_file: Text | None = None
    password_env: Text | None = None
    database: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{1,64}$")] = "headgate"
    ca_file: Text | None = None  #: TLS with a verified certificate; required where `host` is not loopback
    retention_days: Days = 90.0
    pool_size: Annotated[int, Meta(ge=1, le=64)] = 4


class Limits(_Strict, frozen=True, kw_only=True):
    new_series_per_hour: Annotated[int, Meta(ge=1)] = (
        10_000  #: per gateway; above it: dead letters and an alarm
    )
    skew_alarm_s: Seconds = 300.0
    max_inflight: Annotated[int, Meta(ge=1, le=1_000_000)] = (
        4_096  #: batches between the doors and the journal
    )
    memory_mb: Annotated[int, Meta(ge=128, le=1_048_576)] = 512
    # Quotas; 0: without limit. The defaults let a day of backlog at 100 readings/s through in 20 s.
    gateway_readings_per_s: Rate = 500_000.0
    gateway_batches_per_s: Rate = 5_000.0
    gateway_mb_per_s: Rate = 32.0
    tenant_readings_per_s: Rate = 0.0
    tenant_batches_per_s: Rate = 0.0
    tenant_mb_per_s: Rate = 0.0
    quota_burst_s: Annotated[float, Meta(ge=1, le=3600)] = 10.0  #: how many seconds' worth may come at once


class Cloud(_Strict, frozen=True, kw_only=True):
    server: Server = Server()
    mqtt: MqttDoor | None = None
    gateway: list[Gateway] = []
    journal: JournalSettings = JournalSettings()
    embedded: Embedded = Embedded()
    archive: Archive = Archive()
    influxdb: InfluxDB | None = None
    mysql: MySQL | None = None
    limits: Limits = Limits()


class Conflict(msgspec.Struct, frozen=True):
    """Values that are each allowed and cannot stand together: where, what, and what to change."""

    path: str
    text: str


def conflicts(config: Cloud) -> list[Conflict]:
    """Everything that keeps this configuration from being used, by the values alone (no file is opened)."""
    found: list[Conflict] = []

    def wrong(path: str, text: str) -> None:
        found.append(Conflict(path, text))

    server = config.server
    if (server.tls_cert_file is None) != (server.tls_key_file is None):
        missing = "tls_key_file" if server.tls_key_file is None else "tls_cert_file"
        wrong(f"server.{missing}", "is missing: a certificate and its key come together")
    elif server.tls_cert_file is None and not _loopback(server.host):
        wrong(
            "server.host",
            f"{server.host} is not loopback, and plaintext is refused there; set tls_cert_file and tls_key_file",
        )
    if config.mqtt is not None:
        if not config.mqtt.tls and not _loopback(config.mqtt.host):
            wrong(
                "mqtt.tls",
                f"{config.mqtt.host} is not loopback, and plaintext is refused there; set tls = true",
            )
        if config.mqtt.password_file is None and config.mqtt.password_env is None:
            wrong("mqtt.password_file", "is missing: give password_file or password_env; there is no default")
    seen: dict[tuple[str, str], int] = {}
    for i, gateway in enumerate(config.gateway):
        first = seen.setdefault((gateway.tenant, gateway.name), i)
        if first != i:
            wrong(f"gateway[{i}].name", f"{gateway.tenant}/{gateway.name} is already gateway[{first}]")
        if gateway.token_file is None and gateway.token_env is None:
            wrong(f"gateway[{i}].token_file", "is missing: give token_file or token_env; there is no default")
    if (
        config.influxdb is not None
        and config.influxdb.token_file is None
        and config.influxdb.token_env is None
    ):
        wrong("influxdb.token_file", "is missing: give token_file or token_env; there is no default")
    if config.influxdb is not None:
        _refuse_plaintext(wrong, "influxdb.url", config.influxdb.url)
    if config.mysql is not None:
        if config.mysql.password_file is None and config.mysql.password_env is None:
            wrong(
                "mysql.password_file", "is missing: give password_file or password_env; there is no default"
            )
        if config.mysql.ca_file is None and not _loopback(config.mysql.host):
            wrong(
                "mysql.ca_file",
                f"is missing: {config.mysql.host} is not loopback, and plaintext is refused there",
            )
    archive = config.archive
    if archive.enabled and archive.endpoint is not None:
        for key in ("access_key", "secret_key"):
            if getattr(archive, f"{key}_file") is None and getattr(archive, f"{key}_env") is None:
                wrong(f"archive.{key}_file", f"is missing: give {key}_file or {key}_env; there is no default")
    if archive.enabled and archive.endpoint is not None:
        _refuse_plaintext(wrong, "archive.endpoint", archive.endpoint)
    if not (config.embedded.enabled or archive.enabled or config.influxdb or config.mysql):
        wrong(
            "embedded.enabled",
            "no sink is left: the journal would fill and then refuse everything; enable one",
        )
    enabled = sinks(config)
    required = config.journal.required_sinks
    if required is not None:
        for name in required:
            if enabled and name not in enabled:
                wrong(
                    "journal.required_sinks", f"{name} is not enabled here; enabled are {', '.join(enabled)}"
                )
        if not required:
            wrong(
                "journal.required_sinks",
                "is empty: readings would be trimmed before any sink had them; name one, or leave it out",
            )
    return found


def sinks(config: Cloud) -> list[SinkName]:
    """Those that are enabled."""
    there: list[tuple[SinkName, bool]] = [
        ("embedded", config.embedded.enabled),
        ("archive", config.archive.enabled),
        ("influxdb", config.influxdb is not None),
        ("mysql", config.mysql is not None),
    ]
    return [name for name, enabled in there if enabled]


def _refuse_plaintext(wrong: Callable[[str, str], None], path: str, url: str) -> None:
    """Tokens and readings cross no network in the open."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return  # the sink says what is wrong with it
    host = parts.hostname or ""
    if parts.scheme == "http" and not _loopback(host):
        wrong(path, f"{host} is not loopback, and plaintext is refused there; use https://")


def _loopback(host: str) -> bool:
    if host in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
