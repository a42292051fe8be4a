"""`http_poll` against real servers on loopback: what is new becomes a scan, all else a reason or nothing at all."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import logging
import random
import re
import ssl
import time
import tomllib
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme

from drivers import conformance, http_extract, http_poll
from drivers.conformance import Fault
from drivers.contract import ConfigError, DeviceUnreachable, Point, Reason, Scan, Value, ValueType, boot_ns
from drivers.http_extract import Extractor, Form, HttpPoint, pointer_steps, retry_after_s
from drivers.http_fetch import Address, FetchError, Network, _refusal, is_private, literal
from drivers.http_hosts import Hosts, Rules
from drivers.http_poll import HttpPollDriver, HttpPollOptions
from drivers.registry import build
from tests.fakes.http_station import Asked, Reply, Station, station

WAIT_S = 20  # a deadline, never a pause: the machine may be busy
P = HttpPoint
AB = (P(name="a", pointer="/a"), P(name="b", pointer="/b", type=ValueType.I32))


def documents(**held: object) -> Callable[[Asked], Reply]:
    return lambda asked: Reply(json.dumps(held).encode())


def driver_of(
    it: Station,
    path: str = "/",
    *,
    points: tuple[HttpPoint, ...] = AB,
    network: Network | None = None,
    hosts: Hosts | None = None,
    host: str = "127.0.0.1",
    **options: Any,
) -> HttpPollDriver:
    given = {"period_s": 0.1, "jitter": 0.0, "host_interval_s": 0.0, "stale_after_s": 0.0, **options}
    table = {"url": it.url(path, host), **given}
    return HttpPollDriver(
        "x",
        msgspec.convert(table, HttpPollOptions),
        points,
        network=network,
        hosts=hosts or Hosts(random.Random(1)),
        rng=random.Random(2),
    )


@asynccontextmanager
async def opened(driver: HttpPollDriver) -> AsyncIterator[AsyncIterator[Scan]]:
    await driver.connect()
    scans = driver.scans()
    try:
        yield scans
    finally:
        await scans.aclose()  # type: ignore[attr-defined]
        await driver.close()


async def following(scans: AsyncIterator[Scan]) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await anext(scans)


async def failure(driver: HttpPollDriver) -> DeviceUnreachable:
    async with opened(driver) as scans:
        with pytest.raises(DeviceUnreachable) as caught:
            await following(scans)
    return caught.value


async def nothing_comes(it: Station, scans: AsyncIterator[Scan], polls: int = 3) -> asyncio.Task[Scan]:
    """The next scan does not come while so many polls are answered."""
    coming = asyncio.ensure_future(anext(scans))
    await it.was_asked(len(it.asked) + polls)
    assert not coming.done()
    return coming


#: 127.0.0.1 stands for the public internet, 127.0.0.2 for the inside; and names lead where they are told to.
def internet(**names: str) -> Network:
    async def resolve(host: str, port: int) -> list[str]:
        if host.replace(".", "_") not in names:
            raise OSError(f"no name {host}")
        return names[host.replace(".", "_")].split()

    def judged(address: Address) -> bool:
        return str(address) != "127.0.0.1"

    return Network(resolve=resolve, is_private=judged)


PUBLIC = internet(station_example="127.0.0.1", other_example="127.0.0.1", inside_example="127.0.0.2")


# ------------------------------------------------------------------------------------------- readings


async def test_a_document_becomes_a_scan_stamped_when_it_came() -> None:
    async with station() as it:
        it.reply = documents(a=21.5, b=-7)
        driver = driver_of(it)
        before_ns = boot_ns()
        async with opened(driver) as scans:
            scan = await following(scans)
    assert scan.values == [21.5, -7]
    assert scan.reasons == {}
    assert scan.points == driver.points
    assert before_ns < scan.taken_at_ns <= boot_ns()


async def test_an_unchanged_document_is_no_reading_and_a_changed_one_is() -> None:
    async with station() as it:
        it.reply = documents(a=1, b=1)
        async with opened(driver_of(it)) as scans:
            assert (await following(scans)).values == [1.0, 1]
            coming = await nothing_comes(it, scans)
            it.reply = documents(a=2, b=1)
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [2.0, 1]


async def test_a_live_device_is_read_each_time_equal_or_not() -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(b'{"a": 1, "b": 1}', headers={"ETag": '"same"'})
        async with opened(driver_of(it, live=True)) as scans:
            got = [await following(scans) for _ in range(3)]
    assert [scan.values for scan in got] == [[1.0, 1]] * 3
    assert got[0].taken_at_ns < got[1].taken_at_ns < got[2].taken_at_ns
    assert all("if-none-match" not in asked.headers for asked in it.asked)


async def test_etag_and_last_modified_are_sent_back_and_304_is_no_reading() -> None:
    stamp = email.utils.format_datetime(datetime.now(UTC), usegmt=True)
    held = {"tag": '"one"'}

    def reply(asked: Asked) -> Reply:
        headers = {"ETag": held["tag"], "Last-Modified": stamp}
        if asked.headers.get("if-none-match") == held["tag"]:
            return Reply(status=304, headers=headers)
        return Reply(b'{"a": 1, "b": 2}' if held["tag"] == '"one"' else b'{"a": 3, "b": 4}', headers=headers)

    async with station() as it:
        it.reply = reply
        async with opened(driver_of(it)) as scans:
            assert (await following(scans)).values == [1.0, 2]
            coming = await nothing_comes(it, scans)
            held["tag"] = '"two"'
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [3.0, 4]
    assert "if-none-match" not in it.asked[0].headers
    assert it.asked[1].headers["if-none-match"] == '"one"'
    assert it.asked[1].headers["if-modified-since"] == stamp


async def test_a_document_with_the_same_time_is_not_read_again_whatever_else_changed() -> None:
    count = iter(range(10_000))
    points = (P(name="t", type=ValueType.STR, pointer="/t"), P(name="a", pointer="/a"))
    now = datetime.now(UTC).isoformat()
    held = {"t": now, "a": 5}
    async with station() as it:
        it.reply = lambda asked: Reply(json.dumps({**held, "visitors": next(count)}).encode())
        async with opened(driver_of(it, points=points, time_point="t")) as scans:
            assert (await following(scans)).values == [now, 5.0]
            coming = await nothing_comes(it, scans)
            held["t"] = later = datetime.now(UTC).isoformat()
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [later, 5.0]


@pytest.mark.parametrize("by", ["time", "last_modified"])
async def test_a_document_that_is_old_by_its_own_account_is_stale_from_the_first(by: str) -> None:
    points = (P(name="t", type=ValueType.STR, pointer="/t"), P(name="a", pointer="/a"))
    headers = {"Date": "Mon, 23 Nov 2026 12:00:00 GMT", "Last-Modified": "Mon, 23 Nov 2026 09:59:00 GMT"}
    async with station() as it:
        it.reply = lambda asked: Reply(b'{"t": "2026-11-23T10:59:00+01:00", "a": 5}', headers=headers)
        named: dict[str, Any] = {"time_point": "t"} if by == "time" else {}
        async with opened(driver_of(it, points=points, stale_after_s=7200.0, **named)) as scans:
            scan = await following(scans)
            assert scan.values == (["2026-11-23T10:59:00+01:00", None] if by == "time" else [None, None])
            assert scan.reasons[1] is Reason.STALE
        driver = driver_of(it, points=points, stale_after_s=7300.0, **named)
        async with opened(driver) as scans:
            assert (await following(scans)).values == ["2026-11-23T10:59:00+01:00", 5.0]


async def test_a_document_that_does_not_tell_the_time_it_should_is_doubted() -> None:
    points = (P(name="t", type=ValueType.STR, pointer="/t"), P(name="a", pointer="/a"))
    async with station() as it:
        it.reply = documents(t="yesterday", a=5)
        async with opened(driver_of(it, points=points, time_point="t")) as scans:
            scan = await following(scans)
    assert scan.values == ["yesterday", 5.0]
    assert scan.reasons == {1: Reason.CLOCK}


async def test_nothing_new_for_long_is_stale_once() -> None:
    async with station() as it:
        it.reply = documents(a=1, b=1)
        async with opened(driver_of(it, stale_after_s=0.4)) as scans:
            await following(scans)
            stale = await following(scans)
            assert stale.values == [None, None]
            assert stale.reasons == {0: Reason.STALE, 1: Reason.STALE}
            coming = await nothing_comes(it, scans, 6)
            it.reply = documents(a=2, b=1)
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [2.0, 1]
            assert (await following(scans)).reasons[0] is Reason.STALE


@pytest.mark.parametrize("by", ["304", "bytes", "its own time"])
async def test_a_server_that_is_back_with_the_same_document_gives_one_sign_of_life_and_no_reading(
    by: str,
) -> None:
    now = datetime.now(UTC).isoformat()

    def reply(asked: Asked) -> Reply:
        headers = {"ETag": '"one"'} if by == "304" else {}
        if "if-none-match" in asked.headers:
            return Reply(status=304, headers=headers)
        held = {"a": 1, "b": 2, "t": now, "n": len(it.asked) if by == "its own time" else 0}
        return Reply(json.dumps(held).encode(), headers=headers)

    points = (*AB, P(name="t", pointer="/t", type=ValueType.STR))
    async with station() as it:
        it.reply = reply
        driver = driver_of(it, points=points, time_point="t", stale_after_s=60.0)
        async with opened(driver) as scans:
            assert (await following(scans)).values == [1.0, 2, now]
            await conformance._ended(await nothing_comes(it, scans))
        await it.unplug()
        assert (await failure(driver)).reason is Reason.DISCONNECTED
        await it.plug()
        async with opened(driver) as scans:
            alive = await following(scans)
            assert (alive.points, list(alive.values), dict(alive.reasons)) == ((), [], {})
            coming = await nothing_comes(it, scans)
            await conformance._ended(coming)


@pytest.mark.parametrize("what", ["stale by its own account", "without a usable value", "stale by silence"])
async def test_a_server_that_is_back_with_a_document_that_was_of_no_use_gives_no_sign_of_life(
    what: str,
) -> None:
    then = datetime(2020, 1, 1, tzinfo=UTC).isoformat() if what == "stale by its own account" else None
    held = {"a": "?", "b": "?", "t": "x"} if what == "without a usable value" else {"a": 1, "b": 2, "t": then}
    points = (*AB, P(name="t", pointer="/t", type=ValueType.STR))
    async with station() as it:
        it.reply = documents(**held)
        driver = driver_of(
            it,
            points=points,
            time_point="" if what == "stale by silence" else "t",
            stale_after_s=0.4 if what == "stale by silence" else 60.0,
        )
        async with opened(driver) as scans:
            await following(scans)
            if what == "stale by silence":
                assert (await following(scans)).reasons[0] is Reason.STALE
        await it.unplug()
        await failure(driver)
        await it.plug()
        async with opened(driver) as scans:
            await conformance._ended(await nothing_comes(it, scans))


async def test_what_was_read_before_a_restart_is_not_read_again() -> None:
    async with station() as it:
        it.reply = documents(a=1, b=1)
        first = driver_of(it)
        async with opened(first) as scans:
            await following(scans)
        kept = first.remembered()
        assert kept is not None
        assert first.remembered() is None
        second = driver_of(it)
        second.recall(kept)
        async with opened(second) as scans:
            assert (await following(scans)).points == ()
            coming = await nothing_comes(it, scans)
            it.reply = documents(a=2, b=2)
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [2.0, 2]
        other = driver_of(it, "/elsewhere")  # what was learnt of another document says nothing of this one
        other.recall(kept)
        it.reply = documents(a=1, b=1)
        async with opened(other) as scans:
            assert (await following(scans)).values == [1.0, 1]


# -------------------------------------------------------------------------------------------- formats


def extracted(form: Form, body: bytes, *points: HttpPoint, charset: str = "") -> list[Value | Reason]:
    return Extractor(form, points).extract(body, charset)


JSON = Form(format="json")
#: RFC 6901, section 5: the document and what its pointers evaluate to.
RFC6901 = b"""{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4,
"i\\\\j": 5, "k\\"l": 6, " ": 7, "m~n": 8}"""


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        ("/foo/0", "bar"), ("/", 0), ("/a~1b", 1), ("/c%d", 2), ("/e^f", 3), ("/g|h", 4), ("/i\\j", 5),
        ('/k"l', 6), ("/ ", 7), ("/m~0n", 8),
    ],
)  # fmt: skip
def test_pointers_evaluate_as_the_rfc_shows(pointer: str, expected: object) -> None:
    kind = ValueType.STR if isinstance(expected, str) else ValueType.U8
    assert extracted(JSON, RFC6901, P(name="p", pointer=pointer, type=kind)) == [expected]


@pytest.mark.parametrize(
    "pointer", ["/foo/2", "/foo/-", "/foo/00", "/foo/x", "/bar", "/foo/0/0", "/foo/+1", "/foo/¹"]
)
def test_a_pointer_to_nothing_is_missing(pointer: str) -> None:
    assert extracted(JSON, RFC6901, P(name="p", pointer=pointer)) == [Reason.MISSING]


@pytest.mark.parametrize("pointer", ["foo", "/a~", "/a~2"])
def test_a_pointer_that_is_none_is_refused(pointer: str) -> None:
    with pytest.raises(ConfigError, match="point 'p'"):
        pointer_steps(pointer, "point 'p'")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("1.5", ValueType.F64, 1.5),
        ("5", ValueType.F64, 5.0),
        ('"1.5"', ValueType.F64, 1.5),
        ('" 21,5 "', ValueType.F64, Reason.DECODE),
        ("1.5", ValueType.I16, Reason.DECODE),
        ("5.0", ValueType.I16, 5),
        ("70000", ValueType.U16, Reason.OVERFLOW),
        ("9007199254740993", ValueType.F64, Reason.OVERFLOW),
        ("1e999", ValueType.F64, Reason.INFINITE),
        ("NaN", ValueType.F64, Reason.NAN),
        ("1" * 5000, ValueType.F64, Reason.FRAMING),
        ("true", ValueType.BOOL, True),
        ("0", ValueType.BOOL, False),
        ("2", ValueType.BOOL, Reason.DECODE),
        ("true", ValueType.F64, Reason.DECODE),
        ("null", ValueType.F64, Reason.MISSING),
        ('""', ValueType.F64, Reason.MISSING),
        ('"---"', ValueType.F64, Reason.DECODE),
        ("[1]", ValueType.F64, Reason.DECODE),
        ("{}", ValueType.STR, Reason.DECODE),
        ('"on"', ValueType.STR, "on"),
        ("[" * 100_000, ValueType.F64, Reason.FRAMING),
        ('{"v":' * 1000, ValueType.F64, Reason.FRAMING),
        ("1}{", ValueType.F64, Reason.FRAMING),
    ],
)
def test_a_json_value_is_of_the_points_type_or_says_why_not(
    text: str, kind: ValueType, expected: object
) -> None:
    got = extracted(JSON, f'{{"v": {text}}}'.encode(), P(name="p", pointer="/v", type=kind))
    assert got == [expected]
    assert type(got[0]) is type(expected)


HTML = Form(format="html")
PAGE = """<html><head><title>Station</title></head><body>
<p class=stamp>23.11.2026 10:50</p>
<table id=now><tr class=t><td>Luft<td>\u22123,5\u00a0°C</tr>
<tr><td>Druck<td data-raw="1013.25">1013 hPa</tr></table>
<p class=stamp>other</p>""".encode()


def test_html_is_selected_by_css_and_read_by_pattern() -> None:
    form = Form(format="html", decimal=",")
    points = (
        P(
            name="t",
            selector="#now tr.t td:nth-child(2)",
            pattern=r"([-\u2212\d,]+)".replace("\\u2212", "\u2212"),
        ),
        P(name="second", selector="#now td", nth=2, pattern=r"([\d,]+)"),
        P(name="stamp", selector="p.stamp", type=ValueType.STR),
        P(name="absent", selector="#gone"),
        P(name="beyond", selector="p.stamp", nth=3),
        P(name="attribute", selector="td[data-raw]", attribute="data-raw", type=ValueType.STR),
        P(name="no_attribute", selector="td", attribute="data-raw"),
        P(name="no_number", selector="title"),
    )
    assert extracted(form, PAGE, *points, charset="utf-8") == [
        -3.5, 3.5, "23.11.2026 10:50", Reason.MISSING, Reason.MISSING, "1013.25", Reason.MISSING, Reason.DECODE,
    ]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"   "])
def test_what_is_no_page_is_framing(body: bytes) -> None:
    assert extracted(HTML, body, P(name="p", selector="p"))[0] in (Reason.FRAMING, Reason.MISSING)


CSV = Form(format="csv", delimiter=";", comment="#")
TABLE = b"\xef\xbb\xbf# levels\nstation;time;level\nKOELN;1;280\nBONN;1;300\nBONN;2;310\nKOELN;2;\n"


def test_csv_columns_by_name_and_number_rows_first_last_and_matching() -> None:
    points = (
        P(name="last", column="station", type=ValueType.STR),
        P(name="first", column="level", row="first"),
        P(name="bonn", column="level", where_column="station", where_equals="BONN"),
        P(name="bonn_first", column=3, row="first", where_column=1, where_equals="BONN"),
        P(name="empty", column="level"),
        P(name="no_row", column="level", where_column="station", where_equals="MAINZ"),
        P(name="no_column", column="flow"),
        P(name="no_number", column=9),
    )
    missing = Reason.MISSING
    assert extracted(CSV, TABLE, *points) == [
        "KOELN",
        280.0,
        310.0,
        300.0,
        missing,
        missing,
        missing,
        missing,
    ]


def test_csv_without_a_header_with_lines_before_and_with_a_name_that_stands_twice() -> None:
    bare = Form(format="csv", header=False, skip_lines=2)
    assert extracted(bare, b"made by\nx\n1,2\n3,4\n", P(name="p", column=2)) == [4.0]
    twice = Form(format="csv")
    assert extracted(twice, b"a,a,b\n1,2,3\n", P(name="p", column="a"), P(name="q", column="b")) == [
        Reason.MISSING,
        3.0,
    ]
    assert extracted(twice, b'a\n"1', P(name="p", column="a")) == [Reason.FRAMING]
    assert extracted(twice, b"a\n\xff\n", P(name="p", column="a")) == [Reason.FRAMING]


def test_text_is_read_by_pattern_in_time_that_no_text_can_stretch() -> None:
    text = Form(format="text")
    body = b"charge: 97 %\nload : 1.5\n"
    points = (
        P(name="charge", pattern=r"charge: (\d+) %", type=ValueType.U8),
        P(name="load", pattern=r"load\s*: (?P<value>\S+)"),
        P(name="gone", pattern=r"volts: (\d+)"),
    )
    assert extracted(text, body, *points) == [97, 1.5, Reason.MISSING]
    begun_s = time.monotonic()
    evil = Extractor(text, [P(name="p", pattern=r"(a+)+$")])
    assert evil.extract(b"a" * 50_000 + b"b") == [Reason.MISSING]
    assert time.monotonic() - begun_s < 5  # Python's own engine would take longer than the sun has


@pytest.mark.parametrize(
    ("form", "point", "says"),
    [
        (JSON, P(name="p"), "give it pointer"),
        (JSON, P(name="p", selector="a"), "selector does not belong"),
        (HTML, P(name="p", pointer="/a"), "pointer does not belong"),
        (HTML, P(name="p", selector="p["), "not valid CSS"),
        (HTML, P(name="p", selector="p::before"), "not valid CSS"),
        (CSV, P(name="p", column=0), "counted from 1"),
        (CSV, P(name="p", column="a", where_equals="x"), "needs where_column"),
        (Form(format="csv", header=False), P(name="p", column="a"), "header = false"),
        (Form(format="text"), P(name="p"), "give it pattern"),
        (Form(format="text"), P(name="p", pattern="x"), "no group"),
        (Form(format="text"), P(name="p", pattern="(x"), "not a valid pattern"),
        (Form(format="text", encoding="klingon"), P(name="p", pattern="(x)"), "options.encoding"),
    ],
)
def test_a_point_that_can_never_be_found_is_refused(form: Form, point: HttpPoint, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Extractor(form, [point])


@pytest.mark.parametrize(
    ("told", "form", "zone", "expected"),
    [
        ("2026-11-23T10:50:00Z", "iso", "UTC", "2026-11-23T10:50:00+00:00"),
        ("2026-11-23 10:50", "iso", "Europe/Berlin", "2026-11-23T09:50:00+00:00"),
        ("Mon, 23 Nov 2026 10:50:00 GMT", "http", "UTC", "2026-11-23T10:50:00+00:00"),
        (1795430000, "epoch_s", "UTC", "2026-11-23T10:33:20+00:00"),
        (1795430000000.0, "epoch_ms", "UTC", "2026-11-23T10:33:20+00:00"),
        ("23.07.2026 10:50", "%d.%m.%Y %H:%M", "Europe/Berlin", "2026-07-23T08:50:00+00:00"),
        ("soon", "iso", "UTC", None),
        ("nan", "epoch_s", "UTC", None),
        (-5, "epoch_s", "UTC", None),
        ("1" * 400, "epoch_s", "UTC", None),
    ],
)
def test_a_documents_own_time(told: Value, form: str, zone: str, expected: str | None) -> None:
    got = http_extract.read_time(told, http_extract.time_format(form, zone))
    assert (None if got is None else datetime.fromtimestamp(got, UTC).isoformat()) == expected


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, Reason.REFUSED), (401, Reason.REFUSED), (403, Reason.REFUSED), (404, Reason.REFUSED),
        (410, Reason.REFUSED), (429, Reason.BUSY), (500, Reason.EXCEPTION), (502, Reason.EXCEPTION),
        (503, Reason.BUSY),
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_document_has_its_reason(status: int, reason: Reason) -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(b'{"a": 1, "b": 1}', status=status)
        err = await failure(driver_of(it))
    assert err.reason is reason
    assert f"127.0.0.1 answered {status}" in str(err)


async def test_nobody_there_no_name_and_no_answer() -> None:
    async with station() as it:
        it.silent = True
        err = await failure(driver_of(it, timeout_s=0.2))
        assert (err.reason, "0.2 s" in str(err)) == (Reason.TIMEOUT, True)
        err = await failure(driver_of(it, host="gone.example", network=PUBLIC))
        assert err.reason is Reason.DISCONNECTED
    err = await failure(driver_of(it))
    assert err.reason is Reason.DISCONNECTED


async def test_a_document_that_is_none_is_framing_once() -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(b"<html>Error</html>")
        async with opened(driver_of(it)) as scans:
            scan = await following(scans)
            assert scan.reasons == {0: Reason.FRAMING, 1: Reason.FRAMING}
            coming = await nothing_comes(it, scans)
            it.reply = documents(a=1, b=1)
            assert (await asyncio.wait_for(coming, WAIT_S)).values == [1.0, 1]


async def test_a_server_that_speaks_no_http_is_framing() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        it = Station()
        it.port = server.sockets[0].getsockname()[1]
        assert (await failure(driver_of(it))).reason is Reason.FRAMING


@pytest.mark.parametrize("when", ["seconds", "date"])
async def test_retry_after_is_obeyed_also_by_the_other_devices_of_the_host(when: str) -> None:
    async with station() as it:
        hosts = Hosts(random.Random(1))
        first, second = (driver_of(it, path, hosts=hosts) for path in ("/one", "/two"))
        wait = "2" if when == "seconds" else None

        def busy(asked: Asked) -> Reply:
            at = datetime.fromtimestamp(time.time() + 2.999, UTC)
            return Reply(
                status=503, headers={"Retry-After": wait or email.utils.format_datetime(at, usegmt=True)}
            )

        it.reply = busy
        err = await failure(first)
        assert err.reason is Reason.BUSY
        it.reply = documents(a=1, b=1)
        for driver in (first, second):
            async with opened(driver) as scans:
                await following(scans)
    one, again, two = it.asked
    assert again.at_s - one.at_s > 1.9
    assert two.at_s - one.at_s > 1.9


def test_retry_after_in_both_its_forms() -> None:
    now = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
    assert retry_after_s("120", now) == 120
    assert retry_after_s("Mon, 23 Nov 2026 12:01:00 GMT", now) == 60
    assert retry_after_s("Mon, 23 Nov 2026 11:00:00 GMT", now) == 0
    for text in ("", "soon", "-5", "1.5", "9" * 30):
        assert retry_after_s(text, now) is None


async def test_failures_are_tried_again_more_and_more_slowly_up_to_eight_seconds() -> None:
    async with station() as it:
        driver = driver_of(it, period_s=1.0)
    await driver.connect()
    loop, waits = asyncio.get_running_loop(), []
    for _ in range(8):
        driver._failed(FetchError("x", Reason.TIMEOUT))
        waits.append(round(driver._next_s - loop.time()))
    await driver.close()
    assert waits == [1, 2, 4, 8, 8, 8, 8, 8]


# --------------------------------------------------------------------------------------------- limits


async def test_a_body_of_a_gigabyte_is_cut_at_the_limit_without_reading_more() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(16_384):
            yield b"x" * 65_536

    async with station() as it:
        it.reply = lambda asked: Reply(chunks=endless)
        err = await failure(driver_of(it, max_bytes=100_000))
        assert err.reason is Reason.FRAMING
        assert "larger than 100000 bytes" in str(err)
        await it.unplug()
        assert it.sent_bytes < 20_000_000  # what fits into the kernel's buffers on both sides
        await it.plug()
        it.reply = lambda asked: Reply(b"", headers={"Content-Length": str(1 << 30)})
        begun_s = time.monotonic()
        assert "larger" in str(await failure(driver_of(it)))
        assert time.monotonic() - begun_s < 5


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
async def test_a_packed_body_is_unpacked_up_to_the_limit_and_a_bomb_goes_no_further(packing: str) -> None:
    pack = gzip.compress if packing == "gzip" else zlib.compress
    async with station() as it:
        it.reply = lambda asked: Reply(pack(b'{"a": 1, "b": 2}'), headers={"Content-Encoding": packing})
        async with opened(driver_of(it)) as scans:
            assert (await following(scans)).values == [1.0, 2]
        bomb = pack(bytes(200_000_000))
        it.reply = lambda asked: Reply(bomb, headers={"Content-Encoding": packing})
        err = await failure(driver_of(it, max_bytes=100_000))
        assert "larger than 100000 bytes" in str(err)
        it.reply = lambda asked: Reply(pack(b'{"a": 1}')[:-6], headers={"Content-Encoding": packing})
        assert (await failure(driver_of(it))).reason is Reason.FRAMING
        it.reply = lambda asked: Reply(b"junk", headers={"Content-Encoding": packing})
        assert (await failure(driver_of(it))).reason is Reason.FRAMING
        it.reply = lambda asked: Reply(b"junk", headers={"Content-Encoding": "br"})
        assert "not asked for" in str(await failure(driver_of(it)))


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
async def test_what_follows_a_packed_document_is_not_gathered(packing: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield gzip.compress(b'{"a": 1, "b": 2}') if packing == "gzip" else zlib.compress(b'{"a": 1, "b": 2}')
        while True:
            yield bytes(65_536)

    async with station() as it:
        it.reply = lambda asked: Reply(headers={"Content-Encoding": packing}, chunks=chunks)
        err = await failure(driver_of(it))
        assert err.reason is Reason.FRAMING
        assert "follows" in str(err)
        assert it.sent_bytes < 32_000_000


@pytest.mark.parametrize("location", ["http://127.0.0.1:99999/", "http://a..b/", f"http://{'a' * 64}.b/"])
async def test_a_redirect_to_what_can_be_no_host_is_refused(location: str) -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(status=302, headers={"Location": location})
        assert (await failure(driver_of(it, allow_private=True))).reason is Reason.REFUSED


@pytest.mark.parametrize("tag", ['"\xe9"', '"a\tb"', f'"{"a" * 600}{{n}}"'])
async def test_an_etag_that_cannot_be_sent_back_whole_is_not_and_hides_no_document(tag: str) -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(
            b'{"a": %d, "b": 2}' % len(it.asked), headers={"ETag": tag.replace("{n}", str(len(it.asked)))}
        )
        async with opened(driver_of(it)) as scans:
            assert [(await following(scans)).values[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    assert all("if-none-match" not in asked.headers for asked in it.asked)


async def test_a_304_that_was_not_asked_for_is_framing() -> None:
    async with station() as it:
        it.reply = lambda asked: Reply(status=304)
        assert (await failure(driver_of(it))).reason is Reason.FRAMING


async def test_a_secret_that_no_header_can_carry_stops_the_device_and_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADGATE_TEST_SECRET", "s3cr\xe9t")
    async with station() as it:
        with pytest.raises(ConfigError, match="no secret that can be sent") as caught:
            await driver_of(it, auth="bearer", secret_env="HEADGATE_TEST_SECRET").connect()
    assert "s3cr" not in str(caught.value)


async def test_a_body_that_trickles_is_cut_at_the_deadline() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async with station() as it:
        it.reply = lambda asked: Reply(chunks=trickle)
        assert (await failure(driver_of(it, timeout_s=0.3))).reason is Reason.TIMEOUT


# ------------------------------------------------------------------------------- where it may not go


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("127.0.0.1", True), ("10.1.2.3", True), ("192.168.0.1", True), ("172.16.0.1", True), ("169.254.1.1", True),
        ("100.64.0.1", True), ("0.0.0.0", True), ("224.0.0.1", True), ("::1", True), ("fd00::1", True),
        ("fe80::1", True), ("::ffff:10.0.0.1", True), ("64:ff9b::a00:1", True), ("2002:a00:1::", True),
        ("64:ff9b:1::a00:1", True), ("::10.0.0.1", True), ("fec0::1", True),
        ("8.8.8.8", False), ("2606:4700::1111", False), ("64:ff9b::808:808", False), ("::ffff:8.8.8.8", False),
    ],
)  # fmt: skip
def test_which_addresses_are_private(text: str, private: bool) -> None:
    address = literal(text)
    assert address is not None
    assert is_private(address) == private


async def test_a_name_that_leads_inside_is_refused_and_nothing_is_sent_there() -> None:
    async with station() as it:
        err = await failure(driver_of(it, host="localhost"))
        assert err.reason is Reason.REFUSED
        assert "allow_private = true" in str(err)
        assert it.asked == []
        it.reply = documents(a=1, b=1)
        async with opened(driver_of(it, host="localhost", allow_private=True)) as scans:
            await following(scans)
        mixed = internet(mixed_example="127.0.0.1 127.0.0.2")
        err = await failure(driver_of(it, host="mixed.example", network=mixed, obey_robots=False))
        assert "127.0.0.2" in str(err)


async def test_a_name_is_resolved_once_and_the_address_that_was_judged_is_the_one_connected_to() -> None:
    asked = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    network = Network(resolve=rebinding, is_private=lambda address: str(address) == "127.0.0.2")
    async with station() as it:
        it.reply = documents(a=1, b=1)
        async with opened(driver_of(it, host="rebind.example", network=network, obey_robots=False)) as scans:
            assert (await following(scans)).values == [1.0, 1]
    assert asked == ["rebind.example"]
    assert it.asked[0].headers["host"] == f"rebind.example:{it.port}"


async def test_a_redirect_from_outside_to_inside_is_refused_unless_it_is_allowed() -> None:
    async with station() as outside, station() as inside:
        outside.reply = lambda asked: Reply(
            status=302, headers={"Location": f"http://inside.example:{inside.port}/"}
        )
        inside.reply = documents(a=1, b=1)
        for location in ("http://inside.example", "http://127.0.0.2", "http://[::ffff:127.0.0.2]"):
            to = f"{location}:{inside.port}/"
            outside.reply = lambda asked, to=to: Reply(status=302, headers={"Location": to})  # type: ignore[misc]
            err = await failure(driver_of(outside, host="station.example", network=PUBLIC, obey_robots=False))
            assert err.reason is Reason.REFUSED, location
            assert inside.asked == []
        names = internet(station_example="127.0.0.1", inside_example="127.0.0.1")
        outside.reply = lambda asked: Reply(
            status=302, headers={"Location": f"http://inside.example:{inside.port}/"}
        )
        allowed = driver_of(
            outside, host="station.example", network=names, allow_private=True, obey_robots=False
        )
        async with opened(allowed) as scans:
            assert (await following(scans)).values == [1.0, 1]


async def test_redirects_are_followed_up_to_a_number_and_only_to_http() -> None:
    async with station() as it:
        it.paths["/r"] = lambda asked: Reply(status=301, headers={"Location": "there?x=1"})
        it.paths["/there?x=1"] = documents(a=1, b=1)
        async with opened(driver_of(it, "/r")) as scans:
            assert (await following(scans)).values == [1.0, 1]
        it.paths["/loop"] = lambda asked: Reply(status=307, headers={"Location": "/loop"})
        assert "more than 5 redirects" in str(await failure(driver_of(it, "/loop")))
        it.paths["/file"] = lambda asked: Reply(status=302, headers={"Location": "file:///etc/passwd"})
        assert (await failure(driver_of(it, "/file"))).reason is Reason.REFUSED
        it.paths["/junk"] = lambda asked: Reply(status=302, headers={"Location": "http://[x"})
        assert (await failure(driver_of(it, "/junk"))).reason is Reason.REFUSED


async def test_a_credential_stays_with_its_origin(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret-word\n")
    async with station() as it, station() as other:
        other.reply = documents(a=1, b=1)
        it.paths["/"] = lambda asked: Reply(status=302, headers={"Location": "/same"})
        it.paths["/same"] = lambda asked: Reply(status=302, headers={"Location": other.url("/far")})
        driver = driver_of(it, auth="bearer", secret_file=str(secret), headers={"X-Key": "mine"})
        async with opened(driver) as scans:
            await following(scans)
    assert [asked.headers.get("authorization") for asked in it.asked] == ["Bearer s3cret-word"] * 2
    assert [asked.headers.get("x-key") for asked in it.asked] == ["mine"] * 2
    assert not {"authorization", "x-key", "if-none-match"} & other.asked[0].headers.keys()


@pytest.mark.parametrize(
    ("options", "header", "value"),
    [
        ({"auth": "basic", "auth_user": "me"}, "authorization", "Basic bWU6czNjcmV0"),
        ({"auth": "bearer"}, "authorization", "Bearer s3cret"),
        ({"auth": "header", "auth_header": "X-Api-Key"}, "x-api-key", "s3cret"),
    ],
)
async def test_a_credential_is_sent_and_stands_in_no_log(
    options: dict[str, Any],
    header: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("THE_SECRET", "s3cret")
    with caplog.at_level(logging.DEBUG):
        async with station() as it:
            it.reply = lambda asked: Reply(status=401)
            err = await failure(driver_of(it, secret_env="THE_SECRET", **options))
            it.reply = documents(a=1, b=1)
            driver = driver_of(it, "/?token=hidden", secret_env="THE_SECRET", **options)
            async with opened(driver) as scans:
                await following(scans)
    assert it.asked[1].headers[header] == value
    for text in (str(err), caplog.text, repr(driver), str(driver.remembered())):
        assert "s3cret" not in text
        assert "bWU6czNjcmV0" not in text
        assert "hidden" not in text


async def test_a_secret_of_the_query_is_sent_to_its_origin_and_stands_in_no_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HEADGATE_TEST_SECRET", "s3 cr&t")
    async with station() as it, station() as other:
        other.reply = documents(a=1, b=2)
        it.reply = lambda asked: Reply(status=302, headers={"Location": other.url("/there")})
        options: dict[str, Any] = {
            "auth": "query",
            "auth_query": "appid",
            "secret_env": "HEADGATE_TEST_SECRET",
        }
        async with opened(driver_of(it, "/data?q=1", **options)) as scans:
            await following(scans)
        it.reply = lambda asked: Reply(status=404)
        err = await failure(driver_of(it, "/data?q=1", **options))
    assert httpx.URL(it.asked[0].path).params == httpx.QueryParams({"q": "1", "appid": "s3 cr&t"})
    assert other.asked[0].path == "/there"
    assert "s3" not in str(err) + caplog.text


async def test_a_credential_that_is_not_there_stops_the_device(tmp_path: Path) -> None:
    missing: list[dict[str, Any]] = [
        {"secret_env": "NOBODY_SET_THIS"},
        {"secret_file": str(tmp_path / "none")},
    ]
    async with station() as it:
        for options in missing:
            driver = driver_of(it, auth="bearer", **options)
            with pytest.raises(ConfigError, match=r"secret|NOBODY"):
                await driver.connect()
            await driver.close()


async def test_tls_is_verified(tmp_path: Path) -> None:
    ca = trustme.CA()
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1", "station.example").configure_cert(served)
    trusted = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(trusted))
    async with station(served) as it:
        it.reply = documents(a=1, b=1)
        err = await failure(driver_of(it))
        assert err.reason is Reason.DISCONNECTED
        assert "certificate verify failed" in str(err)
        async with opened(driver_of(it, ca_file=str(trusted))) as scans:
            await following(scans)
        other = driver_of(it, ca_file=str(trusted), host="other.example", network=PUBLIC, obey_robots=False)
        assert "certificate" in str(await failure(other))  # the name is checked, not the address
        named = driver_of(it, ca_file=str(trusted), host="station.example", network=PUBLIC, obey_robots=False)
        async with opened(named) as scans:
            await following(scans)
        it.reply = lambda asked: Reply(status=302, headers={"Location": f"http://127.0.0.1:{it.port}/"})
        assert "https to http" in str(await failure(driver_of(it, ca_file=str(trusted))))
    driver = driver_of(it, ca_file=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="ca_file"):
        await driver.connect()


# -------------------------------------------------------------------------------------------- manners


async def test_robots_are_asked_of_public_hosts_once_and_obeyed() -> None:
    async with station() as it:
        it.paths["/robots.txt"] = lambda asked: Reply(
            b"User-agent: *\nDisallow: /private\nAllow: /private/ok\n"
        )
        it.reply = documents(a=1, b=1)
        hosts = Hosts(random.Random(1))
        public: dict[str, Any] = {"host": "station.example", "network": PUBLIC, "hosts": hosts}
        async with opened(driver_of(it, "/open", **public)) as scans:
            await following(scans)
        async with opened(driver_of(it, "/private/ok", **public)) as scans:
            await following(scans)
        err = await failure(driver_of(it, "/private/no?x=1", **public))
        assert (err.reason, "robots.txt does not allow /private/no" in str(err)) == (Reason.REFUSED, True)
        assert [asked.path for asked in it.asked] == ["/robots.txt", "/open", "/private/ok"]
        async with opened(driver_of(it, "/private/no", obey_robots=False, **public)) as scans:
            await following(scans)
        async with opened(driver_of(it, "/private/no")) as scans:  # a private address has no robots
            await following(scans)
        assert [asked.path for asked in it.asked].count("/robots.txt") == 1


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (403, True), (500, False), (503, False)])
async def test_robots_that_are_not_there_allow_and_robots_that_cannot_be_reached_forbid(
    status: int,
    allowed: bool,
) -> None:
    async with station() as it:
        it.paths["/robots.txt"] = lambda asked: Reply(status=status)
        it.reply = documents(a=1, b=1)
        driver = driver_of(it, host="station.example", network=PUBLIC)
        if allowed:
            async with opened(driver) as scans:
                await following(scans)
        else:
            err = await failure(driver)
            assert (err.reason, "RFC 9309" in str(err)) == (Reason.REFUSED, True)
            assert [asked.path for asked in it.asked] == ["/robots.txt"]


def test_robots_groups_longest_match_and_crawl_delay() -> None:
    rules = Rules(
        b"User-agent: *\nDisallow: /\n\nUser-agent: headgate\nDisallow: /a*.csv$\nAllow: /a/b\nCrawl-delay: 7\n"
    )
    assert [rules.allow(path) for path in ("/x", "/a/1.csv", "/a/1.csv?x", "/a/b.csv")] == [
        True,
        False,
        True,
        False,
    ]
    assert rules.crawl_delay_s == 7
    assert Rules(b"\xff\xfe\x00junk" * 1000).allow("/x")


async def test_devices_of_one_host_share_its_turns_with_jitter() -> None:
    async with station() as it:
        it.reply = documents(a=1, b=1)
        hosts = Hosts(random.Random(1))
        drivers = [driver_of(it, f"/{n}", hosts=hosts, host_interval_s=0.3, period_s=60.0) for n in range(4)]

        async def once(driver: HttpPollDriver) -> None:
            async with opened(driver) as scans:
                await following(scans)

        await asyncio.gather(*map(once, drivers))
    gaps = [b.at_s - a.at_s for a, b in zip(it.asked, it.asked[1:], strict=False)]
    assert all(gap > 0.29 for gap in gaps), gaps


async def test_the_period_has_jitter() -> None:
    async with station() as it:
        it.reply = documents(a=1, b=1)
        async with opened(driver_of(it, period_s=0.2, jitter=0.5)) as scans:
            await following(scans)
            coming = await nothing_comes(it, scans, 12)
            coming.cancel()
            await asyncio.wait({coming})
    gaps = [b.at_s - a.at_s for a, b in zip(it.asked, it.asked[1:], strict=False)]
    assert max(gaps) - min(gaps) > 0.05
    assert all(gap > 0.09 for gap in gaps), gaps


# -------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "ftp://x/"}, "begins with http"),
        ({"url": "http://"}, "begins with http"),
        ({"url": "http://[x/"}, "and a host"),
        ({"url": "http://me:pw@x/"}, "holds a credential"),
        ({"url": "http://x/#part"}, "never sent"),
        ({"period_s": 10.0, "stale_after_s": 5.0}, "always be stale"),
        ({"headers": {"Authorization": "x"}}, "goes into auth"),
        ({"headers": {"X": "a\r\nY: b"}}, "no header that can be sent"),
        ({"url": "http://x:99999/"}, "begins with http"),
        ({"url": "http://a..b/"}, "begins with http"),
        ({"headers": {"X:": "a"}}, "no header that can be sent"),
        ({"headers": {"X": " a "}}, "no header that can be sent"),
        ({"headers": {"If-None-Match": "x"}}, "not set here"),
        ({"auth": "header", "secret_env": "B", "auth_header": "X\r\nY"}, "options.auth_header"),
        ({"auth": "basic", "secret_env": "B", "auth_user": "a:b"}, "options.auth_user"),
        ({"auth": "bearer"}, "secret_file and secret_env"),
        ({"auth": "bearer", "secret_file": "a", "secret_env": "B"}, "secret_file and secret_env"),
        ({"auth": "basic", "secret_env": "B"}, "auth_user"),
        ({"auth": "header", "secret_env": "B"}, "auth_header"),
        ({"secret_env": "B"}, "no use"),
        ({"auth": "bearer", "secret_env": "B"}, "over http would show"),
        ({"time_point": "zz"}, "no point 'zz'"),
        ({"time_point": "a", "time_format": "soon"}, "options.time_format"),
        ({"time_zone": "Mars/Olympus"}, "options.time_zone"),
        ({"user_agent": "\u2603"}, "user_agent"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], says: str) -> None:
    given = msgspec.convert({"url": "http://x.example/", **options}, HttpPollOptions)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        HttpPollDriver("x", given, AB)
    assert "pw" not in str(caught.value)


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cssselect", None)
    with pytest.raises(ConfigError, match=r"pip install 'headgate\[scrape\]'"):
        Extractor(HTML, [P(name="p", selector="p")])


def test_every_default_of_the_sample_is_the_default_of_the_code_and_its_devices_build() -> None:
    text = Path(http_poll.__file__).with_suffix(".toml").read_text()
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE))))
    shown.pop("measurement")
    for kind in (HttpPollOptions, HttpPoint):
        for field in msgspec.structs.fields(kind):
            if field.name in shown and field.default is not msgspec.NODEFAULT:
                told = "" if field.default is None else field.default
                assert shown[field.name] == told, field.name
    inherited = {field.name for field in msgspec.structs.fields(Point)} - {"type"}
    own = {field.name for kind in (HttpPollOptions, HttpPoint) for field in msgspec.structs.fields(kind)}
    assert own - inherited - {"url"} <= shown.keys()
    for device in tomllib.loads(text)["device"]:
        assert isinstance(
            build(device["name"], "http_poll", device["options"], device["point"]), HttpPollDriver
        )


# ---------------------------------------------------------------------------------------- conformance


@pytest.mark.headgate_driver(kind=HttpPollDriver)
async def test_the_driver_conforms(headgate_check: conformance.Check) -> None:
    async with station() as it, station() as gone:
        await gone.unplug()
        held: dict[str, Value] = {"a": 1.0, "b": 1}
        state = {"garbled": False, "busy": False}

        def reply(asked: Asked) -> Reply:
            body = json.dumps(held).encode()
            return Reply(body[:-3] if state["garbled"] else body, status=503 if state["busy"] else 200)

        def change() -> None:
            held["a"], held["b"] = float(held["a"]) + 1, int(held["b"]) + 1

        def switch(name: str) -> Fault:
            return Fault(lambda: state.update({name: True}), lambda: state.update({name: False}))

        it.reply = reply

        def make(port: int) -> HttpPollDriver:
            # Built by hand, so that ten thousand polls take no longer than they must.
            options = HttpPollOptions(
                url=f"http://127.0.0.1:{port}/",
                live=True,
                period_s=0.002,
                jitter=0.0,
                host_interval_s=0.0,
                timeout_s=0.4,
            )
            return HttpPollDriver("x", options, AB, hosts=Hosts())

        await headgate_check(
            conformance.Subject(
                build=lambda: make(it.port),
                provoke=it.asked.clear,  # or what it remembers would pass for a leak
                absent=lambda: make(gone.port),
                change=change,
                truth=lambda: dict(held),
                silence=Fault(lambda: setattr(it, "silent", True), lambda: setattr(it, "silent", False)),
                faults={
                    "unplugged": Fault(it.unplug, it.plug),
                    "garbled": switch("garbled"),
                    "busy": switch("busy"),
                },
                peer_files=("*/http_station.py", "*/h11/*"),
            )
        )


def test_no_message_of_ours_holds_the_query() -> None:
    url = httpx.URL("https://station.example/data?appid=s3cret")
    assert "s3cret" not in str(_refusal(url, 404, httpx.Headers()))
