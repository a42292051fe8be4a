"""Which real servers the tests use, in which version, and where each may come from.

Rules: data only, nothing here looks at the machine. The order of places is the same for all and stands in
`locate.py`. A version is pinned wherever we fetch the program ourselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Build(Enum):
    """The programs that no Debian package holds; each is built by one function of `install.py`."""

    MINIO = "minio"
    VERSITYGW = "versitygw"
    INFLUXD = "influxd"


@dataclass(frozen=True, slots=True)
class Server:
    """One program that the tests start, or a tool that they call."""

    name: str
    binary: str
    version: str
    """What we build or pull. A program found on PATH may be another version that `accept` admits."""
    accept: str
    """A regular expression that the program's own version text must match."""
    version_arguments: tuple[str, ...]
    address_variable: str | None = None
    """Environment variable with the URL of a server that runs elsewhere; None where that makes no sense."""
    image: str | None = None
    apt: tuple[str, ...] = ()
    build: Build | None = None
    build_minutes: str = "4 to 10"
    """On 2 cores with empty caches."""
    wheel: bool = False
    """True where the program comes with the development dependencies, in the environment's bin folder."""
    companions: tuple[str, ...] = ()
    """Other programs that starting it calls, and that may come in packages of their own."""
    unit: str | None = None
    """The service that its Debian package starts by itself, and that the tests have no use for."""
    stand_in: Server | None = None
    """Another product that speaks the same, taken where this one cannot be had."""

    @property
    def remedy(self) -> str:
        """The line that a person types to get it."""
        if self.wheel:
            return "make setup"
        if self.build is not None:
            built = self.name + (f" or {self.stand_in.name}" if self.stand_in is not None else "")
            return f"make servers   # builds {built}, {self.build_minutes} minutes on 2 cores"
        return f"sudo apt-get install -y --no-install-recommends {' '.join(self.apt)}"


MOSQUITTO = Server(
    name="mosquitto",
    binary="mosquitto",
    version="2.0",
    accept=r"version 2\.",
    version_arguments=("-h",),
    address_variable="HEADGATE_TEST_MOSQUITTO",
    image="eclipse-mosquitto:2.0",
    apt=("mosquitto",),
    unit="mosquitto.service",
)
NATS = Server(
    name="nats",
    binary="nats-server",
    version="2.15.1",
    accept=r"v2\.",
    version_arguments=("--version",),
    address_variable="HEADGATE_TEST_NATS",
    image="nats:2.12",
    wheel=True,
)
MARIADB = Server(
    name="mariadb",
    binary="mariadbd",
    version="10.11",
    accept=r"MariaDB",
    version_arguments=("--no-defaults", "--version"),
    address_variable="HEADGATE_TEST_MARIADB",
    image="mariadb:10.11",
    # The server alone: unlike mariadb-server, these start no service on the machine.
    # mariadb-client: the dump and the reader of the binary log, for the recovery drill.
    apt=("mariadb-server-core", "mariadb-client-core", "mariadb-client"),
    companions=("mariadb-install-db", "my_print_defaults"),
)
VERSITYGW = Server(
    name="versitygw",
    binary="versitygw",
    version="1.8.0",
    accept=r"Version\s*: (git|v1\.)",  # "git" where its builder did not say, as `go install` does not
    version_arguments=("--version",),
    build=Build.VERSITYGW,
    build_minutes="2 to 4",
)
MINIO = Server(
    name="minio",
    binary="minio",
    version="RELEASE.2025-10-15T17-29-55Z",
    accept=r"minio version",
    version_arguments=("--version",),
    address_variable="HEADGATE_TEST_MINIO",
    image="minio/minio:RELEASE.2025-09-07T16-13-09Z",
    build=Build.MINIO,
    stand_in=VERSITYGW,
)
INFLUXDB = Server(
    name="influxdb",
    binary="influxd",
    version="2.7.12",
    accept=r"InfluxDB (v?2\.|dev)",
    version_arguments=("version",),
    address_variable="HEADGATE_TEST_INFLUXDB",
    image="influxdb:2.7",
    build=Build.INFLUXD,
)
DBUS = Server(
    name="dbus",
    binary="dbus-daemon",
    version="1.14",
    accept=r"D-Bus",
    version_arguments=("--version",),
    apt=("dbus-daemon",),
)
SYSTEMD = Server(
    name="systemd",
    binary="systemd-analyze",
    version="252",
    accept=r"systemd \d",
    version_arguments=("--version",),
    apt=("systemd",),
)

# Quick ones first, so that a person sees something happen; the two builds last.
ALL: tuple[Server, ...] = (NATS, MOSQUITTO, MARIADB, DBUS, SYSTEMD, MINIO, INFLUXDB)
# Those too that are brought only in another's stead, or when named.
KNOWN: dict[str, Server] = {server.name: server for server in (*ALL, VERSITYGW)}
