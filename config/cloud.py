"""The cloud's configuration: what `headgate-cloud serve` reads. Embedded by default: a data folder and a port.

A secret is named by a file or an environment variable (`*_file`, `*_env`), never written here.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Server(_Strict, frozen=True, kw_only=True):
    data_dir: str = "/var/lib/headgate-cloud"
    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert_file: str | None = None  #: required where `host` is not loopback
    tls_key_file: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: float = 30.0  #: SIGTERM: how long the sinks may take to finish what they hold
    operator_token_file: str | None = None  #: the operator's API refuses everybody where no token is given
    operator_token_env: str | None = None


class MqttDoor(_Strict, frozen=True, kw_only=True):
    host: str = "localhost"
    port: int = 0  #: 0: 8883 with TLS, else 1883
    tls: bool = True
    ca_file: str | None = None
    user: str = "headgate-cloud"
    password_file: str | None = None
    password_env: str | None = None
    keepalive_s: float = 20.0


class Gateway(_Strict, frozen=True, kw_only=True):
    """One admitted gateway and its credential (for the HTTP door; a broker checks MQTT passwords itself)."""

    tenant: str
    name: str
    token_file: str | None = None
    token_env: str | None = None


class JournalSettings(_Strict, frozen=True, kw_only=True):
    kind: Literal["sqlite"] = "sqlite"
    max_mb: int = 10_240
    keep_hours: float = 72.0  #: kept this long after every sink is past it, for replay
    commit_interval_ms: float = 5.0  #: how long a group may wait for company
    free_disk_mb: int = 128


class Embedded(_Strict, frozen=True, kw_only=True):
    enabled: bool = True
    retention_days: float = 30.0


class Archive(_Strict, frozen=True, kw_only=True):
    """The Delta archive: in `<data_dir>/archive` unless an S3 endpoint is given."""

    enabled: bool = True
    endpoint: str | None = None  #: "https://minio.example:9000"
    bucket: str = "headgate"
    region: str = "us-east-1"
    access_key_file: str | None = None
    access_key_env: str | None = None
    secret_key_file: str | None = None
    secret_key_env: str | None = None
    commit_interval_s: float = 300.0
    commit_mb: int = 32
    retention_days: float = 3650.0
    compact_hours: float = 1.0
    vacuum_hours: float = 168.0


class InfluxDB(_Strict, frozen=True, kw_only=True):
    url: str
    org: str
    bucket: str = "headgate"
    token_file: str | None = None
    token_env: str | None = None
    retention_days: float = 0.0  #: 0: for ever; set when the bucket is created
    create_bucket: bool = True
    timeout_s: float = 10.0
    batch_lines: int = 5_000


class MySQL(_Strict, frozen=True, kw_only=True):
    host: str
    port: int = 3306
    user: str = "headgate"
    password_file: str | None = None
    password_env: str | None = None
    database: str = "headgate"
    ca_file: str | None = None  #: TLS with a verified certificate; required where `host` is not loopback
    retention_days: float = 90.0
    pool_size: int = 4


class Limits(_Strict, frozen=True, kw_only=True):
    new_series_per_hour: int = 10_000  #: per gateway; above it new points are dead letters and an alarm
    skew_alarm_s: float = 300.0
    max_inflight: int = 4_096  #: batches between the doors and the journal
    memory_mb: int = 512


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
