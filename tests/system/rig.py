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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import trustme
from deltalake import DeltaTable

from tests.servers import run
from tests.servers.process import ServerProcess, free_port, wait_until
from tests.system.child import BIN, Child

DEVICES = 8
POINTS = 12
PERIOD_MS = 100


@dataclass
class Account:
    """Kept by the gateway; stored by each sink; stored more than once by each sink. In readings."""

    kept: int
    gapped: int
    stored: dict[str, int]
    doubled: dict[str, int]


@dataclass
class Rig:
    folder: Path
    transport: str  #: "mqtt" or "https"
    servers: dict[str, ServerProcess] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)
    influx: run.InfluxDb | None = None
    maria: run.MariaDb | None = None
    s3: run.S3 | None = None

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

    # --- the end ---

    def finish(self, timeout_s: float = 90.0) -> Account:
        """The agent commits and leaves; without devices it empties its buffer; the sinks catch up; the account."""
        agent = self.children["agent"]
        agent.check()
        agent.end(signal.SIGTERM)
        config = self.folder / "agent.toml"
        (self.folder / "drain.toml").write_text(config.read_text().split("[[device]]", 1)[0])
        drainer = Child(
            "drain",
            [str(BIN / "headgate"), "run", "--config", f"{self.folder}/drain.toml"],
            self.folder,
            agent.env,
        )
        drainer.start()
        started = time.time_ns()
        try:

            def empty() -> bool:
                drainer.check()
                return self._written_since(started) and self.buffered() == 0

            wait_until(
                empty,
                timeout_s=timeout_s,
                what="the buffer to be empty",
            )
            status = self.status()
            drainer.end(signal.SIGTERM)
        finally:
            drainer.stop_hard()
        kept, gapped = status["buffer"]["kept_readings"], status["buffer"]["gapped_readings"]
        count = {
            "embedded": self.embedded,
            "mysql": self.mysql,
            "archive": self.archive,
            "influxdb": self.influxdb,
        }
        with contextlib.suppress(TimeoutError, AssertionError):
            wait_until(
                lambda: all(stored() >= (kept - gapped, 0) for stored in count.values()),
                timeout_s=timeout_s,
                what="every sink to catch up",
            )
        account = Account(kept, gapped, {}, {})
        for sink, stored in count.items():
            account.stored[sink], account.doubled[sink] = stored()
        return account

    def _written_since(self, ns: int) -> bool:
        file = self.folder / "gateway/status.json"
        return file.exists() and file.stat().st_mtime_ns > ns

    # --- each store, by its own interface: readings, and readings that are there more than once ---

    def embedded(self) -> tuple[int, int]:
        file = self.folder / "cloud/readings.sqlite"
        if not file.exists():
            return 0, 0
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
            return self._by_sql(lambda sql: db.execute(sql).fetchone()[0])

    def mysql(self) -> tuple[int, int]:
        assert self.maria is not None
        client = [
            "mariadb",
            "--no-defaults",
            "-h",
            self.maria.host,
            "-P",
            str(self.maria.port),
            "-u",
            self.maria.user,
        ]
        env = {**os.environ, "MYSQL_PWD": self.maria.password}

        def one(sql: str) -> int:
            done = subprocess.run(
                [*client, "-N", "-B", "-e", sql, self.maria.database if self.maria else ""],
                env=env,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return int(done.stdout)

        return self._by_sql(one)

    @staticmethod
    def _by_sql(one: Callable[[str], int]) -> tuple[int, int]:
        rows = one("SELECT count(*) FROM readings")
        distinct = one("SELECT count(*) FROM (SELECT DISTINCT point_id, epoch, seq FROM readings) d")
        return rows, rows - distinct

    def archive(self) -> tuple[int, int]:
        assert self.s3 is not None
        options = {
            "AWS_ENDPOINT_URL": self.s3.url,
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        address = f"s3://{self.bucket}/readings"
        if not DeltaTable.is_deltatable(address, storage_options=options):
            return 0, 0
        columns = ["gateway", "device", "point", "epoch", "seq"]
        table = DeltaTable(address, storage_options=options).to_pyarrow_table(columns=columns)
        distinct = table.group_by(columns).aggregate([]).num_rows
        assert pc.count(table["seq"]).as_py() == table.num_rows
        return table.num_rows, table.num_rows - distinct

    def influxdb(self) -> tuple[int, int]:
        """Field values of the measurement, all series; the same instant of a series can be there only once."""
        assert self.influx is not None
        flux = (
            f'from(bucket:"{self.bucket}") |> range(start:2020-01-01T00:00:00Z, stop:2040-01-01T00:00:00Z)'
            ' |> filter(fn:(r)=> r._measurement == "simulated") |> filter(fn:(r)=> not r._field =~ /quality$/)'
            ' |> group() |> count() |> keep(columns: ["_value"])'
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
            lines = [line for line in answer.read().decode().splitlines() if line.strip()]
        return (int(lines[1].rsplit(",", 1)[1]), 0) if len(lines) > 1 else (0, 0)

    bucket: str = "chaos"


@contextlib.contextmanager
def whole_system(folder: Path, transport: str) -> Iterator[Rig]:
    """Everything running and the first readings acked."""
    rig = Rig(folder, transport)
    token, word = rig.secret("gateway.token"), rig.secret("cloud.password")
    with contextlib.ExitStack() as stack:
        if transport == "mqtt":
            broker = stack.enter_context(
                run.mosquitto(
                    users={"chaos/plant-1": token.read_text(), "headgate-cloud": word.read_text()},
                    persistence=False,
                )
            )
            rig.servers["broker"] = broker.process
        rig.influx = stack.enter_context(run.influxdb())
        rig.maria = stack.enter_context(run.mariadb())
        rig.s3 = stack.enter_context(run.s3())
        rig.servers |= {
            "influxdb": rig.influx.process,
            "mariadb": rig.maria.process,
            "s3": rig.s3.process,
        }
        port = free_port()
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
        (folder / "cloud.toml").write_text(
            f'[server]\ndata_dir = "{folder}/cloud"\nport = {port}\n'
            f'tls_cert_file = "{folder}/cert.pem"\ntls_key_file = "{folder}/key.pem"\n{door}'
            f'[[gateway]]\ntenant = "chaos"\nname = "plant-1"\ntoken_file = "{token}"\n'
            f'[archive]\nendpoint = "{rig.s3.url}"\nbucket = "{rig.bucket}"\ncommit_interval_s = 2.0\n'
            f'access_key_file = "{rig.secret("s3.key", rig.s3.access_key)}"\n'
            f'secret_key_file = "{rig.secret("s3.secret", rig.s3.secret_key)}"\n'
            f'[influxdb]\nurl = "{rig.influx.url}"\norg = "{rig.influx.org}"\nbucket = "{rig.bucket}"\n'
            f'token_file = "{rig.secret("influx.token", rig.influx.token)}"\n'
            f'[mysql]\nhost = "127.0.0.1"\nport = {rig.maria.port}\nuser = "{rig.maria.user}"\n'
            f'password_file = "{rig.secret("mysql.password", rig.maria.password)}"\n'
            f'database = "{rig.maria.database}"\n'
        )
        uplink = (
            f'[uplink]\nkind = "mqtt"\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\n'
            if transport == "mqtt"
            else f'[uplink]\nkind = "https"\nhost = "localhost"\nport = {port}\nca_file = "{folder}/ca.pem"\n'
        )
        devices = "".join(
            f'[[device]]\nname = "d{d}"\ndriver = "simulator"\nmeasurement = "simulated"\nperiod_ms = {PERIOD_MS}\n'
            + "".join(f'[[device.point]]\nname = "p{p}"\nwave = "walk"\n' for p in range(POINTS))
            for d in range(DEVICES)
        )
        (folder / "agent.toml").write_text(
            f'[gateway]\ntenant = "chaos"\nname = "plant-1"\nstate_dir = "{folder}/gateway"\n{uplink}'
            f'token_file = "{token}"\nbackoff_max_s = 2.0\nack_timeout_s = 3.0\n'
            f"[buffer]\ncommit_interval_s = 0.2\n{devices}"
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
