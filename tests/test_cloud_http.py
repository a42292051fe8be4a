"""The HTTP door, on a real uvicorn and a real journal, spoken to byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import uvicorn

from cloud import http
from cloud.http import Asgi, Credentials, HttpDoor, Receive, Scope, Send
from cloud.intake import MAX_STATE_BYTES, Intake
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from config.agent import Uplink
from sync.https import HttpsUplink
from sync.identity import GatewayName, Secret
from sync.uplink import BatchRefused, LinkDown, RetryLater
from sync.wire import MAX_BATCH_BYTES, Ack, Nack, Reply, Sealed, decode_reply
from tests.fakes.batches import EPOCH, GATEWAY, batch, forged, from_the_future, largest_batch, spoilt
from tests.servers.process import free_port

TOKEN, OTHER_TOKEN = "a-token-that-is-long-enough", "another-token-long-enough"
SPOILT = spoilt()


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool

    @property
    def reply(self) -> Reply:
        return decode_reply(self.body)


async def rest(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"rest"})


class Door:
    """A running door."""

    def __init__(
        self, journal: SqliteJournal, port: int, *, max_inflight: int = 4096, app: Asgi = rest
    ) -> None:
        self.journal, self.port = journal, port
        self.metrics = Metrics()
        intake = Intake(journal, journal, self.metrics, max_inflight=max_inflight)
        tokens = {
            GatewayName("acme", "plant-1"): Secret(TOKEN),
            GatewayName("acme", "plant-2"): Secret(OTHER_TOKEN),
        }
        self.door = HttpDoor(intake, Credentials(tokens), self.metrics, app)
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.door, port=port, log_config=None, access_log=False, lifespan="off", http="httptools"
            )
        )

    async def post(
        self,
        body: bytes,
        *,
        path: str = "/v1/ingest",
        gateway: str | None = GATEWAY,
        token: str | None = TOKEN,
        method: str = "POST",
    ) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        if gateway is not None:
            lines.append(f"Headgate-Gateway: {gateway}")
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        return await self.speak("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def speak(self, data: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            return await answer(reader)
        finally:
            writer.close()

    async def stored(self) -> list[tuple[str, int, int]]:
        entries = await self.journal.read(0, max_entries=1000, max_bytes=2**27)
        return [(e.gateway, e.first, e.last) for e in entries]


async def answer(reader: asyncio.StreamReader) -> Answer:
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(status.split()[1]), headers, body, headers.get("connection") == "close")


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path / "journal.db", commit_interval_s=0.0)
    await journal.open()
    yield journal
    await journal.close()


async def running(door: Door) -> AsyncIterator[Door]:
    serving = asyncio.create_task(door.server.serve())
    async with asyncio.timeout(20):
        while not door.server.started:  # noqa: ASYNC110 - the flag is uvicorn's
            await asyncio.sleep(0.01)
    yield door
    door.server.should_exit = True
    await serving


@pytest.fixture
async def door(journal: SqliteJournal) -> AsyncIterator[Door]:
    async for up in running(Door(journal, free_port())):
        yield up


async def test_a_batch_is_acknowledged_and_in_the_journal(door: Door) -> None:
    answered = await door.post(batch(1))
    assert answered.status == 200
    assert isinstance(answered.reply, Ack)
    assert answered.reply.ranges == ((1, 3),)
    assert answered.reply.cloud_ns > 0
    assert await door.stored() == [(GATEWAY, 1, 3)]


async def test_a_duplicate_is_409_with_an_ack_and_an_overlap_is_200(door: Door) -> None:
    assert (await door.post(batch(1))).status == 200
    again = await door.post(batch(1))
    assert again.status == 409
    assert again.reply == Ack(EPOCH, ((1, 3),), again.reply.cloud_ns if isinstance(again.reply, Ack) else 0)
    assert (await door.post(batch(2, 4))).status == 200
    assert await door.stored() == [(GATEWAY, 1, 3), (GATEWAY, 2, 5)]


@pytest.mark.parametrize(
    ("gateway", "token"),
    [
        (None, TOKEN), (GATEWAY, None), (GATEWAY, "wrong"), (GATEWAY, ""), (GATEWAY, OTHER_TOKEN),
        ("acme/nobody", TOKEN), ("acme/nobody", ""), ("", ""), (GATEWAY.upper(), TOKEN), (GATEWAY, TOKEN[:-1]),
    ],
)  # fmt: skip
async def test_without_the_right_credential_the_answer_is_401_and_does_not_say_why(
    door: Door, gateway: str | None, token: str | None
) -> None:
    answered = await door.post(batch(1), gateway=gateway, token=token)
    assert answered.status == 401
    assert answered.headers["www-authenticate"].startswith("Bearer")
    assert answered.body == (await door.post(b"", gateway=None, token=None)).body
    assert door.metrics.unauthorized == 2
    assert await door.stored() == []


async def test_a_valid_gateway_cannot_send_in_anothers_name(door: Door) -> None:
    answered = await door.post(batch(1), gateway="acme/plant-2", token=OTHER_TOKEN)
    assert answered.status == 403
    assert isinstance(answered.reply, Nack)
    assert answered.reply.code == "identity"
    assert await door.stored() == []


@pytest.mark.parametrize("name", SPOILT)
async def test_bad_input_gets_a_nack_and_harms_nothing(door: Door, name: str) -> None:
    spoilt_batch, code = SPOILT[name]
    answered = await door.post(spoilt_batch)
    assert answered.status == (413 if code == "size" else 400)
    assert isinstance(answered.reply, Nack)
    assert answered.reply.code == code
    assert door.metrics.refused == {code: 1}
    assert (await door.post(batch(1))).status == 200
    assert await door.stored() == [(GATEWAY, 1, 3)]


@pytest.mark.parametrize("newer", from_the_future().values(), ids=from_the_future())
async def test_a_version_not_read_yet_is_asked_to_come_again(door: Door, newer: bytes) -> None:
    answered = await door.post(newer)
    assert answered.status == 503
    assert int(answered.headers["retry-after"]) >= 60
    assert isinstance(answered.reply, Nack)
    assert answered.reply.code == "version"


async def test_the_largest_batch_passes(door: Door) -> None:
    assert (await door.post(largest_batch())).status == 200


HEAD = (
    f"POST /v1/ingest HTTP/1.1\r\nHost: x\r\nHeadgate-Gateway: {GATEWAY}\r\nAuthorization: Bearer {TOKEN}\r\n"
).encode()


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(door: Door) -> None:
    answered = await door.speak(HEAD + f"Content-Length: {MAX_BATCH_BYTES + 1}\r\n\r\n".encode())
    assert answered.status == 413
    assert answered.closed
    assert isinstance(answered.reply, Nack)
    assert answered.reply.code == "size"


async def test_a_body_without_a_length_is_cut_off_where_it_gets_too_large(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    sent = 0
    try:
        while sent < 64 * 2**20:  # it would go on for ever
            writer.write(chunk)
            sent += 65536
            await asyncio.wait_for(writer.drain(), 20)
            if reader.at_eof() or door.metrics.refused:
                break
    except ConnectionError:
        pass
    assert door.metrics.refused == {"size": 1}
    assert sent < 16 * 2**20
    writer.close()
    assert (await door.post(batch(1))).status == 200


async def test_a_chunked_batch_is_taken(door: Door) -> None:
    sent = batch(1)
    chunks = b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in (sent[:50], sent[50:]))
    answered = await door.speak(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answered.status == 200


async def test_a_body_that_does_not_come_is_not_waited_for(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.1)
    answered = await door.speak(HEAD + b"Content-Length: 1000\r\n\r\nonly this")
    assert answered.status == 408
    assert door.metrics.door_drops == {"slow_body": 1}


async def test_a_sender_that_goes_away_in_the_middle_leaves_nothing(door: Door) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\nonly this")
    await writer.drain()
    writer.close()
    async with asyncio.timeout(20):
        while not door.metrics.door_drops:  # noqa: ASYNC110 - a counter
            await asyncio.sleep(0.01)
    assert door.metrics.door_drops == {"disconnect": 1}
    assert await door.stored() == []


async def test_many_at_once_share_commits_and_each_gets_its_own_answer(journal: SqliteJournal) -> None:
    async for door in running(Door(journal, free_port())):
        before = journal.commits
        answers = await asyncio.gather(*(door.post(batch(1 + 3 * n)) for n in range(100)))
        assert {a.status for a in answers} == {200}
        ranges = {r for a in answers if isinstance(a.reply, Ack) for r in a.reply.ranges}
        assert ranges == {(1 + 3 * n, 3 + 3 * n) for n in range(100)}
        assert journal.commits - before < 100


async def test_too_much_under_way_is_429_with_retry_after(journal: SqliteJournal) -> None:
    async for door in running(Door(journal, free_port(), max_inflight=1)):
        statuses = [a.status for a in await asyncio.gather(*(door.post(batch(1 + 3 * n)) for n in range(30)))]
        assert set(statuses) <= {200, 429}
        assert 200 in statuses
        assert door.metrics.retry["busy"] == statuses.count(429)
        assert len(await door.stored()) == statuses.count(200)


async def test_a_full_journal_is_503_with_retry_after_and_recovers(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "full.db", max_bytes=2**22, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    async for door in running(Door(journal, free_port())):

        def large(n: int) -> bytes:
            return forged(bytes(200_000), raw_bytes=200_000, compression=0, first=n, last=n)

        n = 1
        while (answered := await door.post(large(n))).status == 200:
            n += 1
        assert answered.status == 503
        assert int(answered.headers["retry-after"]) >= 1
        assert isinstance(answered.reply, Nack)
        assert answered.reply.retry_after_s
        await journal.commit("s", n)
        await journal.trim(["s"], keep_s=0, max_bytes=0)
        assert (await door.post(large(n))).status == 200
    await journal.close()


async def test_heartbeats_are_kept_and_bad_ones_refused(door: Door) -> None:
    assert (await door.post(b'{"n": 1}', path="/v1/state")).status == 204
    assert (await door.post(b"[1]", path="/v1/state")).status == 400
    assert (await door.post(b"x" * (MAX_STATE_BYTES + 1), path="/v1/state")).status == 413
    assert (await door.post(b"{}", path="/v1/state", token="wrong")).status == 401
    [state] = await door.journal.states()
    assert (state.gateway, state.state) == (GATEWAY, b'{"n": 1}')


async def test_only_post_is_taken_and_other_paths_belong_to_the_application(door: Door) -> None:
    assert (await door.post(b"", method="GET")).status == 405
    assert (await door.post(b"", path="/v1/other", token=None)).body == b"rest"


async def test_while_closing_senders_are_asked_to_come_again(door: Door) -> None:
    door.door.closing = True
    answered = await door.post(batch(1))
    assert answered.status == 503
    assert answered.headers["retry-after"] == "1"


async def test_the_agents_uplink_and_the_door_understand_each_other(door: Door) -> None:
    def uplink(token: str) -> HttpsUplink:
        settings = Uplink(kind="https", host="127.0.0.1", port=door.port, tls=False)
        return HttpsUplink(GatewayName("acme", "plant-1"), settings, Secret(token))

    good = uplink(TOKEN)
    await good.open()
    for _ in range(2):
        ack = await good.send(Sealed(EPOCH, 1, 3, batch(1)))
        assert ack.ranges == ((1, 3),)
    with pytest.raises(BatchRefused) as refused:
        await good.send(Sealed(EPOCH, 4, 6, batch(4)[:-1]))
    assert refused.value.code == "crc"
    door.door.closing = True
    with pytest.raises(RetryLater):
        await good.send(Sealed(EPOCH, 4, 6, batch(4)))
    door.door.closing = False
    await good.report(b'{"a": 1}')
    await good.close()
    wrong = uplink("not-the-right-token")
    await wrong.open()
    with pytest.raises(LinkDown, match="credential"):
        await wrong.send(Sealed(EPOCH, 4, 6, batch(4)))
    await wrong.close()
