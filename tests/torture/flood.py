"""One gateway sends a hundred times its quota, and heeds no answer: what do the others notice?

A real server process behind a real Mosquitto and on its own HTTP door. Four gateways send five batches a second each
and time every ack, first alone, then beside the flood, which is a process of its own. The flood's quota is 20
batches/s.

Violations: a batch of the others without an ack, or a latency (p50, p95) beside the flood of more than twice what it
was without, taken as at least `LEAST_MS` (below that the machine's own scheduling is what is measured); more of the
flood taken than its quota; a flood that is not counted and shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import msgspec
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from sync.wire import Ack, decode_reply
from tests.fakes.batches import batch
from tests.servers import run
from tests.servers.process import free_port, wait_until
from tests.torture.report import Finding, record

ROOT: Final = Path(__file__).resolve().parents[2]
VICTIMS: Final = 4
EVERY_S: Final = 0.2
QUOTA: Final = 20.0  #: batches/s of the flooding gateway
TIMES: Final = 100
FRAMES: Final = 20
LEAST_MS: Final = 10.0
ACK_S: Final = 20.0
TOKEN: Final = "a-token-that-is-long-enough"
PASSWORD: Final = "the-cloud-s-own-password"
FLOODER: Final = "acme/flood"
CONNECTIONS: Final = 32  #: of the flood at the HTTP door


class Violation(AssertionError):
    """The promise does not hold."""


class Figures(msgspec.Struct, frozen=True):
    door: str
    alone_p50_ms: float
    alone_p95_ms: float
    beside_p50_ms: float
    beside_p95_ms: float
    acks: int
    flood_sent: int
    flood_acknowledged: int
    flood_told_to_wait: int


# --- the server ---


@contextlib.contextmanager
def cloud(folder: Path, broker: run.Mosquitto) -> Iterator[str]:
    """A server process; its address."""
    for name, text in (("token", TOKEN), ("password", PASSWORD)):
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(text)
    port = free_port()
    gateways = "".join(
        f'[[gateway]]\ntenant = "acme"\nname = "{name}"\ntoken_file = "{folder}/token"\n'
        + (f"batches_per_s = {QUOTA}\n" if name == "flood" else "")
        for name in ("flood", *(f"v{n}" for n in range(VICTIMS)))
    )
    config = folder / "cloud.toml"
    config.write_text(
        f'[server]\ndata_dir = "{folder}/data"\nport = {port}\ndrain_s = 2.0\n'
        f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{folder}/password"\n'
        f"[archive]\nenabled = false\n[limits]\nquota_burst_s = 1.0\n{gateways}"
    )
    log = (folder / "cloud.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "cloud.cli", "serve", str(config)], cwd=ROOT, stdout=log, stderr=log
    )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return bool(httpx.get(f"{url}/readyz", timeout=5).json().get("mqtt") == "connected")
        return False

    try:
        wait_until(ready, timeout_s=60, what=f"the server ({folder / 'cloud.log'})")
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


# --- who sends ---


class Sender:
    """A gateway that sends a batch and waits for its ack. Latencies in milliseconds."""

    def __init__(self, name: str, door: str, url: str, broker: run.Mosquitto) -> None:
        self.name = name
        self.door = door
        self.latencies: list[float] = []
        self.seq = 1
        self._url = url
        self._broker = broker
        self._acks: asyncio.Queue[int] = asyncio.Queue()

    async def run(self, until_s: float, offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        async with contextlib.AsyncExitStack() as stack:
            client = http = None
            if self.door == "mqtt":
                client = await self._connect()
                stack.callback(client.loop_stop)
                stack.callback(client.disconnect)
            else:
                http = await stack.enter_async_context(httpx.AsyncClient(base_url=self._url, timeout=ACK_S))
            while time.monotonic() < until_s:
                payload = batch(self.seq, FRAMES, gateway=self.name)
                started_s = time.monotonic()
                if client is not None:
                    client.publish(f"headgate/v1/{self.name}/up", payload)
                    await self._acked(self.seq)
                elif http is not None:
                    answer = await http.post("/v1/ingest", content=payload, headers=headers(self.name))
                    if answer.status_code != 200:
                        raise Violation(
                            f"{self.name} got {answer.status_code} beside the flood: {answer.text!r}"
                        )
                self.latencies.append((time.monotonic() - started_s) * 1000)
                self.seq += FRAMES
                await asyncio.sleep(max(0.0, EVERY_S - (time.monotonic() - started_s)))

    async def _acked(self, seq: int) -> None:
        try:
            async with asyncio.timeout(ACK_S):
                while await self._acks.get() != seq:
                    pass
        except TimeoutError:
            raise Violation(f"{self.name} has no ack for seq {seq} after {ACK_S:g} s") from None

    async def _connect(self) -> paho.Client:
        loop = asyncio.get_running_loop()
        subscribed = asyncio.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self.name)
        client.username_pw_set(self.name, TOKEN)

        def heard(_client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
            reply = decode_reply(bytes(message.payload))
            if isinstance(reply, Ack):
                for first, _ in reply.ranges:
                    loop.call_soon_threadsafe(self._acks.put_nowait, first)

        def connected(client: paho.Client, *_: object) -> None:
            client.subscribe(f"headgate/v1/{self.name}/ack")

        def listening(*_: object) -> None:
            loop.call_soon_threadsafe(subscribed.set)

        client.on_message, client.on_connect, client.on_subscribe = heard, connected, listening
        client.connect(self._broker.host, self._broker.port)
        client.loop_start()
        async with asyncio.timeout(ACK_S):
            await subscribed.wait()
        return client


def headers(name: str) -> dict[str, str]:
    return {"Headgate-Gateway": name, "Authorization": f"Bearer {TOKEN}"}


def flood_mqtt(port: int, first: int, seconds: float) -> int:
    """Publishes at `TIMES` the quota and listens to nothing; how many were sent."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="flooder")
    client.username_pw_set(FLOODER, TOKEN)
    client.connect("127.0.0.1", port)
    client.loop_start()
    sent, started_s = 0, time.monotonic()
    while (gone_s := time.monotonic() - started_s) < seconds:
        while sent < gone_s * QUOTA * TIMES:
            payload = batch(first + sent * FRAMES, FRAMES, gateway=FLOODER)
            client.publish(f"headgate/v1/{FLOODER}/up", payload)
            sent += 1
        time.sleep(0.005)
    client.loop_stop()
    return sent


async def flood_http(port: int, first: int, seconds: float) -> int:
    """Posts at `TIMES` the quota, on as many connections as it has, and comes again whatever it is told."""
    sent, started_s = 0, time.monotonic()

    async def one() -> None:
        nonlocal sent
        while (gone_s := time.monotonic() - started_s) < seconds:
            if sent >= gone_s * QUOTA * TIMES:
                await asyncio.sleep(0.005)
                continue
            payload = batch(first + sent * FRAMES, FRAMES, gateway=FLOODER)
            sent += 1
            head = (
                f"POST /v1/ingest HTTP/1.1\r\nHost: x\r\nHeadgate-Gateway: {FLOODER}\r\n"
                f"Authorization: Bearer {TOKEN}\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
            )
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(5):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(head.encode() + payload)
                    await reader.read()
                    writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return sent


# --- the measurement ---


async def measure(door: str, url: str, broker: run.Mosquitto, seconds: float, rounds: int) -> Figures:
    """Alone and beside the flood by turns: what else the machine does falls on both."""
    senders = [Sender(f"acme/v{n}", door, url, broker) for n in range(VICTIMS)]
    first = 1 if door == "mqtt" else 1 + 10_000_000
    for sender in senders:
        sender.seq = first
    await _send(senders, 2.0)  # warm
    alone: list[float] = []
    beside: list[float] = []
    before = await counters(url)
    sent, over = 0, True
    for _ in range(rounds):
        alone += await _send(senders, seconds)
        with_flood, flooded, shown = await _beside(door, url, broker, senders, first + sent * FRAMES, seconds)
        beside += with_flood
        sent, over = sent + flooded, over and shown
    alone.sort()
    beside.sort()
    after = await counters(url)
    acknowledged = int(after[_KEPT] - before[_KEPT])
    waits = int(after.get(_WAITS, 0.0) - before.get(_WAITS, 0.0))
    if not waits or not over:
        raise Violation(f"{door}: the flood is not told of: {waits} batches counted, problem shown: {over}")
    most = rounds * (QUOTA * (seconds + 3) * 1.2 + 20)
    if acknowledged > most:
        raise Violation(f"{door}: {acknowledged} of the flood were taken, its quota allows {most:.0f}")
    return Figures(
        door, at(alone, 0.5), at(alone, 0.95), at(beside, 0.5), at(beside, 0.95), len(alone) + len(beside), sent,
        acknowledged, waits,
    )  # fmt: skip


async def _beside(
    door: str, url: str, broker: run.Mosquitto, senders: list[Sender], first: int, seconds: float
) -> tuple[list[float], int, bool]:
    """The latencies, how many the flood sent, and whether it was shown as a problem meanwhile."""
    flooder = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.torture.flood", "--flooder", door, "--first", str(first), "--seconds",
        str(seconds + 2), "--port", str(broker.port if door == "mqtt" else url.rpartition(":")[2]),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await asyncio.sleep(2.0)
    beside = await _send(senders, seconds)
    over = 'headgate_problem{code="quota:acme/flood"}' in (await counters(url))
    out, _ = await flooder.communicate()
    return beside, int(out), over


_KEPT: Final = "flood batches kept"
_WAITS: Final = 'headgate_quota_refused_batches_total{gateway="flood",tenant="acme"}'


async def counters(url: str) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=ACK_S) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    found = {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    found[_KEPT] = _flooded(url)
    return found


def _flooded(url: str) -> float:
    """Batches of the flood in the journal, counted there."""
    import sqlite3

    folder = _FOLDERS[url]
    with contextlib.closing(sqlite3.connect(f"file:{folder}/data/journal.db?mode=ro", uri=True)) as db:
        row = db.execute("SELECT batches FROM gateway_count WHERE gateway = ?", (FLOODER,)).fetchone()
    return float(row[0]) if row else 0.0


_FOLDERS: dict[str, Path] = {}


async def _send(senders: list[Sender], seconds: float) -> list[float]:
    until_s = time.monotonic() + seconds
    for sender in senders:
        sender.latencies.clear()
    async with asyncio.TaskGroup() as group:
        for n, sender in enumerate(senders):
            group.create_task(sender.run(until_s, n * EVERY_S / len(senders)))
    return sorted(ms for sender in senders for ms in sender.latencies)


def at(latencies: list[float], share: float) -> float:
    return round(latencies[int(share * (len(latencies) - 1))], 2)


def judge(figures: Figures) -> None:
    """Raises `Violation`."""
    for word, alone, beside in (
        ("p50", figures.alone_p50_ms, figures.beside_p50_ms),
        ("p95", figures.alone_p95_ms, figures.beside_p95_ms),
    ):
        if beside > 2 * max(alone, LEAST_MS):
            raise Violation(f"{figures.door}: the others' {word} went from {alone} to {beside} ms")


def drill(seconds: float, rounds: int = 1, doors: tuple[str, ...] = ("mqtt", "http")) -> list[Figures]:
    """Both doors. Raises `Violation`."""
    users = {"headgate-cloud": PASSWORD, FLOODER: TOKEN, **{f"acme/v{n}": TOKEN for n in range(VICTIMS)}}
    with tempfile.TemporaryDirectory() as name, run.mosquitto(users=users) as broker:
        folder = Path(name)
        with cloud(folder, broker) as url:
            _FOLDERS[url] = folder
            return [asyncio.run(measure(door, url, broker, seconds, rounds)) for door in doors]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=6, help="alone and beside the flood, by turns")
    parser.add_argument("--door", choices=("mqtt", "http"), action="append")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--flooder", choices=("mqtt", "http"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.flooder:
        os.nice(5)  # what is measured is the server, and there are few cores
        flooded = (
            flood_mqtt(given.port, given.first, given.seconds)
            if given.flooder == "mqtt"
            else asyncio.run(flood_http(given.port, given.first, given.seconds))
        )
        print(flooded)
        return 0
    started_s = time.monotonic()
    found: list[Figures] = []
    try:
        found = drill(given.seconds, given.rounds, tuple(given.door or ("mqtt", "http")))
        for figures in found:
            print(figures)
        for figures in found:
            judge(figures)
    except Violation as err:
        print(f"violation: {err}")
        passed = False
    else:
        passed = True
    if given.record:
        told: dict[str, int | float | str] = {}
        for f in found:
            told |= {
                f"{f.door}: ack p50 alone, beside the flood (ms)": f"{f.alone_p50_ms}, {f.beside_p50_ms}",
                f"{f.door}: ack p95 alone, beside the flood (ms)": f"{f.alone_p95_ms}, {f.beside_p95_ms}",
                f"{f.door}: batches of the flood sent, taken": f"{f.flood_sent}, {f.flood_acknowledged}",
            }
        record(
            Finding(
                proof="flood", promise="One gateway at 100 times its quota costs the others at most twice the latency.",
                command="python -m tests.torture.flood --record", passed=passed, figures=told,
                took_s=time.monotonic() - started_s,
            )
        )  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
