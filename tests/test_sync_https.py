"""The HTTPS uplink at its edges: every status and what it means, TLS, idle connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn

from config.agent import Uplink as UplinkSettings
from sync.https import HttpsUplink, retry_after_s
from sync.identity import IdentityError, Secret
from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater, UplinkError
from sync.wire import Ack, Nack, encode_reply
from tests.fakes.cloud_door import FarSide, HttpServer, until
from tests.uplink_conformance import EPOCH, GATEWAY, TOKEN, batch, covers

Message = MutableMapping[str, Any]


class Scripted:
    """A server that answers one thing."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.requests: list[tuple[str, dict[bytes, bytes]]] = []
        self.port = 0

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["path"] == "/healthz":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        while (await receive()).get("more_body"):
            pass
        self.requests.append((scope["path"], dict(scope["headers"])))
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture
async def scripted(free_port: Callable[[], int]) -> AsyncIterator[Scripted]:
    app = Scripted()
    app.port = free_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=app.port, log_level="critical", lifespan="off", timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    yield app
    server.should_exit = True
    await task


def uplink_to(
    port: int, *, tls: bool = False, host: str = "127.0.0.1", ca_file: str | None = None
) -> HttpsUplink:
    settings = UplinkSettings(kind="https", host=host, port=port, tls=tls, ca_file=ca_file, ack_timeout_s=5.0)
    return HttpsUplink(GATEWAY, settings, TOKEN)


async def refused(scripted: Scripted) -> UplinkError:
    uplink = uplink_to(scripted.port)
    await uplink.open()
    with pytest.raises(UplinkError) as caught:
        await uplink.send(batch(1))
    await uplink.close()
    assert TOKEN.reveal() not in str(caught.value)
    return caught.value


NACK = encode_reply(Nack(EPOCH, 1, 3, "body", "it does not decode"))


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (200, b"<html>welcome</html>", LinkDown, "is a proxy in between"),
        (200, encode_reply(Ack(EPOCH, ((50, 60),))), AckTimeout, "does not cover"),
        (200, encode_reply(Ack(EPOCH + 1, ((1, 3),))), AckTimeout, "does not cover"),
        (301, b"", LinkDown, "301"),
        (400, b"bad request", LinkDown, "400"),
        (401, b"", LinkDown, "check the token"),
        (403, b"", LinkDown, "check the token"),
        (404, b"", LinkDown, "check host and port"),
        (405, b"", LinkDown, "405"),
        (408, b"", AckTimeout, "gave up"),
        (500, b"", RetryLater, "500"),
        (502, b"", RetryLater, "502"),
        (504, b"", RetryLater, "504"),
    ],
)
async def test_every_answer_means_something(
    scripted: Scripted, status: int, body: bytes, kind: type[UplinkError], says: str
) -> None:
    scripted.status, scripted.body = status, body
    error = await refused(scripted)
    assert type(error) is kind
    assert says in str(error)


@pytest.mark.parametrize("status", [400, 422])
async def test_a_refusal_for_good_carries_the_clouds_word(scripted: Scripted, status: int) -> None:
    scripted.status, scripted.body = status, NACK
    error = await refused(scripted)
    assert isinstance(error, BatchRefused)
    assert (error.code, str(error)) == ("body", "it does not decode")


async def test_too_large_is_a_refusal_whoever_says_it(scripted: Scripted) -> None:
    scripted.status, scripted.body = 413, b"nginx"
    error = await refused(scripted)
    assert isinstance(error, BatchRefused)
    assert error.code == "size"


@pytest.mark.parametrize("status", [429, 503])
async def test_a_wait_is_taken_from_the_nack_then_the_header_then_a_default(
    scripted: Scripted, status: int
) -> None:
    scripted.status = status
    scripted.headers = [(b"retry-after", b"9")]
    scripted.body = encode_reply(Nack(EPOCH, 1, 3, "full", "the journal is full", 2.5))
    error = await refused(scripted)
    assert isinstance(error, RetryLater)
    assert error.after_s == 2.5
    scripted.body = b"shutting down\n"
    error = await refused(scripted)
    assert isinstance(error, RetryLater)
    assert error.after_s == 9.0
    scripted.headers = []
    error = await refused(scripted)
    assert isinstance(error, RetryLater)
    assert error.after_s == 5.0


def test_retry_after_may_be_a_number_or_a_date_and_is_bounded() -> None:
    assert retry_after_s("7") == 7.0
    assert retry_after_s("-3") == 0.0
    assert retry_after_s("999999999") == 3600.0
    assert 55 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after_s(formatdate(time.time() - 60, usegmt=True)) == 0.0
    assert retry_after_s("soon") == retry_after_s(None) == retry_after_s("nan-ish") == 5.0


async def test_the_request_says_who_and_what_it_is(scripted: Scripted) -> None:
    scripted.body = encode_reply(Ack(EPOCH, ((1, 3),)))
    uplink = uplink_to(scripted.port)
    await uplink.open()
    await uplink.send(batch(1))
    await uplink.report(b"{}")
    await uplink.close()
    [(path, headers), (state_path, state_headers)] = scripted.requests
    assert (path, state_path) == ("/v1/ingest", "/v1/state")
    assert headers[b"authorization"] == f"Bearer {TOKEN.reveal()}".encode()
    assert headers[b"headgate-gateway"] == b"acme/plant-1"
    assert headers[b"content-type"] == b"application/x-headgate-batch"
    assert state_headers[b"content-type"] == b"application/json"


async def test_an_idle_connection_that_the_server_closed_costs_nothing(scripted: Scripted) -> None:
    scripted.body = encode_reply(Ack(EPOCH, ((1, 3),)))
    uplink = uplink_to(scripted.port)
    await uplink.open()
    for _ in range(3):
        assert covers(await uplink.send(batch(1)), batch(1))
        await asyncio.sleep(1.3)  # the server closes after one second of idleness
    await uplink.close()


# --- TLS ---


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert = authority.issue_cert("localhost")
    cert.private_key_pem.write_to_path(folder / "key.pem")
    cert.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "ca.pem")


@pytest.fixture
async def secure(
    certificate: tuple[str, str, str], free_port: Callable[[], int]
) -> AsyncIterator[tuple[HttpServer, str]]:
    cert, key, ca = certificate
    server = HttpServer(FarSide(), GATEWAY, TOKEN, free_port(), tls=(cert, key))
    await server.start()
    yield server, ca
    await server.stop()


async def test_tls_is_verified_and_then_used(secure: tuple[HttpServer, str]) -> None:
    server, ca = secure
    uplink = uplink_to(server.port, tls=True, host="localhost", ca_file=ca)
    await uplink.open()
    assert covers(await uplink.send(batch(1)), batch(1))
    await uplink.close()


async def test_an_unknown_authority_or_another_host_ends_the_matter(
    secure: tuple[HttpServer, str], tmp_path: Path
) -> None:
    server, ca = secure
    for host, ca_file in (("localhost", None), ("127.0.0.1", ca)):
        with pytest.raises(LinkDown, match="TLS: "):
            await uplink_to(server.port, tls=True, host=host, ca_file=ca_file).open()
    with pytest.raises(LinkDown, match=r"nowhere\.pem"):
        await uplink_to(server.port, tls=True, host="localhost", ca_file=str(tmp_path / "nowhere.pem")).open()


async def test_tls_to_a_plain_server_fails_and_plaintext_is_never_tried(scripted: Scripted) -> None:
    with pytest.raises(LinkDown):
        await uplink_to(scripted.port, tls=True, host="localhost").open()
    assert scripted.requests == []


@pytest.mark.parametrize("token", ["é" * 20, "0123456789\n0123456789"])
def test_a_token_that_no_header_takes_is_refused_at_once(token: str) -> None:
    with pytest.raises(IdentityError, match="plain ASCII"):
        HttpsUplink(GATEWAY, UplinkSettings(kind="https", tls=False, host="localhost"), Secret(token))


def test_plaintext_to_anywhere_but_loopback_is_refused() -> None:
    with pytest.raises(IdentityError, match="set tls = true"):
        uplink_to(80, host="cloud.example")


async def test_the_step_that_failed_is_named(free_port: Callable[[], int]) -> None:
    with pytest.raises(LinkDown, match="connect: "):
        await uplink_to(free_port()).open()
    with pytest.raises(LinkDown, match="DNS: "):
        await uplink_to(443, tls=True, host="no-such-host.invalid").open()
