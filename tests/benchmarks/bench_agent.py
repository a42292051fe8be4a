"""The agent as a whole: Modbus TCP → validated → durable buffer → sent → acked by the real journal.

The agent process on one core; the Modbus peer, the broker and the cloud (journal, no sinks) on the other. Readings
count when the cloud has acked them. Baseline of the same run: a bare asyncio client that sends the same requests and
only takes the answers' registers out by `struct`.

`bench_agent [seconds]`: how long each shape is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child

AGENT_CPU, OTHER_CPU = (1, 0) if (os.cpu_count() or 1) > 1 else (0, 0)
WARM_UP_S: Final = 3.0
#: what is read: name, type, registers of one request, points of it
SHAPES: Final = (
    ("UINT16, 125 registers per request", "u16", 125, 125),
    ("FLOAT32, 124 registers per request", "f32", 124, 62),
    ("UINT16, 10 registers per request", "u16", 10, 10),
    ("UINT16, 1 register per request", "u16", 1, 1),
)
DEVICES: Final = 4


def peak_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


async def bare(port: int, registers: int, seconds: float) -> float:
    """Registers per CPU-second of a client that does nothing with them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = struct.pack(">HHHBBHH", 1, 0, 6, 1, 3, 0, registers)
    unpack = struct.Struct(f">{registers}H").unpack
    taken = 0
    until, before = time.monotonic() + seconds, time.process_time()
    while time.monotonic() < until:
        for _ in range(50):
            writer.write(request)
            answer = await reader.readexactly(9 + 2 * registers)
            taken += len(unpack(answer[9:]))
    writer.close()
    return taken / (time.process_time() - before)


class Bench:
    def __init__(
        self, folder: Path, modbus_port: int, broker: run.Nats, token: Path, cloud_word: Path
    ) -> None:
        self.folder = folder
        self.modbus_port = modbus_port
        self.broker = broker
        self.token = token
        self.port = free_port()
        (folder / "cloud.toml").write_text(
            f'[server]\ndata_dir = "{folder}/cloud"\nport = {self.port}\n'
            f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.mqtt_port}\ntls = false\npassword_file = "{cloud_word}"\n'
            "[embedded]\nenabled = false\n[archive]\ncommit_interval_s = 3600.0\ncommit_mb = 256\n"
        )

    def status(self, shape: int) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / f"gateway{shape}/status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def measure(self, shape: int, seconds: float) -> tuple[float, float, float, float]:
        """Acked readings per CPU-second, peak RSS in MB, CPU share, readings per second."""
        _, kind, _, points = SHAPES[shape]
        width = 2 if kind == "f32" else 1
        table = "".join(
            f'[[device.point]]\nname = "p{k}"\nregister = {k * width}\ntype = "{kind}"\n'
            + ("valid_min = 0.0\nvalid_max = 65000.0\n" if kind == "u16" else "")
            for k in range(points)
        )
        devices = "".join(
            f'[[device]]\nname = "d{d}"\ndriver = "modbus"\n'
            f'[device.options]\nhost = "127.0.0.1"\nport = {self.modbus_port}\nunit = {d + 1}\n{table}'
            for d in range(DEVICES)
        )
        config = self.folder / f"agent{shape}.toml"
        config.write_text(
            f'[gateway]\ntenant = "bench"\nname = "g{shape}"\nstate_dir = "{self.folder}/gateway{shape}"\n'
            f'log_level = "warning"\n[uplink]\nhost = "127.0.0.1"\nport = {self.broker.mqtt_port}\ntls = false\n'
            f'token_file = "{self.token}"\n{devices}'
        )
        agent = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.flat_out", str(config)])
        os.sched_setaffinity(agent.pid, {AGENT_CPU})
        try:
            wait_until(
                lambda: bool((self.status(shape).get("buffer") or {}).get("settled_readings")),
                timeout_s=30,
                what="the first readings to be acked",
            )
            time.sleep(WARM_UP_S)
            before = self.status(shape)
            time.sleep(seconds)
            after = self.status(shape)
            took = (after["written_ns"] - before["written_ns"]) / 1e9
            acked = after["buffer"]["settled_readings"] - before["buffer"]["settled_readings"]
            used = after["cpu_s"] - before["cpu_s"]
            return acked / used, peak_mb(agent.pid), used / took, acked / took
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(20)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    os.sched_setaffinity(0, {OTHER_CPU})
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as name:
        folder = Path(name)
        secrets_of = {}
        for who in ("token", "word"):
            secrets_of[who] = folder / who
            secrets_of[who].touch(0o600)
            secrets_of[who].write_text(secrets.token_urlsafe(24))
        users = {f"bench/g{k}": secrets_of["token"].read_text() for k in range(len(SHAPES))}
        users["headgate-cloud"] = secrets_of["word"].read_text()
        with run.nats(users=users, sync_always=False) as broker:
            peer = subprocess.Popen([sys.executable, "-m", "tests.fakes.fast_modbus"], stdout=subprocess.PIPE)
            assert peer.stdout is not None
            port = int(peer.stdout.readline())
            bench = Bench(folder, port, broker, secrets_of["token"], secrets_of["word"])
            cloud = Child(
                "cloud",
                [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"],
                folder,
                dict(os.environ),
            )
            cloud.start()
            try:
                wait_until(lambda: port_open(bench.port), timeout_s=60, what="the cloud to listen")
                for k, (what, _, registers, points) in enumerate(SHAPES):
                    os.sched_setaffinity(0, {AGENT_CPU})
                    raw = asyncio.run(bare(port, registers, min(seconds, 5.0))) * points / registers
                    os.sched_setaffinity(0, {OTHER_CPU})
                    rate, peak, share, per_s = bench.measure(k, seconds)
                    print(
                        f"{what:36} {rate:10,.0f} readings per CPU-second of the agent"
                        f" ({rate / raw:.2f} of a bare client's {raw:,.0f}); {per_s:,.0f}/s at {share:.0%} of a core,"
                        f" peak RSS {peak:.0f} MB",
                        flush=True,
                    )
                cloud.check()
            finally:
                if "--log" in sys.argv:
                    print(cloud.log.read_text())
                cloud.stop_hard()
                peer.kill()


if __name__ == "__main__":
    main()
