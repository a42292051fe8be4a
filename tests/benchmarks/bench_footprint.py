"""What the agent costs a gateway at 1,000 readings/s from three drivers: memory, CPU, bytes written to disk.

Modbus TCP (800/s), a serial instrument (40/s) and forty Bluetooth thermometers over bleak and a simulated BlueZ
(160/s), kept and sent over MQTT to the real cloud. Baselines of the same run: a bare Python with asyncio for memory,
the payload itself (8 bytes per reading) for what is written to disk.

`bench_footprint [seconds]`
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bench_agent import AGENT_CPU, OTHER_CPU, peak_mb
from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child

SENSORS: Final = 40
START_LIMIT_S: Final = 60.0


def status(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "gateway/status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def written_bytes(pid: int) -> int:
    """Bytes that this process caused to be sent to storage (proc(5), /proc/pid/io, write_bytes)."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes"):
            return int(line.split()[1])
    return 0


def config(
    folder: Path, modbus_port: int, broker_port: int, port: Path, sensors: list[str], commit_s: float
) -> str:
    points = "".join(
        f'[[device.point]]\nname = "p{k}"\nregister = {k}\ntype = "u16"\nvalid_min = 0.0\nvalid_max = 60000.0\n'
        for k in range(40)
    )
    words = [
        (
            f'[gateway]\ntenant = "bench"\nname = "g"\nstate_dir = "{folder}/gateway"\nlog_level = "warning"\n'
            f'[uplink]\nhost = "127.0.0.1"\nport = {broker_port}\ntls = false\ntoken_file = "{folder}/token"\n'
            f"[buffer]\ncommit_interval_s = {commit_s}\n"
        )
    ]
    words += [
        f'[[device]]\nname = "m{d}"\ndriver = "modbus"\nperiod_ms = 100\n'
        f'[device.options]\nhost = "127.0.0.1"\nport = {modbus_port}\nunit = {d + 1}\n{points}'
        for d in range(2)
    ]
    words += [
        (
            f'[[device]]\nname = "scale"\ndriver = "serial_line"\n[device.options]\nport = "{port}"\n'
            'pattern = "W= *(?P<w>[0-9.]+) kg, T= *(?P<t>[0-9.]+) C"\n'
            '[[device.point]]\nname = "w"\nunit = "kg"\n[[device.point]]\nname = "t"\nunit = "Cel"\n'
        )
    ]
    words += [
        f'[[device]]\nname = "b{k}"\ndriver = "ble"\n[device.options]\naddress = "{address}"\n'
        + "".join(
            f'[[device.point]]\nname = "{name}"\nobject = "{name}"\n'
            for name in ("battery", "temperature", "humidity", "count")
        )
        for k, address in enumerate(sensors)
    ]
    return "".join(words)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    os.sched_setaffinity(0, {OTHER_CPU})
    bare = subprocess.run(
        [sys.executable, "-c", "import asyncio;print(open('/proc/self/status').read())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    bare_mb = next(int(line.split()[1]) / 1024 for line in bare.splitlines() if line.startswith("VmHWM"))
    with tempfile.TemporaryDirectory(prefix="hg-bench-") as name:
        folder = Path(name)
        for who in ("token", "word"):
            (folder / who).touch(0o600)
            (folder / who).write_text(secrets.token_urlsafe(24))
        users = {"bench/g": (folder / "token").read_text(), "headgate-cloud": (folder / "word").read_text()}
        others: list[subprocess.Popen[bytes]] = []
        with run.nats(users=users, sync_always=False) as broker:
            cloud_port = free_port()
            (folder / "cloud.toml").write_text(
                f'[server]\ndata_dir = "{folder}/cloud"\nport = {cloud_port}\n[mqtt]\nhost = "127.0.0.1"\n'
                f'port = {broker.mqtt_port}\ntls = false\npassword_file = "{folder}/word"\n'
            )
            cloud = Child(
                "cloud",
                [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"],
                folder,
                dict(os.environ),
            )
            cloud.start()
            try:
                others += [
                    subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE)
                    for words in (
                        ["tests.fakes.fast_modbus"],
                        ["tests.fakes.bluez", "--folder", f"{folder}/bus", "--sensors", str(SENSORS)],
                        ["tests.fakes.serial_instrument", "--link", f"{folder}/tty", "--period-ms", "50"],
                    )
                ]
                modbus, bluez = others[0].stdout, others[1].stdout
                assert modbus is not None
                assert bluez is not None
                modbus_port, air = int(modbus.readline()), json.loads(bluez.readline())
                wait_until(lambda: port_open(cloud_port), timeout_s=START_LIMIT_S, what="the cloud to listen")
                for commit_s in (1.0, 5.0):
                    (folder / "agent.toml").write_text(
                        config(
                            folder, modbus_port, broker.mqtt_port, folder / "tty", air["sensors"], commit_s
                        )
                    )
                    measure(folder, air["address"], commit_s, seconds, bare_mb)
                cloud.check()
            finally:
                cloud.stop_hard()
                for other in others:
                    other.kill()


def measure(folder: Path, bus: str, commit_s: float, seconds: float, bare_mb: float) -> None:
    started = time.monotonic()
    agent = subprocess.Popen(
        [str(BIN / "headgate"), "run", "--config", f"{folder}/agent.toml"],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus},
    )
    os.sched_setaffinity(agent.pid, {AGENT_CPU})
    try:
        begun = time.time_ns()

        def settled() -> bool:
            told = status(folder)
            return told.get("written_ns", 0) > begun and bool(
                (told.get("buffer") or {}).get("settled_readings")
            )

        wait_until(settled, timeout_s=START_LIMIT_S, what="the first readings to be acked")
        up_s = time.monotonic() - started
        time.sleep(5)
        before, bytes_before = status(folder), written_bytes(agent.pid)
        time.sleep(seconds)
        after, bytes_after = status(folder), written_bytes(agent.pid)
        took_s = (after["written_ns"] - before["written_ns"]) / 1e9
        kept = after["buffer"]["kept_readings"] - before["buffer"]["kept_readings"]
        peak = peak_mb(agent.pid)
        print(
            f"commits every {commit_s:g} s: {kept / took_s:,.0f} readings/s,"
            f" {(after['cpu_s'] - before['cpu_s']) / took_s:.1%} of a core, peak RSS {peak:.0f} MB"
            f" ({peak / bare_mb:.1f} of a bare asyncio's {bare_mb:.0f} MB),"
            f" {(bytes_after - bytes_before) / (kept * 8):.1f} bytes written per payload byte"
            f" (first ack seen after {up_s:.1f} s)",
            flush=True,
        )
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait(20)


if __name__ == "__main__":
    main()
