"""The operator's API and its command line, on a real server with its embedded sinks."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cloud.api import formats, times
from cloud.api.models import Gap, Reading
from cloud.cli import main
from cloud.commands_common import Place
from cloud.commands_gaps import gaps
from cloud.server import CloudServer
from config.cloud import Archive, Cloud, Embedded, Gateway, InfluxDB, Limits, Server
from drivers.contract import Point, Reason, Scan, Value, ValueType
from sync.wire import (
    ClockRow,
    EventFrame,
    GapFrame,
    Packing,
    encode_frame,
    encode_scan,
    layout_of,
    seal,
)
from tests.servers import run
from tests.servers.process import free_port

S = 1_000_000_000
OPERATOR = "the-operators-own-token"
GATEWAY_TOKEN = "the-gateways-own-token"
NAME = "acme/plant-1"
EPOCH = 99
WALL_NS = time.time_ns() // S * S - 3600 * S
CLOCKS = (ClockRow(1, "boot", 0, WALL_NS, True),)
EVIL = "=cmd|' /C calc'!A0"
BOILER = (
    Point(name="flow", type=ValueType.F64, unit="Cel"),
    Point(name="pump", type=ValueType.BOOL),
    Point(name="state", type=ValueType.STR),
    Point(name="energy", type=ValueType.U64, unit="Wh"),
)
OTHER = (Point(name="a", type=ValueType.U16), Point(name="b", type=ValueType.U16))
SCANS = 50


def packing(device: str, points: tuple[Point, ...]) -> Packing:
    return Packing(layout_of(device, "modbus", "heating", points, (("site", "north"),)))


class Running:
    """The cloud in a thread of its own, as its configuration says."""

    def __init__(
        self, folder: Path, *, new_series_per_hour: int = 6, influxdb: InfluxDB | None = None
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.token_file = self._secret("operator", OPERATOR)
        gateway_file = self._secret("gateway", GATEWAY_TOKEN)
        self.config = Cloud(
            server=Server(
                data_dir=str(folder / "data"),
                port=self.port,
                operator_token_file=str(self.token_file),
                drain_s=10.0,
            ),
            gateway=[
                Gateway(tenant="acme", name=name, token_file=str(gateway_file))
                for name in ("plant-1", "plant-2")
            ],
            archive=Archive(commit_interval_s=0.2),
            limits=Limits(new_series_per_hour=new_series_per_hour),
            influxdb=influxdb,
        )
        self.file = folder / "cloud.toml"
        self.file.write_text(
            f'[server]\ndata_dir = "{folder}/data"\nport = {self.port}\noperator_token_file = "{self.token_file}"\n'
            + "".join(
                f'[[gateway]]\ntenant = "acme"\nname = "{name}"\ntoken_file = "{gateway_file}"\n'
                for name in ("plant-1", "plant-2")
            )
            + f"[archive]\ncommit_interval_s = 0.2\n[limits]\nnew_series_per_hour = {new_series_per_hour}\n"
        )
        self._stop: Callable[[], object] = lambda: None
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _secret(self, name: str, word: str) -> Path:
        file = self.folder / name
        file.touch(mode=0o600)
        file.write_text(word)
        return file

    def start(self) -> Running:
        started = threading.Event()

        async def serve() -> None:
            server = CloudServer(self.config)
            loop = asyncio.get_running_loop()
            self._stop = lambda: loop.call_soon_threadsafe(server.stop)
            task = asyncio.ensure_future(server.run())
            waiting = asyncio.ensure_future(server.started.wait())
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
            started.set()
            await task

        def thread() -> None:
            try:
                asyncio.run(serve())
            except BaseException as err:  # noqa: BLE001 - told to the test
                self._failed = err
            finally:
                started.set()

        self._thread = threading.Thread(target=thread, name="cloud")
        self._thread.start()
        assert started.wait(30)
        assert self._failed is None, self._failed
        deadline = time.monotonic() + 20
        while True:  # the HTTP server accepts a moment later
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5).close()
                return self
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> None:
        if self._thread is not None:
            self._stop()
            self._thread.join(40)
            assert not self._thread.is_alive(), "the server does not end"
            assert self._failed is None, self._failed
            self._thread = None

    def ask(
        self, path: str, body: object | None = None, *, token: str | None = OPERATOR
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as err:
            return err.code, err.read()

    def json(self, path: str, body: object | None = None) -> object:
        status, text = self.ask(path, body)
        assert status == 200, text
        return json.loads(text)

    def ingest(self, payload: bytes, gateway: str = NAME) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/ingest",
            data=payload,
            headers={"Headgate-Gateway": gateway, "Authorization": f"Bearer {GATEWAY_TOKEN}"},
        )
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as err:
            err.close()
            if err.code != 409:  # held before: a duplicate is an ack
                raise

    def settled(self) -> None:
        """Until every sink is past everything."""
        deadline = time.monotonic() + 60
        while True:
            _, text = self.ask("/metrics", token=None)
            lags = [
                line for line in text.decode().splitlines() if line.startswith("headgate_sink_lag_seconds{")
            ]
            assert lags, text.decode()
            if all(float(line.rsplit(" ", 1)[1]) == 0.0 for line in lags):
                return
            assert time.monotonic() < deadline, lags
            time.sleep(0.05)


def fill(server: Running, *, poison: int = 2) -> None:
    """50 scans of the boiler, two of a device with a name that a spreadsheet would run, two that do not decode, a gap
    and an event. The limit on new series lets the boiler's four points pass, and the other device's two."""
    boiler, other = packing("boiler", BOILER), packing(EVIL, OTHER)
    frames: list[bytes] = []
    for seq in range(1, SCANS + 1):
        values: list[Value | None] = [seq + 0.5, seq % 2 == 0, f"-{seq}+1", 2**60 + seq]
        reasons = {0: Reason.RANGE} if seq == 3 else {}
        if seq == 4:
            values, reasons = [None] * 4, dict.fromkeys(range(4), Reason.TIMEOUT)
        frames.append(encode_scan(boiler, Scan(seq * S, BOILER, values, reasons), boot=1))
    frames += [encode_scan(other, Scan((60 + n) * S, OTHER, [n, 2]), boot=1) for n in range(2)]
    frames.append(encode_frame(GapFrame(EPOCH, 1000, 1009, 10, 40, "evicted", "boiler", 1, 5 * S, 15 * S)))
    frames.append(encode_frame(EventFrame(1, 70 * S, "start", "agent 0.1.0", "")))
    frames += [b"\x91\x63"] * poison
    layouts = [boiler.layout, other.layout]
    readings = SCANS * 4 + 4
    server.ingest(seal(NAME, EPOCH, 1, frames, layouts, CLOCKS, readings).payload)
    server.ingest(seal(NAME, EPOCH, 1, frames, layouts, CLOCKS, readings).payload)
    server.settled()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Filled, and only read."""
    running = Running(tmp_path_factory.mktemp("cloud")).start()
    try:
        fill(running)
        yield running
    finally:
        running.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Running]:
    """For one test, empty and started."""
    running = Running(tmp_path).start()
    yield running
    running.stop()


PATHS = (
    "/v1/gateways", "/v1/gateways/acme/plant-1", "/v1/gateways/acme/plant-1/devices",
    "/v1/readings?gateway=acme/plant-1",
    "/v1/gateways/acme/plant-1/latest", "/v1/gateways/acme/plant-1/gaps", "/v1/gateways/acme/plant-1/events",
    "/v1/gaps", "/v1/dead-letters", "/v1/dead-letters/1", "/v1/verify",
)  # fmt: skip

# --- who may ask ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "wrong", GATEWAY_TOKEN, OPERATOR + "x", OPERATOR[:-1], "ä"])
def test_nobody_asks_without_the_operators_token(server: Running, path: str, token: str | None) -> None:
    if token == "ä":
        token = "\xe4"
    status, text = server.ask(path, token=token)
    assert status == 401
    assert OPERATOR.encode() not in text


@pytest.mark.parametrize("path", ["/v1/dead-letters/replay", "/v1/dead-letters/drop"])
def test_nobody_changes_anything_without_the_operators_token(server: Running, path: str) -> None:
    before = server.json("/v1/dead-letters")
    assert server.ask(path, {"sink": "embedded"}, token=None)[0] == 401
    assert server.json("/v1/dead-letters") == before


def test_without_a_token_configured_everybody_is_refused_and_told_what_to_set(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.config = Cloud(server=Server(data_dir=str(tmp_path / "data"), port=running.port))
    running.start()
    try:
        for token in (None, "", "None", OPERATOR):
            status, text = running.ask("/v1/gateways", token=token)
            assert status == 401
            assert b"operator_token_file" in text
    finally:
        running.stop()


def test_the_openapi_document_names_every_path_and_the_credential(server: Running) -> None:
    status, text = server.ask("/v1/openapi.json", token=None)
    assert status == 200
    document = json.loads(text)
    paths = document["paths"]
    assert set(paths) >= {
        "/v1/gateways", "/v1/gateways/{tenant}/{name}", "/v1/gateways/{tenant}/{name}/devices",
        "/v1/gateways/{tenant}/{name}/latest", "/v1/gateways/{tenant}/{name}/gaps",
        "/v1/gateways/{tenant}/{name}/events", "/v1/gaps", "/v1/readings",
        "/v1/dead-letters", "/v1/dead-letters/{letter}",
        "/v1/dead-letters/replay", "/v1/dead-letters/drop", "/v1/verify",
    }  # fmt: skip
    for path in paths:
        for method in paths[path].values():
            assert method["summary"]
            assert {"HTTPBearer": []} in method["security"]
            assert "401" in method["responses"]
    assert set(document["components"]["schemas"]["Reading"]["properties"]) == set(
        Reading.__dataclass_fields__
    )


# --- gateways, devices, points ---


def test_gateways_are_those_admitted_and_those_seen_with_their_counters(server: Running) -> None:
    found = server.json("/v1/gateways")
    assert isinstance(found, list)
    assert [g["gateway"] for g in found] == ["acme/plant-1", "acme/plant-2"]
    first, second = found
    frames = SCANS + 6
    assert (first["batches"], first["frames_received"], first["frames_duplicate"]) == (2, 2 * frames, frames)
    assert first["readings"] == SCANS * 4 + 4
    assert first["last_seen_ns"] > WALL_NS
    assert (second["admitted"], second["last_seen"], second["readings"]) == (True, None, 0)
    assert server.json("/v1/gateways/acme/plant-1") == first
    assert server.ask("/v1/gateways/acme/none")[0] == 404
    assert server.ask("/v1/gateways/acme/no%20name")[0] == 422


def test_devices_have_their_points_with_type_unit_and_version(server: Running) -> None:
    found = server.json("/v1/gateways/acme/plant-1/devices")
    assert isinstance(found, list)
    assert [d["name"] for d in found] == [EVIL, "boiler"]
    boiler = found[1]
    assert (boiler["driver"], boiler["measurement"], boiler["labels"]) == (
        "modbus",
        "heating",
        {"site": "north"},
    )
    assert {(p["name"], p["type"], p["unit"], p["version"]) for p in boiler["points"]} == {
        ("flow", "f64", "Cel", 1), ("pump", "bool", "", 1), ("state", "str", "", 1), ("energy", "u64", "Wh", 1),
    }  # fmt: skip


def test_latest_is_the_newest_reading_of_each_point(server: Running) -> None:
    found = server.json("/v1/gateways/acme/plant-1/latest?device=boiler")
    assert isinstance(found, list)
    values = {r["point"]: r["value"] for r in found}
    assert values == {"flow": 50.5, "pump": True, "state": "-50+1", "energy": 2**60 + 50}
    everything = server.json("/v1/gateways/acme/plant-1/latest")
    assert isinstance(everything, list)
    assert len(everything) == 6


def test_gaps_and_events_are_told(server: Running) -> None:
    gaps, events = (server.json(f"/v1/gateways/acme/plant-1/{what}") for what in ("gaps", "events"))
    assert isinstance(gaps, list)
    assert isinstance(events, list)
    (gap,), (event,) = gaps, events
    assert (gap["scans"], gap["readings"], gap["reason"], gap["device"]) == (10, 40, "evicted", "boiler")
    assert gap["from_time"] == times.iso(WALL_NS + 5 * S)
    assert (event["code"], event["text"], event["at_ns"]) == ("start", "agent 0.1.0", WALL_NS + 70 * S)
    assert server.json(f"/v1/gateways/acme/plant-1/events?to={WALL_NS}") == []


def test_gaps_are_listed_of_all_gateways_of_one_and_since_a_time_and_no_more_than_asked(
    server: Running,
) -> None:
    one = server.json("/v1/gateways/acme/plant-1/gaps")
    assert server.json("/v1/gaps") == server.json(f"/v1/gaps?gateway={NAME}&since=-1h&limit=1") == one
    assert server.json("/v1/gaps?since=2200-01-01") == []
    assert server.ask("/v1/gaps?gateway=acme/nobody")[0] == 404
    assert server.ask("/v1/gaps?since=noon")[0] == 400
    assert server.ask("/v1/gaps?limit=10001")[0] == 422
    assert json.loads(headgate_cloud("gaps", "--json", *remotely(server)).stdout) == one
    table = headgate_cloud("gaps", "--gateway", NAME, "--since", "-1h", *remotely(server)).stdout.decode()
    for word in (NAME, "boiler", "evicted", "40"):
        assert word in table
    assert b"no gap was told" in headgate_cloud("gaps", "--since", "2200-01-01", *remotely(server)).stdout


async def test_the_gaps_shown_are_the_newest_and_the_command_says_that_there_are_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        Gap(
            NAME,
            "boiler",
            "evicted",
            times.iso(n),
            times.iso(n),
            1,
            1,
            1,
            1,
            7,
            n,
            n,
            times.iso(n * S),
            "bulk",
            1,
        )
        for n in range(3, 0, -1)
    ]

    class Source:
        async def gaps(self, gateway: str | None, limit: int, *, since_ns: int) -> list[Gap]:
            assert (gateway, since_ns) == (None, 0)
            return told[:limit]

    @contextlib.asynccontextmanager
    async def opened(self: object) -> AsyncIterator[Source]:
        yield Source()

    monkeypatch.setattr(Place, "open", opened)
    done = await asyncio.to_thread(CliRunner().invoke, gaps, ["--limit", "2"])
    assert done.exit_code == 0, done.output
    assert "3..3" in done.output
    assert "2..2" in done.output
    assert "1..1" not in done.output
    assert "there are more than these 2" in done.output


# --- readings ---


def ask_readings(server: Running, **parameters: str | int) -> dict[str, object]:
    query = urllib.parse.urlencode({"gateway": NAME, **parameters})
    found = server.json(f"/v1/readings?{query}")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("store", ["embedded", "archive"])
def test_readings_come_as_they_were_sent_from_every_store(server: Running, store: str) -> None:
    rows = ask_readings(server, store=store)["readings"]
    assert isinstance(rows, list)
    assert len(rows) == SCANS * 4 + 4
    by = {(r["device"], r["point"], r["taken_at_ns"]): r for r in rows}
    assert len(by) == len(rows)
    third = by["boiler", "flow", WALL_NS + 3 * S]
    assert (third["value"], third["quality"], third["reason"]) == (3.5, "bad", "range")
    fourth = by["boiler", "state", WALL_NS + 4 * S]
    assert (fourth["value"], fourth["quality"], fourth["reason"]) == (None, "bad", "timeout")
    fifth = {p: by["boiler", p, WALL_NS + 5 * S] for p in ("flow", "pump", "state", "energy")}
    assert {p: r["value"] for p, r in fifth.items()} == {
        "flow": 5.5, "pump": False, "state": "-5+1", "energy": 2**60 + 5,
    }  # fmt: skip
    assert fifth["flow"]["taken_at"] == times.iso(WALL_NS + 5 * S)
    assert {r["quality"] for r in fifth.values()} == {"good"}
    assert {r["unit"] for r in rows if r["point"] == "energy"} == {"Wh"}


@pytest.mark.parametrize("store", ["embedded", "archive"])
def test_readings_are_chosen_by_device_point_and_time(server: Running, store: str) -> None:
    rows = ask_readings(
        server,
        store=store,
        device="boiler",
        point="flow",
        **{"from": WALL_NS + 10 * S, "to": WALL_NS + 20 * S},
    )["readings"]
    assert isinstance(rows, list)
    assert sorted(r["value"] for r in rows) == [n + 0.5 for n in range(10, 20)]
    iso = ask_readings(server, store=store, point="flow", **{"from": times.iso(WALL_NS + 48 * S)})["readings"]
    assert isinstance(iso, list)
    assert len(iso) == 3
    assert ask_readings(server, store=store, device=EVIL, point="flow")["readings"] == []
    assert ask_readings(server, store=store, to="-20d")["readings"] == []


def test_pages_lead_on_without_doubling_or_losing(server: Running) -> None:
    seen: list[tuple[str, str, int]] = []
    after: dict[str, str | int] = {}
    pages = 0
    while True:
        page = ask_readings(server, limit=17, **after)
        rows = page["readings"]
        assert isinstance(rows, list)
        seen += [(r["device"], r["point"], r["taken_at_ns"]) for r in rows]
        pages += 1
        if page["next"] is None:
            break
        assert len(rows) == 17
        after = {"after": str(page["next"])}
    assert len(seen) == len(set(seen)) == SCANS * 4 + 4
    assert pages == 12 + 1


def test_csv_is_safe_in_a_spreadsheet_and_numbers_are_untouched(server: Running) -> None:
    status, text = server.ask(f"/v1/readings?gateway={NAME}&format=csv")
    assert status == 200
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert len(rows) == SCANS * 4 + 4
    assert tuple(rows[0]) == formats.COLUMNS
    assert {r["device"] for r in rows} == {"boiler", "'" + EVIL}
    states = [r["value"] for r in rows if r["point"] == "state" and r["value"]]
    assert len(states) == SCANS - 1
    assert all(value.startswith("'-") for value in states)
    assert "1.5" in {r["value"] for r in rows if r["point"] == "flow"}
    assert {r["value"] for r in rows if r["point"] == "pump"} == {"true", "false", ""}
    assert str(2**60 + 5) in {r["value"] for r in rows if r["point"] == "energy"}
    for row in rows:
        for cell in row.values():
            assert not cell.startswith(("=", "@", "+")), cell
            assert not cell.startswith("-") or float(cell) < 0


def test_arrow_is_a_stream_that_pyarrow_reads(server: Running) -> None:
    status, data = server.ask(f"/v1/readings?gateway={NAME}&format=arrow")
    assert status == 200
    table = pa.ipc.open_stream(data).read_all()
    assert table.num_rows == SCANS * 4 + 4
    rows = {(r["device"], r["point"], r["taken_at"].timestamp()): r for r in table.to_pylist()}
    at = (WALL_NS + 5 * S) / S
    assert rows["boiler", "flow", at]["value"] == 5.5
    assert rows["boiler", "pump", at]["value"] == 0.0
    assert rows["boiler", "state", at]["text"] == "-5+1"
    assert rows["boiler", "energy", at]["text"] == str(2**60 + 5)
    assert rows["boiler", "flow", (WALL_NS + 4 * S) / S]["reason"] == "timeout"


def test_arrow_of_nothing_is_still_a_stream(server: Running) -> None:
    status, data = server.ask(f"/v1/readings?gateway={NAME}&format=arrow&device=none")
    assert status == 200
    assert pa.ipc.open_stream(data).read_all().num_rows == 0


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ("gateway=acme", 400, "tenant"), ("gateway=acme/nobody", 404, "nobody"), ("", 422, "gateway"),
        ("gateway=acme/plant-1&from=yesterday", 400, "-15m"), ("gateway=acme/plant-1&limit=0", 422, "limit"),
        ("gateway=acme/plant-1&store=mysql", 404, "embedded"), ("gateway=acme/plant-1&format=xml", 422, "arrow"),
        ("gateway=acme/plant-1&after=1.2", 400, "next"),
        ("gateway=acme/plant-1&store=archive&after=1.2.3.4", 400, "time"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_told_what_is_right(server: Running, query: str, status: int, word: str) -> None:
    got, text = server.ask(f"/v1/readings?{query}")
    assert got == status, text
    assert word in text.decode()


# --- dead letters ---


def test_dead_letters_are_listed_with_their_reason_and_shown_with_what_is_in_them(server: Running) -> None:
    page = server.json("/v1/dead-letters?sink=embedded")
    assert isinstance(page, dict)
    assert page["next"] is None
    (letter,) = page["letters"]
    assert (letter["gateway"], letter["first"], letter["last"]) == (NAME, SCANS + 5, SCANS + 6)
    assert "frame" in letter["reason"]
    content = server.json(f"/v1/dead-letters/{letter['id']}")
    assert isinstance(content, dict)
    assert content["letter"] == letter
    assert content["readings"] == []
    assert "frame" in content["other"][0]
    assert server.ask("/v1/dead-letters/99999")[0] == 404
    first = server.json("/v1/dead-letters?limit=1")
    assert isinstance(first, dict)
    rest = server.json(f"/v1/dead-letters?after={first['next']}")
    assert isinstance(rest, dict)
    assert {one["sink"] for one in (*first["letters"], *rest["letters"])} == {"embedded", "archive"}


def letters_of(server: Running, sink: str) -> list[dict[str, object]]:
    page = server.json(f"/v1/dead-letters?sink={sink}")
    assert isinstance(page, dict)
    found: list[dict[str, object]] = page["letters"]
    return found


def test_a_replay_delivers_what_is_taken_and_keeps_what_is_refused_again(own: Running) -> None:
    fill(own)
    third = packing("third", OTHER)
    frame = encode_scan(third, Scan(80 * S, OTHER, [7, 8]), boot=1)
    own.ingest(seal(NAME, EPOCH, 501, [frame], [third.layout], CLOCKS, 2).payload)
    own.settled()
    for sink in ("embedded", "archive"):
        poison, limited = letters_of(own, sink)
        assert "new series" in str(limited["reason"])
        content = own.json(f"/v1/dead-letters/{limited['id']}")
        assert isinstance(content, dict)
        assert [(r["point"], r["value"]) for r in content["readings"]] == [("a", 7), ("b", 8)]
        done = own.json("/v1/dead-letters/replay", {"sink": sink})
        assert isinstance(done, dict)
        assert done["delivered"] == [limited["id"]]
        assert [r["id"] for r in done["refused"]] == [poison["id"]]
        assert [one["id"] for one in letters_of(own, sink)] == [poison["id"]]
        rows = ask_readings(own, device="third", store=sink)["readings"]
        assert isinstance(rows, list)
        assert sorted(r["value"] for r in rows) == [7, 8]
    verdict = own.json("/v1/verify")
    assert isinstance(verdict, dict)
    assert verdict["ok"], verdict


def test_letters_are_dropped_for_good(own: Running) -> None:
    fill(own)
    ids = [one["id"] for one in letters_of(own, "archive")]
    assert own.json("/v1/dead-letters/drop", {"ids": [*ids, 12345]}) == {"dropped": len(ids)}
    assert letters_of(own, "archive") == []
    assert len(letters_of(own, "embedded")) == 1


@pytest.mark.parametrize("body", [{}, {"ids": [1], "sink": "embedded"}, {"ids": list(range(1, 2000))}])
def test_a_selection_that_is_none_is_refused(server: Running, body: dict[str, object]) -> None:
    for path in ("/v1/dead-letters/drop", "/v1/dead-letters/replay"):
        assert server.ask(path, body)[0] == 400


# --- verify ---


def test_verify_counts_every_sink_against_the_journal(server: Running) -> None:
    verdict = server.json("/v1/verify")
    assert isinstance(verdict, dict)
    assert verdict["ok"]
    assert verdict["trouble"] == []
    frames = SCANS + 6
    assert verdict["frames"] == [
        {
            "gateway": NAME,
            "received": 2 * frames,
            "duplicate": frames,
            "journaled": frames,
            "absent": 0,
            "missing": 0,
            "holes": [],
        }
    ]
    readings = SCANS * 4 + 4
    assert [(a["sink"], a["journaled"], a["stored"], a["pending"], a["ok"]) for a in verdict["sinks"]] == [
        ("embedded", readings, readings, 0, True), ("archive", readings, readings, 0, True),
    ]  # fmt: skip


def test_verify_sees_a_reading_that_was_removed_behind_its_back(own: Running) -> None:
    fill(own, poison=0)
    with sqlite3.connect(own.folder / "data" / "readings.sqlite") as db:
        db.execute("DELETE FROM readings WHERE seq = 7 AND point_id = (SELECT min(point_id) FROM readings)")
    db.close()
    verdict = own.json("/v1/verify")
    assert isinstance(verdict, dict)
    assert not verdict["ok"]
    assert [(a["sink"], a["missing"], a["doubled"]) for a in verdict["sinks"]] == [
        ("embedded", 1, 0), ("archive", 0, 0),
    ]  # fmt: skip


def test_verify_knows_what_retention_has_removed_from_what_is_missing(own: Running) -> None:
    """The archive keeps what the embedded store may no longer hold."""
    boiler = packing("boiler", BOILER)
    old_ns = time.time_ns() - 5 * 86_400 * S
    frames = [encode_scan(boiler, Scan(n * S, BOILER, [1.0, True, "x", 1]), boot=1) for n in (1, 2)]
    own.ingest(
        seal(NAME, EPOCH, 1, frames, [boiler.layout], (ClockRow(1, "boot", 0, old_ns, True),), 8).payload
    )
    fresh = encode_scan(boiler, Scan(S, BOILER, [1.0, True, "x", 1]), boot=1)
    own.ingest(seal(NAME, EPOCH, 3, [fresh], [boiler.layout], CLOCKS, 4).payload)
    own.settled()
    own.stop()
    own.config = msgspec.structs.replace(own.config, embedded=Embedded(retention_days=3.0))
    with sqlite3.connect(own.folder / "data" / "readings.sqlite") as db:
        db.execute("DELETE FROM readings WHERE taken_at_ns < ?", (time.time_ns() - 3 * 86_400 * S,))
    db.close()
    own.start()
    verdict = own.json("/v1/verify")
    assert isinstance(verdict, dict)
    assert verdict["ok"], verdict
    assert [(a["sink"], a["stored"], a["expired"]) for a in verdict["sinks"]] == [
        ("embedded", 4, 8), ("archive", 12, 0),
    ]  # fmt: skip


def test_verify_counts_influxdb_too(
    tmp_path: Path, influxdb_server: run.InfluxDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TEST_INFLUX", influxdb_server.token)
    influx = InfluxDB(
        url=influxdb_server.url,
        org=influxdb_server.org,
        bucket=f"api-{time.time_ns()}",
        token_env="API_TEST_INFLUX",
    )
    running = Running(tmp_path, influxdb=influx).start()
    try:
        fill(running)
        verdict = running.json("/v1/verify")
        assert isinstance(verdict, dict)
        assert verdict["ok"], verdict
        assert {a["sink"]: a["stored"] for a in verdict["sinks"]} == dict.fromkeys(
            ("embedded", "archive", "influxdb"), SCANS * 4 + 4
        )
    finally:
        running.stop()


# --- the command line ---


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: bytes
    stderr: bytes


def headgate_cloud(*arguments: str, environment: dict[str, str] | None = None) -> Done:
    """The command in this process: it takes a second to start one."""
    done = CliRunner().invoke(
        main, arguments, env={"HEADGATE_OPERATOR_TOKEN": OPERATOR, **(environment or {})}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout_bytes, done.stderr_bytes)


def remotely(server: Running) -> tuple[str, ...]:
    return ("--url", f"http://127.0.0.1:{server.port}")


def test_replay_gives_a_running_servers_sink_again_what_is_missing_in_it(own: Running) -> None:
    fill(own, poison=0)
    since = ("replay", "--sink", "embedded", "--from", "-1d", *remotely(own))
    would = headgate_cloud(*since, "--dry-run")
    assert would.returncode == 0, would.stderr
    assert would.stdout.startswith(b"to be given: ")
    with sqlite3.connect(own.folder / "data" / "readings.sqlite") as db:
        db.execute("DELETE FROM readings WHERE seq BETWEEN 2 AND 9")
    db.close()
    assert headgate_cloud("verify", *remotely(own)).returncode == 1
    done = headgate_cloud(*since, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["sink"], told["dry_run"], told["left"], told["corrected_readings"]) == (
        "embedded",
        False,
        0,
        0,
    )
    assert told["journal_readings"] > 0
    assert headgate_cloud("verify", *remotely(own)).returncode == 0
    wrong = headgate_cloud("replay", "--sink", "influxdb", "--from", "-1d", "--yes", *remotely(own))
    assert wrong.returncode == 1
    assert b"sink 'influxdb' is not running here; there is embedded, archive" in wrong.stderr + wrong.stdout


def test_the_command_line_asks_a_server_by_its_address(server: Running) -> None:
    found = headgate_cloud("gateways", "--json", *remotely(server))
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == server.json("/v1/gateways")
    rows = headgate_cloud("readings", NAME, "--device", "boiler", "--json", *remotely(server))
    assert json.loads(rows.stdout) == ask_readings(server, device="boiler")
    letters = headgate_cloud("dead-letters", "list", "--json", *remotely(server))
    assert json.loads(letters.stdout) == server.json("/v1/dead-letters")
    verdict = headgate_cloud("verify", "--json", *remotely(server))
    assert verdict.returncode == 0
    assert json.loads(verdict.stdout) == server.json("/v1/verify")


def test_the_program_itself_asks_and_ends_with_the_verdict(server: Running) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cloud.cli", "verify", *remotely(server)], capture_output=True, check=False, timeout=60,
        cwd=Path(__file__).parents[1], env={**os.environ, "HEADGATE_OPERATOR_TOKEN": OPERATOR},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b" ok") == 2


def test_the_command_line_reads_the_same_from_the_files_beside_a_running_server(server: Running) -> None:
    here = ("--config", str(server.file))
    for arguments in (
        ("readings", NAME, "--json"),
        ("readings", NAME, "--json", "--store", "archive"),
        ("readings", NAME, "--format", "csv"),
        ("readings", NAME, "--from", "-2h", "--point", "flow"),
        ("dead-letters", "list"),
        ("dead-letters", "show", "1", "--json"),
        ("gateways", "--json"),
        ("verify", "--json"),
    ):
        locally, by_url = headgate_cloud(*arguments, *here), headgate_cloud(*arguments, *remotely(server))
        assert locally.returncode == by_url.returncode == 0, (locally.stderr, by_url.stderr)
        assert locally.stdout == by_url.stdout
        assert locally.stdout


def test_a_table_that_ends_at_its_limit_says_that_there_may_be_more(server: Running) -> None:
    for where in (("--config", str(server.file)), remotely(server)):
        cut = headgate_cloud("readings", NAME, "--limit", "3", *where)
        assert cut.stdout.count(b"\n") == 4
        assert b"the first 3" in cut.stderr
        assert b"--from -15m" in cut.stderr
        assert headgate_cloud("readings", NAME, *where).stderr == b""


def test_the_command_line_works_on_the_files_of_a_stopped_server(own: Running) -> None:
    fill(own)
    own.stop()
    here = ("--config", str(own.file))
    verdict = headgate_cloud("verify", *here)
    assert verdict.returncode == 0, verdict.stderr
    assert verdict.stdout.count(b" ok") == 2
    assert headgate_cloud("gateways", *here).returncode == 0
    with sqlite3.connect(own.folder / "data" / "readings.sqlite") as db:
        db.execute("INSERT INTO readings SELECT point_id, taken_at_ns, epoch, seq + 1000000, value, text, reason,"
                   " clock_synchronized, received_at_ns FROM readings LIMIT 20")  # fmt: skip
    db.close()
    wrong = headgate_cloud("verify", *here)
    assert wrong.returncode == 1
    assert b"WRONG" in wrong.stdout
    dropped = headgate_cloud("dead-letters", "drop", "--sink", "archive", "--yes", *here)
    assert dropped.stdout == b"1 dropped\n", dropped.stderr
    replay = headgate_cloud("dead-letters", "replay", "--sink", "embedded", *here)
    assert replay.returncode == 1
    assert b"is headgate-cloud running" in replay.stderr


def test_the_command_line_replays_by_the_running_server(own: Running) -> None:
    fill(own)
    third = packing("third", OTHER)
    frame = encode_scan(third, Scan(80 * S, OTHER, [7, 8]), boot=1)
    own.ingest(seal(NAME, EPOCH, 501, [frame], [third.layout], CLOCKS, 2).payload)
    own.settled()
    (_, limited) = letters_of(own, "embedded")
    done = headgate_cloud("dead-letters", "replay", str(limited["id"]), "--config", str(own.file))
    assert (done.returncode, done.stdout) == (0, b"1 delivered, 0 refused again, 0 unknown\n"), done.stderr
    again = headgate_cloud("dead-letters", "replay", "--sink", "embedded", "--json", *remotely(own))
    assert again.returncode == 1
    assert len(json.loads(again.stdout)["refused"]) == 1


def test_arrow_and_csv_from_the_command_line_are_files_as_from_the_server(server: Running) -> None:
    arrow = headgate_cloud("readings", NAME, "--format", "arrow", *remotely(server))
    assert pa.ipc.open_stream(arrow.stdout).read_all().num_rows == SCANS * 4 + 4
    text = headgate_cloud("readings", NAME, "--format", "csv", *remotely(server))
    assert text.stdout == server.ask(f"/v1/readings?gateway={NAME}&format=csv")[1]


@pytest.mark.parametrize(
    ("arguments", "environment", "word"),
    [
        (("gateways",), {}, "--config"),
        (("gateways", "--url", "http://127.0.0.1:9"), {}, "is headgate-cloud running there"),
        (("gateways", "--url", "http://cloud.example:8080"), {}, "https://"),
        (("gateways", "--url", "cloud.example"), {}, "https://host:port"),
        (("gateways", "--url", "http://127.0.0.1:9"), {"HEADGATE_OPERATOR_TOKEN": ""}, "--token-file"),
        (("dead-letters", "drop", "--yes"), {}, "IDs"),
        (("readings", NAME, "--from", "soon", "--url", "http://127.0.0.1:9"), {}, "-15m"),
    ],
)
def test_a_wrong_call_is_told_what_is_right(
    arguments: tuple[str, ...], environment: dict[str, str], word: str
) -> None:
    done = headgate_cloud(*arguments, environment=environment)
    assert done.returncode != 0
    assert word in done.stderr.decode()


def test_a_wrong_token_is_refused_and_told(server: Running) -> None:
    done = headgate_cloud(
        "gateways", *remotely(server), environment={"HEADGATE_OPERATOR_TOKEN": "not-the-operators-token"}
    )
    assert done.returncode == 1
    assert b"operator's token" in done.stderr


def test_nothing_is_made_where_nothing_was(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text(f'[server]\ndata_dir = "{tmp_path}/data"\n')
    (tmp_path / "data").mkdir()
    for arguments in (("gateways",), ("readings", NAME), ("verify",), ("dead-letters", "list")):
        done = headgate_cloud(*arguments, "--config", str(file))
        assert done.returncode == 1
        assert list((tmp_path / "data").iterdir()) == []
    assert stat.S_ISDIR((tmp_path / "data").stat().st_mode)


# --- times and cells ---


@given(st.integers(0, times.MAX_NS))
def test_a_time_written_is_read_back_to_the_nanosecond(ns: int) -> None:
    assert times.parse(times.iso(ns), 0) == ns


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("2026-11-23", 1_795_392_000 * S), ("2026-11-23T10:00:00Z", 1_795_428_000 * S),
        ("2026-11-23T11:00:00+01:00", 1_795_428_000 * S), ("2026-11-23T10:00:00.5", 1_795_428_000 * S + S // 2),
        ("1795428000000000000", 1_795_428_000 * S), ("now", 5000 * S), ("-15m", 4100 * S), ("-1w", 0),
    ],
)  # fmt: skip
def test_times_are_read_as_people_write_them(text: str, ns: int) -> None:
    assert times.parse(text, 5000 * S) == ns


@pytest.mark.parametrize(
    "text", ["", "x", "-5", "-5y", "2026-13-01", "1969-01-01", "9" * 30, "12:00", "2300-01-01"]
)
def test_what_is_no_time_is_refused_with_what_is_one(text: str) -> None:
    with pytest.raises(times.TimeError):
        times.parse(text, 5000 * S)


@given(st.text(max_size=20))
def test_no_text_cell_starts_a_formula_and_none_is_changed_otherwise(text: str) -> None:
    cell = formats.safe_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell in (text, f"'{text}")
