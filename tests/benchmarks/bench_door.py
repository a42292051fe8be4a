"""Batches of 2 KB through a door to the journal and back as an ack, against the barest server that does as much.

- MQTT: our door behind a Mosquitto, against a bare paho client that writes (gateway, seq, payload) to SQLite
  (`synchronous=FULL`, commits as large as what has come in) and answers each gateway with the seqs it has.
- HTTP: our door, against a bare Starlette application on the same uvicorn that reads the body and waits for the same
  kind of commit.

Both sides of a pair are fed by the same closed-loop load (a window of unanswered batches per gateway), take turns, and
share the machine in the same way: broker and load on one core, the measured process on the other. What is compared
is the median of the rounds. Figures: batches per second, ack p50 and p99, CPU of the measured process, its peak RSS.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from sync.identity import GatewayName, Secret
from sync.wire import Ack, decode_reply, seal

if TYPE_CHECKING:
    import uvicorn

ROOT = Path(__file__).parents[2]
GATEWAYS = 8
WINDOW = 192  #: unanswered batches per gateway (MQTT)
CONNECTIONS = 128  #: each with one unanswered request (HTTP)
PAYLOAD_BYTES = 2048
EPOCH = 7_777
TOKEN = "benchmark-token-0123456789"
RESEND_S = 3.0
PASSWORD = "HEADGATE_BENCH_PASSWORD"  #: the environment variable


class Result(msgspec.Struct):
    batches: int
    seconds: float
    p50_ms: float
    p99_ms: float
    resent: int
    cpu_s: float = 0.0
    rss_mb: float = 0.0

    @property
    def rate(self) -> float:
        return self.batches / self.seconds


def gateway(n: int) -> GatewayName:
    return GatewayName("bench", f"g{n}")


def payloads(which: str, n: int, count: int) -> list[bytes]:
    """`count` batches of about 2 KB that do not compress, of gateway `n`."""
    rng = random.Random(n)
    out = []
    for seq in range(1, count + 1):
        body = rng.randbytes(PAYLOAD_BYTES - 110)
        if which.startswith("ours"):
            out.append(
                seal(
                    str(gateway(n)), EPOCH, seq, [b"\xc5" + struct.pack(">H", len(body)) + body], [], [], 100
                ).payload
            )
        else:
            out.append(struct.pack("<Q", seq) + body + bytes(102))
    return out


# --- the load ---


def text(word: bytes) -> bytes:
    """MQTT's own string: its length in two bytes before it."""
    return struct.pack(">H", len(word)) + word


def remaining(length: int) -> bytes:
    out = bytearray()
    while True:
        length, digit = divmod(length, 128)
        out.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(out)


class Agent(asyncio.Protocol):
    """One gateway on MQTT 3.1.1, bare: it keeps `WINDOW` batches unanswered and resends what stays so."""

    def __init__(self, which: str, n: int, batches: list[bytes], password: str) -> None:
        self.which, self.name, self.password = which, gateway(n), password
        topic = self.name.topic("up").encode()
        head = text(topic)
        self.packets = [b"\x30" + remaining(len(head) + len(b)) + head + b for b in batches]
        self.sent: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.latencies: list[float] = []
        self.next = 0
        self.resent = 0
        self.buffer = bytearray()
        self.ready = asyncio.get_running_loop().create_future()
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        body = text(b"MQTT") + b"\x04\xc2\x00\x3c" + text(str(self.name).encode().replace(b"/", b"-"))
        body += text(str(self.name).encode()) + text(self.password.encode())
        transport.write(b"\x10" + remaining(len(body)) + body)
        topic = b"\x00\x01" + text(self.name.topic("ack").encode()) + b"\x00"
        transport.write(b"\x82" + remaining(len(topic)) + topic)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        at = 0
        while True:
            size, shift, i = 0, 0, at + 1
            while i < len(self.buffer):
                size |= (self.buffer[i] & 0x7F) << shift
                shift += 7
                i += 1
                if not self.buffer[i - 1] & 0x80:
                    break
            else:
                break
            if len(self.buffer) < i + size:
                break
            self.packet(self.buffer[at], bytes(self.buffer[i : i + size]))
            at = i + size
        del self.buffer[:at]

    def packet(self, kind: int, body: bytes) -> None:
        if kind & 0xF0 == 0x90 and not self.ready.done():
            self.ready.set_result(None)
        elif kind & 0xF0 == 0x30:
            (length,) = struct.unpack_from(">H", body)
            self.answered(body[2 + length :])

    def answered(self, payload: bytes) -> None:
        if self.which.startswith("ours"):
            reply = decode_reply(payload)
            if not isinstance(reply, Ack):
                return
            seqs = [s for first, last in reply.ranges for s in range(first, last + 1)]
        else:
            seqs = msgspec.msgpack.decode(payload, type=list[int])
        now = time.monotonic()
        for seq in seqs:
            if self.sent.pop(seq, None) is not None:
                self.latencies.append(now - self.first.pop(seq))
        if not self.done.done():
            self.fill()

    def fill(self) -> None:
        now = time.monotonic()
        out = []
        while len(self.sent) < WINDOW and self.next < len(self.packets):
            self.next += 1
            self.sent[self.next] = self.first[self.next] = now
            out.append(self.packets[self.next - 1])
        if out:
            self.transport.write(b"".join(out))
        if not self.sent and self.next == len(self.packets):
            self.done.set_result(None)

    def resend(self) -> None:
        now = time.monotonic()
        for seq, at in list(self.sent.items()):
            if now - at > RESEND_S:
                self.sent[seq] = now
                self.resent += 1
                self.transport.write(self.packets[seq - 1])


def _same(agent: Agent) -> Agent:
    return agent


async def load_mqtt(which: str, port: int, count: int, password: str) -> Result:
    loop = asyncio.get_running_loop()
    agents = []
    for n in range(GATEWAYS):
        batches = payloads(which, n, count // GATEWAYS)
        agent = Agent(which, n, batches, password)
        await loop.create_connection(partial(_same, agent), "127.0.0.1", port)
        agents.append(agent)
    await asyncio.wait_for(asyncio.gather(*(a.ready for a in agents)), 20)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started = time.monotonic()
    for agent in agents:
        agent.fill()

    async def resend() -> None:
        while True:
            await asyncio.sleep(0.5)
            for agent in agents:
                agent.resend()

    resending = asyncio.create_task(resend())
    await asyncio.gather(*(a.done for a in agents))
    seconds = time.monotonic() - started
    resending.cancel()
    return summary([s for a in agents for s in a.latencies], seconds, sum(a.resent for a in agents))


class Poster(asyncio.Protocol):
    """One keep-alive connection, one unanswered request."""

    def __init__(self, requests: Iterator[bytes], latencies: list[float]) -> None:
        self.requests, self.latencies = requests, latencies
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def post(self) -> None:
        request = next(self.requests, None)
        if request is None:
            self.transport.close()
            self.done.set_result(None)
            return
        self.at = time.monotonic()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) < length:
            return
        assert head.startswith(b"HTTP/1.1 200"), head
        self.buffer = b""
        self.latencies.append(time.monotonic() - self.at)
        self.post()


async def load_http(which: str, port: int, count: int) -> Result:
    loop = asyncio.get_running_loop()
    requests = []
    for n in range(GATEWAYS):
        head = (
            f"POST /v1/ingest HTTP/1.1\r\nHost: x\r\nHeadgate-Gateway: {gateway(n)}\r\n"
            f"Authorization: Bearer {TOKEN}\r\nContent-Length: "
        ).encode()
        requests.append(
            [head + str(len(b)).encode() + b"\r\n\r\n" + b for b in payloads(which, n, count // GATEWAYS)]
        )
    queue = iter([r for together in zip(*requests, strict=True) for r in together])
    latencies: list[float] = []
    posters = [
        (await loop.create_connection(lambda: Poster(queue, latencies), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started = time.monotonic()
    for poster in posters:
        poster.post()
    await asyncio.gather(*(p.done for p in posters))
    return summary(latencies, time.monotonic() - started, 0)


def summary(latencies: list[float], seconds: float, resent: int) -> Result:
    latencies.sort()
    p50, p99 = (latencies[int(q * (len(latencies) - 1))] * 1000 for q in (0.5, 0.99))
    return Result(len(latencies), seconds, p50, p99, resent)


# --- the bare servers ---


async def once(ready: Callable[[], bool]) -> None:
    """Tell the contest when `ready` says so."""
    while not ready():  # noqa: ASYNC110 - the flag is a library's
        await asyncio.sleep(0.01)
    print("ready", flush=True)


def http_config(app: Callable[..., Awaitable[None]], port: int) -> uvicorn.Config:
    """The same for both sides."""
    import uvicorn

    return uvicorn.Config(
        app, port=port, http="httptools", lifespan="off", ws="none", log_level="warning", access_log=False,
        server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip


async def serve_http(config: uvicorn.Config) -> None:
    import uvicorn

    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await once(lambda: server.started)
    await serving


class BareWriter:
    """SQLite, WAL, FULL: commits whatever has come in. `done` gets the rows after their commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: deque[tuple[str, int, bytes]] = deque()
        self.arrived = threading.Event()

    def run(self) -> None:
        db = sqlite3.connect(self.path, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE log (gateway TEXT, seq INTEGER, payload BLOB, PRIMARY KEY (gateway, seq))")
        while True:
            self.arrived.wait()
            self.arrived.clear()
            rows: list[tuple[str, int, bytes]] = []
            while self.rows and len(rows) < 4096:
                rows.append(self.rows.popleft())
            if self.rows:
                self.arrived.set()
            if rows:
                db.execute("BEGIN IMMEDIATE")
                db.executemany("INSERT OR IGNORE INTO log VALUES (?, ?, ?)", rows)
                db.execute("COMMIT")
                self.done(rows)

    def done(self, rows: list[tuple[str, int, bytes]]) -> None:
        raise NotImplementedError


def bare_mqtt(folder: Path, port: int, password: str) -> None:
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="headgate-cloud")
    client.username_pw_set("headgate-cloud", password)

    class Writer(BareWriter):
        def done(self, rows: list[tuple[str, int, bytes]]) -> None:
            answers: dict[str, list[int]] = defaultdict(list)
            for name, seq, _ in rows:
                answers[name].append(seq)
            for name, seqs in answers.items():
                client.publish(f"headgate/v1/{name}/ack", msgspec.msgpack.encode(seqs))

    writer = Writer(folder / "bare.db")
    threading.Thread(target=writer.run, daemon=True).start()

    def on_message(client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        _, _, tenant, name, _ = message.topic.split("/")
        payload = bytes(message.payload)
        writer.rows.append((f"{tenant}/{name}", int.from_bytes(payload[:8], "little"), payload))
        writer.arrived.set()

    def on_connect(client: paho.Client, *_: object) -> None:
        client.subscribe("headgate/v1/+/+/up", qos=0)

    def on_subscribe(*_: object) -> None:
        print("ready", flush=True)

    client.on_message = on_message
    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.connect("127.0.0.1", port)
    client.loop_forever()


def bare_http(folder: Path, port: int) -> None:
    import uvloop
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    waiting: dict[int, asyncio.Future[None]] = {}

    class Writer(BareWriter):
        def done(self, rows: list[tuple[str, int, bytes]]) -> None:
            loop.call_soon_threadsafe(self.tell, rows)

        def tell(self, rows: list[tuple[str, int, bytes]]) -> None:
            for _, seq, _ in rows:
                waiting.pop(seq).set_result(None)

    writer = Writer(folder / "bare.db")
    threading.Thread(target=writer.run, daemon=True).start()
    count = 0

    async def ingest(request: Request) -> Response:
        nonlocal count
        body = await request.body()
        count += 1
        future = waiting[count] = loop.create_future()
        writer.rows.append((request.headers["headgate-gateway"], count, body))
        writer.arrived.set()
        await future
        return Response(b"ok")

    async def main() -> None:
        app = Starlette(routes=[Route("/v1/ingest", ingest, methods=["POST"])])
        await serve_http(http_config(app, port))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop = runner.get_loop()
        runner.run(main())


# --- ours: door, intake and journal as `serve` builds them, without sinks ---


def ours(which: str, folder: Path, port: int, password: str) -> None:
    import uvloop

    from cloud.http import Credentials, HttpDoor
    from cloud.intake import Intake
    from cloud.journal.sqlite import SqliteJournal
    from cloud.metrics import Metrics
    from cloud.mqtt import MqttDoor
    from config.cloud import MqttDoor as Settings

    async def main() -> None:
        journal = SqliteJournal(folder / "journal.db")
        await journal.open()
        metrics = Metrics()
        intake = Intake(journal, journal, metrics)
        if which == "ours-mqtt":
            settings = Settings(host="127.0.0.1", port=port, tls=False, password_env="X")
            door = MqttDoor(settings, Secret(password), intake, metrics)
            running = asyncio.create_task(door.run())
            await once(lambda: door.connected)
            await running
        else:
            tokens = {gateway(n): Secret(TOKEN) for n in range(GATEWAYS)}
            app = HttpDoor(intake, Credentials(tokens), metrics, rest=None)  # type: ignore[arg-type]  # not reached
            await serve_http(http_config(app, port))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- the contest ---


@contextmanager
def child(*arguments: str, password: str, core: int) -> Iterator[subprocess.Popen[str]]:
    cores = sorted(os.sched_getaffinity(0))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.bench_door", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, PASSWORD: password},
    )
    os.sched_setaffinity(process.pid, {cores[core % len(cores)]})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(which: str, count: int, port: int, password: str) -> Result:
    import psutil

    with (
        tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder,
        child("serve", which, folder, str(port), password=password, core=1) as server,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", f"{which} did not start"
        with child("load", which, str(port), str(count), password=password, core=0) as load:
            assert load.stdin is not None
            assert load.stdout is not None
            assert load.stdout.readline() == "ready\n", "the load did not start"
            process = psutil.Process(server.pid)
            before = process.cpu_times()
            load.stdin.write("go\n")
            load.stdin.flush()
            result = msgspec.json.decode(load.stdout.readline(), type=Result)
            after = process.cpu_times()
            result.cpu_s = after.user + after.system - before.user - before.system
            for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    result.rss_mb = int(line.split()[1]) / 1024
            return result


def contest(kind: str, rounds: int, count: int) -> None:
    import secrets

    from tests.servers import run
    from tests.servers.process import free_port

    password = secrets.token_hex(12)
    users = {"headgate-cloud": password, **{str(gateway(n)): password for n in range(GATEWAYS)}}
    results: dict[str, list[Result]] = {f"bare-{kind}": [], f"ours-{kind}": []}
    for i in range(rounds):
        for which in sorted(results, reverse=bool(i % 2)):
            if kind == "mqtt":
                with run.mosquitto(users=users) as broker:
                    os.sched_setaffinity(broker.process.pid, {sorted(os.sched_getaffinity(0))[0]})
                    results[which].append(measure(which, count, broker.port, password))
            else:
                results[which].append(measure(which, count, free_port(), password))
    rates = {}
    for which, runs in results.items():
        rates[which] = statistics.median(r.rate for r in runs)
        p50, p99 = statistics.median(r.p50_ms for r in runs), statistics.median(r.p99_ms for r in runs)
        print(
            f"{which}: {rates[which]:,.0f} batches/s (of {', '.join(f'{r.rate:,.0f}' for r in runs)}), "
            f"ack p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
            f"{statistics.median(r.batches / r.cpu_s for r in runs):,.0f} batches per CPU-second, "
            f"{max(r.rss_mb for r in runs):.0f} MB, {sum(r.resent for r in runs)} resent",
            flush=True,
        )
    cpu = [
        statistics.median(r.batches / r.cpu_s for r in results[w]) for w in (f"ours-{kind}", f"bare-{kind}")
    ]
    print(
        f"{kind} door / bare: {rates[f'ours-{kind}'] / rates[f'bare-{kind}']:.2f} in batches/s, "
        f"{cpu[0] / cpu[1]:.2f} in batches per CPU-second",
        flush=True,
    )


def main() -> None:
    match sys.argv[1:]:
        case ["serve", which, folder, port]:
            password = os.environ[PASSWORD]
            if which == "bare-mqtt":
                bare_mqtt(Path(folder), int(port), password)
            elif which == "bare-http":
                bare_http(Path(folder), int(port))
            else:
                ours(which, Path(folder), int(port), password)
        case ["load", which, port, count]:
            password = os.environ[PASSWORD]
            if which.endswith("mqtt"):
                result = asyncio.run(load_mqtt(which, int(port), int(count), password))
            else:
                result = asyncio.run(load_http(which, int(port), int(count)))
            print(msgspec.json.encode(result).decode(), flush=True)
        case arguments:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("--rounds", type=int, default=3)
            parser.add_argument("--batches", type=int, default=40_000)
            parser.add_argument("--only", choices=("mqtt", "http"))
            options = parser.parse_args(arguments)
            for kind in ("mqtt", "http"):
                if options.only in (None, kind):
                    contest(kind, options.rounds, options.batches)


if __name__ == "__main__":
    main()
