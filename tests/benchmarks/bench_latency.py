"""From the device's answer to a query on InfluxDB: how old a reading is when it is first seen there.

1,000 readings/s (25 simulated devices of 40 points, once a second, spread over the second) over Mosquitto into the real
cloud and the real InfluxDB. A watcher asks InfluxDB for the newest instants of every device, again and again; a scan's
latency is the time of the query that first showed it, less its own time. Baseline of the same run: a bare client that
writes one line and asks for it until it is there: what InfluxDB and the watcher's own asking cost.

`bench_latency [seconds]`
"""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child

DEVICES: Final = 25
POINTS: Final = 40
SETTINGS: Final = (("low_latency", "low_latency = true"), ("commits every 1 s", "commit_interval_s = 1.0"))


class Watcher:
    """Asks for the newest instant of each device, on one kept connection."""

    def __init__(self, influx: run.InfluxDb, bucket: str) -> None:
        self._http = http.client.HTTPConnection(influx.host, influx.port, timeout=30)
        self._path = f"/api/v2/query?org={influx.org}"
        self._headers = {
            "Authorization": f"Token {influx.token}",
            "Content-Type": "application/vnd.flux",
            "Accept": "application/csv",
        }
        self._bucket = bucket

    def instants(self, measurement: str, field: str) -> dict[str, list[int]]:
        """Per device the instants (ns) of the last three seconds."""
        flux = (
            f'from(bucket:"{self._bucket}") |> range(start:-3s)'
            f' |> filter(fn:(r)=> r._measurement == "{measurement}" and r._field == "{field}")'
            " |> map(fn:(r)=>({device: r.device, at: uint(v: r._time)}))"
        )
        self._http.request("POST", self._path, flux, self._headers)
        answer = self._http.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            return {}
        found: dict[str, list[int]] = {}
        columns: list[str] = []
        for line in text.splitlines():
            cells = line.split(",")
            if "device" in cells and "at" in cells:
                columns = cells
            elif columns and len(cells) == len(columns):
                row = dict(zip(columns, cells, strict=True))
                found.setdefault(row["device"], []).append(int(row["at"]))
        return found


def percentiles(sample: list[float]) -> str:
    ordered = sorted(sample)
    return "  ".join(
        f"p{p} {ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3:,.0f} ms" for p in (50, 95, 99)
    )


def watch(watcher: Watcher, measurement: str, field: str, seconds: float) -> list[float]:
    seen: set[tuple[str, int]] = set()
    for device, instants in watcher.instants(measurement, field).items():
        seen |= {(device, at) for at in instants}
    latencies = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        rows = watcher.instants(measurement, field)
        now = time.time_ns()
        for device, instants in rows.items():
            for at in instants:
                if (device, at) not in seen:
                    seen.add((device, at))
                    latencies.append((now - at) / 1e9)
    return latencies


def bare(influx: run.InfluxDb, rounds: int) -> list[float]:
    """Write one line, ask until it is there."""
    watcher = Watcher(influx, influx.bucket)
    door = http.client.HTTPConnection(influx.host, influx.port, timeout=30)
    headers = {"Authorization": f"Token {influx.token}"}
    path = f"/api/v2/write?org={influx.org}&bucket={influx.bucket}"
    latencies = []
    for k in range(rounds):
        at = time.time_ns()
        door.request("POST", path, f"bare,device=b v={k} {at}", headers)
        answer = door.getresponse()
        answer.read()
        assert answer.status == 204, answer.status
        while at not in watcher.instants("bare", "v").get("b", []):
            assert time.time_ns() - at < 3e9, "a line that was written is not found"
        latencies.append((time.time_ns() - at) / 1e9)
    return latencies


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    with tempfile.TemporaryDirectory(prefix="hg-bench-") as name, run.influxdb() as influx:
        folder = Path(name)
        for who, text in (
            ("token", secrets.token_hex(16)),
            ("word", secrets.token_hex(16)),
            ("influx", influx.token),
        ):
            (folder / who).touch(0o600)
            (folder / who).write_text(text)
        users = {"bench/g": (folder / "token").read_text(), "headgate-cloud": (folder / "word").read_text()}
        with run.mosquitto(users=users) as broker:
            cloud_port = free_port()
            (folder / "cloud.toml").write_text(
                f'[server]\ndata_dir = "{folder}/cloud"\nport = {cloud_port}\n[embedded]\nenabled = false\n'
                f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{folder}/word"\n'
                f'[archive]\nenabled = false\n[influxdb]\nurl = "{influx.url}"\norg = "{influx.org}"\n'
                f'bucket = "latency"\ntoken_file = "{folder}/influx"\n'
            )
            env = dict(os.environ)
            cloud = Child(
                "cloud",
                [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"],
                folder,
                env,
            )
            cloud.start()
            try:
                wait_until(lambda: port_open(cloud_port), timeout_s=60, what="the cloud to listen")
                print(f"bare write and ask:      {percentiles(bare(influx, 50))}", flush=True)
                watcher = Watcher(influx, "latency")
                for title, setting in SETTINGS:
                    devices = "".join(
                        f'[[device]]\nname = "d{d}"\ndriver = "simulator"\n'
                        + "".join(f'[[device.point]]\nname = "p{p}"\nwave = "walk"\n' for p in range(POINTS))
                        for d in range(DEVICES)
                    )
                    (folder / "agent.toml").write_text(
                        f'[gateway]\ntenant = "bench"\nname = "g"\nstate_dir = "{folder}/gateway"\n'
                        f'[uplink]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\n'
                        f'token_file = "{folder}/token"\n'
                        f"[buffer]\n{setting}\n{devices}"
                    )
                    agent = Child(
                        "agent",
                        [str(BIN / "headgate"), "run", "--config", f"{folder}/agent.toml"],
                        folder,
                        env,
                    )
                    agent.start()
                    try:
                        wait_until(
                            lambda: len(watcher.instants("simulator", "p0")) == DEVICES,
                            timeout_s=60,
                            what="every device to be in InfluxDB",
                        )
                        time.sleep(3)
                        sample = watch(watcher, "simulator", "p0", seconds)
                        print(f"{title + ':':24} {percentiles(sample)}  ({len(sample)} scans)", flush=True)
                    finally:
                        agent.end(signal.SIGTERM)
                        time.sleep(3)
                cloud.check()
            finally:
                cloud.stop_hard()


if __name__ == "__main__":
    main()
