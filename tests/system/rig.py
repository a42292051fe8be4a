"""The whole system on real servers, for tests that kill parts of it.

One agent with simulated devices, one broker without persistence (or the HTTPS door), one cloud with all four sinks on
InfluxDB, MariaDB, an S3 store and the embedded stores. Each part can be killed and started again. The account at the
end is drawn from each store by its own interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import trustme
from deltalake import DeltaTable

from tests.fakes.fault_proxy import ProxyProcess, proxy_process
from tests.servers import run
from tests.servers.process import ServerProcess, free_port, wait_until
from tests.system.child import BIN, Child

DEVICES = 8
POINTS = 12
PERIOD_MS = 50
COMMIT_INTERVAL_S = 0.05  #: small, so that at any moment some batch is between two parts

#: device, point, taken_at in microseconds, value. InfluxDB's nanoseconds end with the frame's number.
Value: TypeAlias = tuple[str, str, int, float]


@dataclass
class Held:
    """What one store holds. `identities` are (device, point, epoch, seq); InfluxDB keeps none, its rows are told apart
    by series and time."""

    rows: int
    identities: int
    values: set[Value]

    @property
    def doubled(self) -> int:
        return self.rows - self.identities


@dataclass
class Account:
    """What the gateway kept, in readings, and what each sink holds."""

    kept: int
    gapped: int
    frames: int
    held: dict[str, Held]
    holes: int  #: frame numbers up to the last that the embedded sink has as no reading, event or gap
    passed_over: int = (
        0  #: more of these, but told: a kill tore a commit, and its gap says which were not given out
    )

    def __str__(self) -> str:
        sinks = ", ".join(f"{name} {held.rows} ({held.doubled} doubled)" for name, held in self.held.items())
        told = f"gaps {self.gapped}, holes {self.holes}, passed over {self.passed_over}"
        return f"kept {self.kept} in {self.frames} frames, {told}; {sinks}"


@dataclass
class Rig:
    folder: Path
    transport: str  #: "mqtt" or "https"
    servers: dict[str, ServerProcess] = field(default_factory=dict)
    links: dict[str, ProxyProcess] = field(default_factory=dict)  #: lines to misuse: uplink, and each store's
    children: dict[str, Child] = field(default_factory=dict)
    influx: run.InfluxDb | None = None
    maria: run.MariaDb | None = None
    s3: run.S3 | None = None
    cloud_port: int = 0

    def secret(self, name: str, text: str = "") -> Path:
        path = self.folder / name
        if not path.exists():
            path.touch(0o600)
            path.write_text(text or secrets.token_urlsafe(24))
        return path

    def killable(self) -> list[str]:
        return [*self.servers, *self.children]

    def kill(self, name: str) -> None:
        """SIGKILL, at once."""
        if name in self.children:
            self.children[name].end(signal.SIGKILL)
        else:
            self.servers[name].kill()

    def revive(self, name: str) -> None:
        if name in self.children:
            self.children[name].start()
        else:
            self.servers[name].start()

    # --- what the agent says ---

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "gateway/status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def buffered(self) -> int | None:
        """Readings that wait in the buffer, or None where the agent has not said yet."""
        buffer = self.status().get("buffer")
        if not buffer:
            return None
        waiting: int = buffer["kept_readings"] - buffer["settled_readings"] - buffer["gapped_readings"]
        return waiting

    def settled(self) -> int:
        buffer = self.status().get("buffer") or {}
        settled: int = buffer.get("settled_readings", 0)
        return settled

    def wait_for_acks(self, timeout_s: float = 60.0) -> None:
        """Until more is acked than now: everything between device and journal works again."""
        mark = self.settled()

        def more() -> bool:
            for child in self.children.values():
                child.check()
            return self.settled() > mark

        wait_until(more, timeout_s=timeout_s, what="another ack")

    # --- the end ---

    def finish(self, timeout_s: float = 90.0) -> Account:
        """The agent commits and leaves; without devices it empties its buffer; the sinks catch up, and the cloud
        leaves, so that nothing can be written any more. Then the account."""
        self.wait_for_acks()  # all of it lives again, and by itself
        agent, cloud = self.children["agent"], self.children["cloud"]
        assert agent.end(signal.SIGTERM) == 0, "the agent did not leave in order"
        config = self.folder / "agent.toml"
        (self.folder / "drain.toml").write_text(config.read_text().split("[[device]]", 1)[0])
        drainer = Child(
            "drain",
            [str(BIN / "headgate"), "run", "--config", f"{self.folder}/drain.toml"],
            self.folder,
            agent.env,
        )
        started_ns = time.time_ns()
        drainer.start()
        try:

            def empty() -> bool:
                drainer.check()
                return self.status().get("written_ns", 0) > started_ns and self.buffered() == 0

            wait_until(empty, timeout_s=timeout_s, what="the buffer to be empty")
            status = self.status()
            assert drainer.end(signal.SIGTERM) == 0
        finally:
            drainer.stop_hard()
        buffer = status["buffer"]
        kept, gapped = buffer["kept_readings"], buffer["gapped_readings"]
        behind = {"embedded": self.count_embedded, "archive": self.count_archive}
        if self.maria is not None:
            behind["mysql"] = self.count_mysql
        if self.influx is not None:
            behind["influxdb"] = self.count_influxdb
        deadline_s = time.monotonic() + timeout_s
        while behind and time.monotonic() < deadline_s:
            behind = {sink: count for sink, count in behind.items() if count() < kept - gapped}
            time.sleep(0.5)  # a count costs the store something
        assert cloud.end(signal.SIGTERM) == 0, "the cloud did not leave in order"
        held = {"embedded": self.embedded(), "archive": self.archive()}
        if self.maria is not None:
            held["mysql"] = self.mysql()
        if self.influx is not None:
            held["influxdb"] = self.influxdb()
        passed_over = self.passed_over()
        return Account(kept, gapped, buffer["kept_frames"], held, self.holes() - passed_over, passed_over)

    # --- each store, by its own interface ---

    def _sqlite(self, sql: str) -> list[tuple[Any, ...]]:
        file = self.folder / "cloud/readings.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchall()

    def count_embedded(self) -> int:
        with contextlib.suppress(sqlite3.OperationalError):  # not made yet
            return int(self._sqlite("SELECT count(*) FROM readings")[0][0])
        return 0

    def embedded(self) -> Held:
        return _held_by_sql(self._sqlite(READINGS))

    def holes(self) -> int:
        """Every number up to the last is there, of each epoch; the account of the buffer itself is not asked."""
        seqs = "SELECT epoch, seq FROM readings UNION SELECT epoch, seq FROM events UNION SELECT epoch, seq FROM gaps"
        rows = self._sqlite(f"SELECT max(seq) - count(*) FROM ({seqs}) GROUP BY epoch")
        return sum(int(row[0]) for row in rows)

    def passed_over(self) -> int:
        """Those in gaps of reason `skipped`: a log that ends in a torn commit, as a kill leaves it now and then."""
        told = "SELECT coalesce(sum(last_seq - first_seq + 1), 0) FROM gaps WHERE reason = 'skipped'"
        return int(self._sqlite(told)[0][0])

    def _mariadb(self, sql: str) -> list[list[str]]:
        assert self.maria is not None
        done = subprocess.run(
            [
                *("mariadb", "--no-defaults", "-h", self.maria.host, "-P", str(self.maria.port)),
                *("-u", self.maria.user, "--quick", "-N", "-B", "-e", sql, self.maria.database),
            ],
            env={**os.environ, "MYSQL_PWD": self.maria.password},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [line.split("\t") for line in done.stdout.splitlines()]

    def count_mysql(self) -> int:
        return int(self._mariadb("SELECT count(*) FROM readings")[0][0])

    def mysql(self) -> Held:
        return _held_by_sql(self._mariadb(READINGS))

    def _delta(self) -> DeltaTable | None:
        if self.s3 is None:
            folder = self.folder / "cloud/archive/readings"
            return DeltaTable(str(folder)) if DeltaTable.is_deltatable(str(folder)) else None
        options = {
            "AWS_ENDPOINT_URL": self.s3.url,
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        address = f"s3://{self.bucket}/readings"
        if not DeltaTable.is_deltatable(address, storage_options=options):
            return None
        return DeltaTable(address, storage_options=options)

    def count_archive(self) -> int:
        table = self._delta()
        return 0 if table is None else int(table.count())

    def archive(self) -> Held:
        table = self._delta()
        assert table is not None
        columns = table.to_pyarrow_table(columns=["device", "point", "epoch", "seq", "taken_at_ns", "value"])
        return _held_by_sql(zip(*(columns[name].to_pylist() for name in columns.column_names), strict=True))

    def _flux(self, then: str) -> Iterator[list[str]]:
        """Rows of the one measurement, all series together."""
        assert self.influx is not None
        flux = (
            f'from(bucket:"{self.bucket}") |> range(start:2020-01-01T00:00:00Z, stop:2040-01-01T00:00:00Z)'
            ' |> filter(fn:(r)=> r._measurement == "simulated") |> filter(fn:(r)=> not r._field =~ /quality$/)'
            f" |> group() |> {then}"
        )
        request = urllib.request.Request(
            f"{self.influx.url}/api/v2/query?org={self.influx.org}",
            data=flux.encode(),
            headers={
                "Authorization": f"Token {self.influx.token}",
                "Content-Type": "application/vnd.flux",
                "Accept": "application/csv",
            },
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines[1:]:  # after the header; each row begins with ",result,table,"
            if line.strip():
                yield line.split(",")[3:]

    def count_influxdb(self) -> int:
        return next((int(row[0]) for row in self._flux('count() |> keep(columns: ["_value"])')), 0)

    def influxdb(self) -> Held:
        columns = '["device", "_field", "_time", "_value"]'
        values: list[Value] = []
        # The columns come in the order of their names.
        at_ns = "map(fn: (r) => ({r with _time: time(v: r._time), ns: int(v: r._time)}))"
        ordered = columns.replace("_time", "ns")
        for field_, value, device, ns in self._flux(f"{at_ns} |> keep(columns: {ordered})"):
            values.append((device, field_, int(ns) // 1000, float(value)))
        return Held(len(values), len({value[:3] for value in values}), set(values))

    bucket: str = "chaos"


READINGS = (
    "SELECT d.name, p.name, r.epoch, r.seq, r.taken_at_ns, r.value"
    " FROM readings r JOIN points p ON p.id = r.point_id JOIN devices d ON d.id = p.device_id"
)


def _held_by_sql(rows: Iterable[Sequence[Any]]) -> Held:
    """From rows as `READINGS` gives them."""
    identities: set[tuple[str, str, int, int]] = set()
    values: set[Value] = set()
    count = 0
    for device, point, epoch, seq, taken_at_ns, value in rows:
        count += 1
        identities.add((device, point, int(epoch), int(seq)))
        if value is not None:  # a reading that failed has none
            values.add((device, point, int(taken_at_ns) // 1000, float(value)))
    return Held(count, len(identities), values)


@contextlib.contextmanager
def whole_system(
    folder: Path,
    transport: str,
    *,
    stores: bool = True,
    links: bool = False,
    devices: int = DEVICES,
    period_ms: int = PERIOD_MS,
    commit_interval_s: float = COMMIT_INTERVAL_S,
    archive_s: float = 2.0,
    compact_hours: float = 1.0,
) -> Iterator[Rig]:
    """Everything running and the first readings acked. Without `stores`: the embedded sinks alone. With `links`
    the agent's way to the broker or the door, and the cloud's to each store, lead over lines that can be misused.
    `archive_s` and `compact_hours` are of the archive on S3."""
    rig = Rig(folder, transport)
    token, word = rig.secret("gateway.token"), rig.secret("cloud.password")
    with contextlib.ExitStack() as stack:

        def line(name: str, port: int) -> int:
            if not links:
                return port
            rig.links[name] = stack.enter_context(proxy_process(port))
            return rig.links[name].port

        if transport == "mqtt":
            broker = stack.enter_context(
                run.mosquitto(
                    users={"chaos/plant-1": token.read_text(), "headgate-cloud": word.read_text()},
                    persistence=False,
                )
            )
            rig.servers["broker"] = broker.process
        port = rig.cloud_port = free_port()
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        server = ca.issue_cert("127.0.0.1", "localhost")
        server.private_key_pem.write_to_path(str(folder / "key.pem"))
        (folder / "key.pem").chmod(0o600)
        (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        door = (
            f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{word}"\n'
            if transport == "mqtt"
            else ""
        )
        sinks = "[archive]\ncommit_interval_s = 0.5\n"
        if stores:
            rig.influx = stack.enter_context(run.influxdb())
            rig.maria = stack.enter_context(run.mariadb())
            rig.s3 = stack.enter_context(run.s3())
            rig.servers |= {
                "influxdb": rig.influx.process,
                "mariadb": rig.maria.process,
                "s3": rig.s3.process,
            }
            sinks = (
                f'[archive]\nendpoint = "http://127.0.0.1:{line("s3", rig.s3.port)}"\nbucket = "{rig.bucket}"\n'
                f"commit_interval_s = {archive_s}\ncompact_hours = {compact_hours}\n"
                f'access_key_file = "{rig.secret("s3.key", rig.s3.access_key)}"\n'
                f'secret_key_file = "{rig.secret("s3.secret", rig.s3.secret_key)}"\n'
                f'[influxdb]\nurl = "http://127.0.0.1:{line("influxdb", rig.influx.port)}"\n'
                f'org = "{rig.influx.org}"\nbucket = "{rig.bucket}"\n'
                f'token_file = "{rig.secret("influx.token", rig.influx.token)}"\n'
                f'[mysql]\nhost = "127.0.0.1"\nport = {line("mariadb", rig.maria.port)}\n'
                f'user = "{rig.maria.user}"\npassword_file = "{rig.secret("mysql.password", rig.maria.password)}"\n'
                f'database = "{rig.maria.database}"\n'
            )
        (folder / "cloud.toml").write_text(
            f'[server]\ndata_dir = "{folder}/cloud"\nport = {port}\n'
            f'operator_token_file = "{rig.secret("operator.token")}"\n'
            f'tls_cert_file = "{folder}/cert.pem"\ntls_key_file = "{folder}/key.pem"\n{door}'
            f'[[gateway]]\ntenant = "chaos"\nname = "plant-1"\ntoken_file = "{token}"\n{sinks}'
        )
        way = line("uplink", broker.port if transport == "mqtt" else port)
        uplink = (
            f'[uplink]\nkind = "mqtt"\nhost = "127.0.0.1"\nport = {way}\ntls = false\n'
            if transport == "mqtt"
            else f'[uplink]\nkind = "https"\nhost = "localhost"\nport = {way}\nca_file = "{folder}/ca.pem"\n'
        )
        points = "".join(f'[[device.point]]\nname = "p{p}"\nwave = "walk"\n' for p in range(POINTS))
        plant = "".join(
            f'[[device]]\nname = "d{d}"\ndriver = "simulator"\nmeasurement = "simulated"\n'
            f"period_ms = {period_ms}\n{points}"
            for d in range(devices)
        )
        (folder / "agent.toml").write_text(
            f'[gateway]\ntenant = "chaos"\nname = "plant-1"\nstate_dir = "{folder}/gateway"\n{uplink}'
            f'token_file = "{token}"\nbackoff_max_s = 2.0\nack_timeout_s = 3.0\n'
            f"[buffer]\ncommit_interval_s = {commit_interval_s}\n{plant}"
        )
        env = dict(os.environ)
        rig.children = {
            "cloud": Child(
                "cloud",
                [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"],
                folder,
                env,
            ),
            "agent": Child(
                "agent", [str(BIN / "headgate"), "run", "--config", f"{folder}/agent.toml"], folder, env
            ),
        }
        for child in rig.children.values():
            child.start()
            stack.callback(child.stop_hard)

        def flowing() -> bool:
            for child in rig.children.values():
                child.check()
            return bool((rig.status().get("buffer") or {}).get("settled_readings"))

        wait_until(flowing, timeout_s=60, what="the first readings to be acked")
        yield rig
