"""Whatever a server sends: a result for each point, of its type, or a reason; no crash, bounded time and memory.

HEADGATE_FUZZ=10000000 pytest tests/test_fuzz_http.py
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import time
from collections.abc import Callable

import pytest

from drivers.conformance import _is_of
from drivers.contract import Reason, ValueType
from drivers.http_extract import Extractor, Form, HttpPoint, TimeFormat, read_time, retry_after_s, time_format
from drivers.http_hosts import Rules

FUZZ = int(os.environ.get("HEADGATE_FUZZ", "2000"))
SEED = int(os.environ.get("HEADGATE_SEED", "7"))
KINDS = [ValueType.F64, ValueType.F32, ValueType.I16, ValueType.U64, ValueType.BOOL, ValueType.STR]
P = HttpPoint
COLUMNS: list[tuple[str | int, str | int | None]] = [("a", None), (2, None), ("b", "a"), (9, 1)]

DOCUMENTS: dict[str, tuple[Form, list[HttpPoint], list[bytes]]] = {
    "json": (
        Form(format="json"),
        [P(name=f"{k}{i}", pointer=p, type=k) for k in KINDS for i, p in enumerate(["", "/a", "/b/0/c", "/b/1"])],
        [
            b'{"a": 1.5, "b": [{"c": "21.5"}, true]}', b"[1, 2, [3, [4]]]", b'{"a": null, "b": [{"c": 1e400}, NaN]}',
            b'\xef\xbb\xbf{"a": "\\ud800", "b": [{"c": -9223372036854775809}, 18446744073709551616]}',
        ],
    ),
    "html": (
        Form(format="html", decimal=","),
        [P(name=f"{k}{i}", selector=s, type=k, nth=1 + i % 2, pattern=r"([-\d,]+)" if i % 2 else "")
         for k in KINDS for i, s in enumerate(["td", "table tr:nth-child(2) td", "p.x > b", "[data-v]"])],
        [
            b"<table><tr><td>1,5<tr><td data-v=3>21,5 C</table><p class=x><b>7</b>",
            b"<html><head><meta charset=utf-16></head><body>\xff\xfe<td>\x00</td>",
            "<!doctype html><p class=x><b>\u22125</b>&#0;&#x110000;&amp".encode(),
        ],
    ),
    "csv": (
        Form(format="csv", delimiter=";", comment="#", skip_lines=1),
        [P(name=f"{k}{i}", column=c, type=k, where_column=w, where_equals="x" if w else "")
         for k in KINDS for i, (c, w) in enumerate(COLUMNS)],
        [b"made\n#c\na;b\nx;2,5\ny;3\n", b'\xef\xbb\xbf\na;a\n"1;2";3\n', b"\r\na;b\r\nx\r\n"],
    ),
    "text": (
        Form(format="text"),
        [P(name=f"{k}{i}", pattern=p, type=k) for k in KINDS
         for i, p in enumerate([r"a=(\S+)", r"(?P<value>(a|b)*c)+", r"^(.*)$", r"(x)?y"])],
        [b"a=21.5 b=7\n", b"abababc y\n\n", "a=\u0661\u0662 y".encode()],
    ),
}  # fmt: skip


def mutants(chance: random.Random, seeds: list[bytes]) -> bytes:
    """A document that once was one."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(1, 8)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0:
                data[place:place] = chance.randbytes(chance.randrange(1, 5))
            case 1:
                del data[place : place + chance.randrange(1, 9)]
            case 2 if data:
                data[place % len(data)] ^= 1 << chance.randrange(8)
            case 3:
                data[place:place] = (
                    chance.choice([b"[", b"{", b"<b>", b'"', b"\x00", b"\xff", b"1e9", b";"]) * 300
                )
            case 4:
                other = chance.choice(seeds)
                data[place:] = other[chance.randrange(len(other) + 1) :]
            case 5:
                data[place:place] = bytes(data[:200])
            case _:
                data[place:place] = chance.choice(
                    [b"nan", b"-inf", b"1_000", b"0x1F", b"9" * 500, b"\xe2\x88\x92"]
                )
    return bytes(data[:65_536])


def rss_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.timeout(0 if FUZZ > 100_000 else 120)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_any_bytes_give_each_point_a_value_of_its_type_or_a_reason(kind: str) -> None:
    form, points, seeds = DOCUMENTS[kind]
    extractor = Extractor(form, points)
    chance = random.Random(f"{SEED}/{kind}")
    print(f"seed {SEED}, {FUZZ} documents")
    seen: set[object] = set()
    before_kb = 0
    for number in range(FUZZ):
        body = mutants(chance, seeds) if number % 10 else chance.randbytes(chance.randrange(300))
        charset = chance.choice(["", "utf-8", "latin-1", "utf-16", "cp037"])
        begun_s = time.process_time()
        results = extractor.extract(body, charset)
        assert time.process_time() - begun_s < 2.0, body
        assert len(results) == len(points)
        for point, result in zip(points, results, strict=True):
            if isinstance(result, Reason):
                assert not result.has_value, body
                seen.add(result)
            else:
                assert _is_of(result, point.type), (body, point, result)
                seen.add("value")
        if number == FUZZ // 2:
            before_kb = rss_kb()
    assert rss_kb() - before_kb < 32_768
    assert {"value", Reason.MISSING, Reason.DECODE} <= seen  # it was not all refused at the door


def test_any_header_is_a_time_or_none() -> None:
    chance = random.Random(SEED)
    letters = "0123456789 -:/.,+TZGMonJuly%\u0661\x00"
    forms: list[TimeFormat] = [
        time_format(text, zone)
        for text, zone in itertools.product(
            ["iso", "http", "epoch_s", "%d.%m.%Y %H:%M"], ["UTC", "Europe/Berlin"]
        )
    ]
    for _ in range(FUZZ):
        text = "".join(chance.choices(letters, k=chance.randrange(40)))
        for form in forms:
            told = read_time(text, form)
            assert told is None or isinstance(told, float)
        wait_s = retry_after_s(text)
        assert wait_s is None or wait_s >= 0


def test_any_robots_txt_allows_or_does_not() -> None:
    chance = random.Random(SEED)
    lines = [
        b"User-agent: *",
        b"User-agent: headgate",
        b"Disallow: /",
        b"Allow: /*a*b*c$",
        b"Disallow: /%zz\xff",
        b"Crawl-delay: 1e99",
        b"Crawl-delay: nan",
        b"Request-rate: 1/0",
        b"Sitemap: x",
        b"\x00",
        b":",
    ]
    for _ in range(max(1, FUZZ // 10)):
        body = bytearray(b"\n".join(chance.choices(lines, k=chance.randrange(30))))
        for _ in range(chance.randrange(5)):
            if body:
                body[chance.randrange(len(body))] = chance.randrange(256)
        rules = Rules(bytes(body))
        assert 0 <= rules.crawl_delay_s <= 3600
        assert rules.allow("/a/b?c=%zz") in (True, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (DOCUMENTS["json"], b'{"a": ' + b"[" * n + b"]" * n + b"}"),
        lambda n: (DOCUMENTS["json"], json.dumps({"a": ["x" * 10] * (n // 14)}).encode()),
        lambda n: (DOCUMENTS["html"], b"<b>" * (n // 3)),
        lambda n: (DOCUMENTS["html"], b"<table>" + b"<tr><td>1,5" * (n // 11)),
        lambda n: (DOCUMENTS["html"], (b"<table>" + b"<tr><td>1,5" * 1_900 + b"</table>") * (n // 80_000)),
        lambda n: (DOCUMENTS["html"], b"<p class=x>" + b"<b>1" * 250 + b"</p>" * (n // 8)),
        lambda n: (DOCUMENTS["csv"], b"x\na;b\n" + b"x;2\n" * (n // 4)),
        lambda n: (DOCUMENTS["csv"], b'x\n"' + b"a" * n),
        lambda n: (DOCUMENTS["text"], b"ab" * (n // 2)),
    ],
)
def test_the_largest_document_takes_a_bounded_time(
    make: Callable[[int], tuple[tuple[Form, list[HttpPoint], list[bytes]], bytes]],
) -> None:
    (form, points, _), body = make(1_000_000)
    begun_s = time.process_time()
    Extractor(form, points).extract(body)
    took_s = time.process_time() - begun_s
    print(f"{took_s:.2f} s")
    assert took_s < 10  # measured at 0.02 to 1 s; it runs beside the event loop
