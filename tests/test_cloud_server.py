"""`headgate-cloud serve`: the real program with its embedded sinks, killed, stopped, filled and cut off."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme

import config.agent
from cloud import server as server_module
from cloud.runner import CLOSE_S, SinkRunner
from cloud.server import LEAVE_S, CloudServer
from cloud.sinks.contract import Record, RetryLater, Settled
from config.cloud import Archive, Cloud, Embedded, Gateway, JournalSettings, Server
from sync.https import HttpsUplink
from sync.identity import GatewayName, Secret
from sync.mqtt import MqttUplink
from sync.uplink import LinkDown, Uplink, UplinkError
from sync.uplink import RetryLater as ComeAgain
from sync.wire import Sealed
from tests.fakes.batches import EPOCH, batch, forged
from tests.servers import run
from tests.servers.process import free_port

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "cloud.cli"]
TOKEN = "a-token-that-is-long-enough"
WORD = "a-password-that-is-long-enough"
NAME = GatewayName("acme", "plant-1")
KILLS = int(os.environ.get("HEADGATE_CLOUD_KILLS", "2"))  #: some seconds each
KILLS_SEED = int(os.environ.get("HEADGATE_KILLS_SEED", "11"))


def secret(folder: Path, name: str, word: str) -> Path:
    file = folder / name
    file.touch(mode=0o600)
    file.write_text(word)
    return file


class Served:
    """One data folder and one port; the program may be started and ended as often as wanted."""

    def __init__(self, folder: Path, *, extra: str = "", server: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        token = secret(folder, "token", TOKEN)
        self.config = folder / "cloud.toml"
        self.config.write_text(
            f'[server]\ndata_dir = "{folder}/data"\nport = {self.port}\ndrain_s = 20.0\n{server}\n'
            f'[[gateway]]\ntenant = "acme"\nname = "plant-1"\ntoken_file = "{token}"\n{extra}\n'
        )
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.context = ssl.create_default_context()
        self.scheme = "https" if server else "http"

    def start(self) -> Served:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "serve", "--config", str(self.config)], cwd=ROOT, stderr=log
            )
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                if self.ask("/healthz") == "ok\n":
                    return self
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ask(self, path: str) -> str:
        context = self.context if self.scheme == "https" else None
        url = f"{self.scheme}://localhost:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            return str(answer.read().decode())

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 40) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    def metrics(self) -> dict[str, float]:
        lines = (
            line.rsplit(" ", 1) for line in self.ask("/metrics").splitlines() if not line.startswith("#")
        )
        return {name: float(value) for name, value in lines}

    def readings(self) -> list[tuple[int, int]]:
        """(seq, how many) of what the embedded store holds, read behind the program's back."""
        db = sqlite3.connect(f"file:{self.folder}/data/readings.sqlite?mode=ro", uri=True)
        try:
            return list(db.execute("SELECT seq, count(*) FROM readings GROUP BY seq ORDER BY seq"))
        finally:
            db.close()

    def memory_mb(self, which: str) -> float:
        """VmRSS is now, VmHWM the peak (proc(5))."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024

    def uplink(self) -> HttpsUplink:
        settings = config.agent.Uplink(kind="https", host="127.0.0.1", port=self.port, tls=False, window=32)
        return HttpsUplink(NAME, settings, Secret(TOKEN))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(*, extra: str = "", server: str = "") -> Served:
        made.append(Served(tmp_path, extra=extra, server=server))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None:
            one.process.kill()
            one.process.wait()


async def send(uplink: Uplink, first: int, frames: int = 3) -> None:
    """Until it is acknowledged, as the forwarder would."""
    sealed = Sealed(EPOCH, first, first + frames - 1, batch(first, frames))
    async with asyncio.timeout(60):
        while True:
            try:
                await uplink.send(sealed)
            except LinkDown:
                with suppress(LinkDown):
                    await uplink.open()
                await asyncio.sleep(0.05)
            except UplinkError:
                await asyncio.sleep(0.05)
            else:
                return


def all_of(frames: int) -> list[tuple[int, int]]:
    return [(seq, 8) for seq in range(1, frames + 1)]


async def test_readings_come_in_by_http_reach_the_sinks_and_sigterm_ends_it_with_0(
    served: Callable[..., Served],
) -> None:
    up = served().start()
    uplink = up.uplink()
    await uplink.open()
    await asyncio.gather(*(send(uplink, 1 + 3 * n) for n in range(50)))
    await send(uplink, 1)
    await uplink.close()
    ready = json.loads(up.ask("/readyz"))
    assert ready["ready"] is True
    assert {sink["name"] for sink in ready["sinks"]} == {"embedded", "archive"}
    counted = up.metrics()
    assert counted["headgate_frames_acknowledged_total"] == 153
    assert counted["headgate_duplicate_batches_total"] == 1
    assert counted["headgate_journal_last_offset"] == 50
    assert counted["headgate_ack_latency_seconds_count"] == 51
    assert {key for key in counted if key.startswith("headgate_sink_lag_seconds")} == {
        'headgate_sink_lag_seconds{sink="embedded"}', 'headgate_sink_lag_seconds{sink="archive"}',
    }  # fmt: skip
    assert up.end() == 0
    assert up.readings() == all_of(150)
    from deltalake import DeltaTable

    archived = DeltaTable(str(up.folder / "data/archive/readings")).to_pyarrow_table(columns=["seq"])
    assert sorted(archived["seq"].to_pylist()) == sorted(seq for seq, n in all_of(150) for _ in range(n))
    assert TOKEN not in up.log.read_text()
    assert not any(mode & 0o077 for mode in (f.stat().st_mode for f in (up.folder / "data").glob("*.db")))


@pytest.mark.timeout(90)
async def test_the_archives_files_are_joined_as_often_as_it_says_also_where_that_is_more_than_once_an_hour(
    served: Callable[..., Served],
) -> None:
    """Until then the process knows each file, at 2 to 3 KiB."""
    from deltalake import DeltaTable

    up = served(extra="[archive]\ncommit_interval_s = 0.1\ncompact_hours = 0.0003\n").start()
    uplink = up.uplink()
    await uplink.open()
    deadline = time.monotonic() + 60
    sent = 0
    while "files joined to 1" not in up.log.read_text():
        assert time.monotonic() < deadline, up.log.read_text()
        await send(uplink, 1 + 3 * sent)
        sent += 1
        await asyncio.sleep(0.05)
    await uplink.close()
    assert up.end() == 0
    table = DeltaTable(str(up.folder / "data/archive/readings"))
    assert table.count() == sum(n for _, n in all_of(3 * sent))


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_killed_again_and_again_nothing_acknowledged_is_lost_or_doubled(
    served: Callable[..., Served],
) -> None:
    up = served(extra="[archive]\nenabled = false").start()
    uplink = up.uplink()
    rng = random.Random(KILLS_SEED)
    acked: list[int] = []
    total = 20 * KILLS + 60

    async def stream(lane: int) -> None:
        for n in range(lane, total, 4):
            await send(uplink, 1 + 3 * n)
            acked.append(n)

    lanes = [asyncio.create_task(stream(lane)) for lane in range(4)]
    for kill in range(KILLS):
        async with asyncio.timeout(60):
            while len(acked) < 20 * (kill + 1):  # noqa: ASYNC110 - a counter
                await asyncio.sleep(0.005)
        await asyncio.sleep(rng.random() / 50)  # at any moment of a commit
        assert await asyncio.to_thread(up.end, signal.SIGKILL) == -signal.SIGKILL
        await asyncio.to_thread(up.start)
    await asyncio.gather(*lanes)
    await uplink.close()
    assert await asyncio.to_thread(up.end) == 0
    assert up.readings() == all_of(3 * total)


async def test_both_doors_feed_one_journal(
    served: Callable[..., Served], start: run.Starter, tmp_path: Path
) -> None:
    broker = start(run.mosquitto(users={"headgate-cloud": WORD, str(NAME): TOKEN}))
    word = secret(tmp_path, "word", WORD)
    mqtt = f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{word}"'
    up = served(extra=mqtt).start()
    https = up.uplink()
    settings = config.agent.Uplink(host="127.0.0.1", port=broker.port, tls=False, ack_timeout_s=1.0)
    by_mqtt = MqttUplink(NAME, settings, Secret(TOKEN))
    await by_mqtt.open()
    await https.open()
    await asyncio.gather(*(send((by_mqtt, https)[n % 2], 1 + 3 * n) for n in range(40)))
    await asyncio.gather(*(send((https, by_mqtt)[n % 2], 1 + 3 * n) for n in range(40)))
    assert json.loads(up.ask("/readyz"))["mqtt"] == "connected"
    counted = up.metrics()
    assert counted['headgate_batches_received_total{door="mqtt"}'] >= 40
    assert counted["headgate_duplicate_batches_total"] >= 40
    broker.process.kill()
    async with asyncio.timeout(30):
        while up.metrics()["headgate_broker_connected"]:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    await send(https, 121)
    assert json.loads(up.ask("/readyz"))["mqtt"] != "connected"
    await by_mqtt.close()
    await https.close()
    assert await asyncio.to_thread(up.end) == 0
    assert up.readings() == all_of(123)
    log = up.log.read_text()
    assert log.count("mqtt door closed") == 1
    assert WORD not in log


async def test_over_tls_the_door_is_open_and_plaintext_is_not(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    lines = f'host = "0.0.0.0"\ntls_cert_file = "{tmp_path}/cert.pem"\ntls_key_file = "{tmp_path}/key.pem"'
    up = served(server=lines)
    authority.configure_trust(up.context)
    up.start()
    settings = config.agent.Uplink(
        kind="https", host="localhost", port=up.port, ca_file=str(tmp_path / "ca.pem")
    )
    uplink = HttpsUplink(NAME, settings, Secret(TOKEN))
    await uplink.open()
    await send(uplink, 1)
    await uplink.close()
    plain = HttpsUplink(
        NAME, config.agent.Uplink(kind="https", host="127.0.0.1", port=up.port, tls=False), Secret(TOKEN)
    )
    with pytest.raises(LinkDown):
        await plain.open()
    assert await asyncio.to_thread(up.end) == 0
    assert up.readings() == all_of(3)


def refused(file: Path) -> str:
    done = subprocess.run(
        [*PROGRAM, "serve", "--config", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_keeps_it_from_starting_is_said_in_one_line(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    up = served().start()
    assert "another process has this journal" in refused(up.config)
    other = tmp_path / "other.toml"
    other.write_text(up.config.read_text().replace("/data", "/other-data"))
    assert "change server.host or server.port" in refused(other)
    (tmp_path / "token").chmod(0o644)
    assert "chmod 600" in refused(other)
    assert up.end() == 0
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "data/journal.db").write_bytes(b"nothing like a journal" * 1000)
    assert "do not delete it" in refused(up.config)


def test_a_sink_that_answers_nothing_costs_neither_memory_nor_the_doors(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never says a word
        port = mute.getsockname()[1]
        up = served(
            extra=f'[mysql]\nhost = "127.0.0.1"\nport = {port}\npassword_env = "HEADGATE_TEST_WORD"\n'
            "[embedded]\nenabled = false\n[archive]\nenabled = false\n"
        )
        monkeypatch.setenv("HEADGATE_TEST_WORD", WORD)
        up.start()

        async def flood() -> None:
            uplink = up.uplink()
            await uplink.open()
            noise = os.urandom(200_000)

            async def one(n: int) -> None:
                await uplink.send(
                    Sealed(EPOCH, n, n, forged(noise, raw_bytes=len(noise), compression=0, first=n, last=n))
                )

            for start in range(1, 801, 40):
                await asyncio.gather(*(one(n) for n in range(start, start + 40)))
            await uplink.close()

        before_mb = up.memory_mb("VmRSS")
        asyncio.run(flood())
        assert up.metrics()["headgate_journal_bytes"] > 155e6
        assert up.memory_mb("VmHWM") < 512
        assert up.memory_mb("VmHWM") - before_mb < 100
        [sink] = json.loads(up.ask("/readyz"))["sinks"]
        assert sink["name"] == "mysql"
        assert sink["state"] != "running"


def test_a_store_that_falls_silent_holds_up_the_end_by_no_more_than_it_may(
    served: Callable[..., Served],
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:  # takes connections, never says a word
        up = served()
        token = up.folder / "token"
        port = mute.getsockname()[1]
        up.config.write_text(
            up.config.read_text().replace("drain_s = 20.0", "drain_s = 1.0")
            + f'[archive]\nendpoint = "http://127.0.0.1:{port}"\nbucket = "archive"\n'
            f'access_key_file = "{token}"\nsecret_key_file = "{token}"\n'
        )
        up.start()
        mute.settimeout(30)
        asked, _ = mute.accept()  # the archive waits for an answer now, for as long as it waits for any
        started = time.monotonic()
        assert up.end(timeout_s=90) == 0
        assert time.monotonic() - started < 1.0 + CLOSE_S + LEAVE_S + 5.0  # and what a busy machine takes
        asked.close()
    assert "a store still holds a thread" in up.log.read_text()


# --- in this process, with sinks that do as they are told ---


class Told:
    """A sink that takes, or refuses for now."""

    max_records, max_bytes, linger_s = 1000, 2**20, 0.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.mood = "takes"
        self.records = 0

    async def open(self) -> int | None:
        return None

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        if self.mood != "takes":
            raise RetryLater("not now", 0.05)
        self.records += len(records)
        return Settled()

    async def remove(self, records: Sequence[Record]) -> None: ...

    async def maintain(self, now_ns: int) -> None: ...

    async def close(self) -> None: ...


@asynccontextmanager
async def inside(folder: Path, *, max_mb: int = 64) -> AsyncIterator[tuple[CloudServer, HttpsUplink]]:
    token = secret(folder, "token", TOKEN)
    settings = Cloud(
        server=Server(data_dir=str(folder / "data"), port=free_port(), drain_s=5.0),
        gateway=[Gateway(tenant="acme", name="plant-1", token_file=str(token))],
        journal=JournalSettings(max_mb=max_mb, keep_hours=0.0, free_disk_mb=0),
        embedded=Embedded(enabled=False),
        archive=Archive(enabled=False),
    )
    server = CloudServer(settings)
    task = asyncio.create_task(server.run())
    await asyncio.wait(
        [asyncio.create_task(server.started.wait()), task], return_when=asyncio.FIRST_COMPLETED
    )
    if task.done():
        task.result()
    uplink = HttpsUplink(
        NAME,
        config.agent.Uplink(kind="https", host="127.0.0.1", port=server.address[1], tls=False, window=32),
        Secret(TOKEN),
    )
    await uplink.open()
    try:
        yield server, uplink
    finally:
        await uplink.close()
        server.stop()
        await task


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    told = [Told("first"), Told("second")]
    monkeypatch.setattr(server_module, "build_sinks", lambda config, secrets: told)
    return told


async def test_a_full_journal_asks_to_come_again_and_empties_itself_once_the_sinks_go_on(
    tmp_path: Path, sinks: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "PRESSURE_INTERVAL_S", 0.1)
    for sink in sinks:
        sink.mood = "not now"
    async with inside(tmp_path, max_mb=16) as (server, uplink):
        noise = os.urandom(200_000)

        def large(n: int) -> Sealed:
            return Sealed(EPOCH, n, n, forged(noise, raw_bytes=len(noise), compression=0, first=n, last=n))

        n, full = 1, False
        while not full:
            try:
                await uplink.send(large(n))
                n += 1
            except ComeAgain:
                full = True
        assert 30 < n < 100
        assert server.metrics.retry["full"] >= 1
        sinks[0].mood = "takes"  # one of two is not enough
        for _ in range(5):
            with pytest.raises(ComeAgain):
                await uplink.send(large(n))
            await asyncio.sleep(0.05)
        sinks[1].mood = "takes"
        async with asyncio.timeout(60):
            while True:
                try:
                    await uplink.send(large(n))
                except ComeAgain:
                    await asyncio.sleep(0.1)
                else:
                    break


async def test_a_fault_in_one_sink_stops_neither_the_other_nor_the_doors(
    tmp_path: Path, sinks: list[Told], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = 0
    monkeypatch.setattr(server_module, "RESTART_S", 0.05)
    follow = SinkRunner.run

    async def run_or_end(runner: SinkRunner) -> None:
        nonlocal ended
        if runner.sink.name == "first" and ended < 3:
            ended += 1
            raise LookupError("a fault of ours")
        await follow(runner)

    monkeypatch.setattr(SinkRunner, "run", run_or_end)
    async with inside(tmp_path) as (_, uplink):
        await send(uplink, 1)
        async with asyncio.timeout(30):
            while sinks[0].records < 3 or sinks[1].records < 3:  # noqa: ASYNC110 - counters
                await asyncio.sleep(0.02)
    assert ended == 3
    assert sum("sink first ended by a fault" in r.getMessage() for r in caplog.records) == 3


async def test_a_sink_that_cannot_drain_delays_the_end_by_no_more_than_it_may(
    tmp_path: Path, sinks: list[Told], caplog: pytest.LogCaptureFixture
) -> None:
    sinks[0].mood = "not now"
    async with inside(tmp_path) as (_, uplink):
        await send(uplink, 1)
        started = time.monotonic()
    assert time.monotonic() - started < 15
    assert sinks[1].records == 3
    assert any("not drained in time" in r.getMessage() and "first" in r.getMessage() for r in caplog.records)
    sinks[0].mood = "takes"
    async with inside(tmp_path):
        async with asyncio.timeout(30):
            while sinks[0].records < 3:  # noqa: ASYNC110 - a counter
                await asyncio.sleep(0.02)
    assert sinks[1].records == 3
