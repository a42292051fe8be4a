"""The HTTP door: `POST /v1/ingest` and `POST /v1/state`, as plain ASGI in front of the rest of the application.

Rules:
1. A credential first, then the body. Without a valid one the answer is 401 and never says what was wrong; every
   request costs one constant-time comparison, whether the gateway exists or not.
2. A body is never read beyond `MAX_BATCH_BYTES`, whatever its Content-Length says, nor beyond `BODY_TIMEOUT_S`.
3. What is answered is the same `Ack` or `Nack` that MQTT carries, with the status that a plain HTTP client expects:

   | status | body | means |
   |---|---|---|
   | 200 | ack | held, and something in it was new |
   | 409 | ack | held before: a duplicate is an ack |
   | 400 | nack | not a batch (its code says why); never send it again |
   | 401 | text | no valid credential |
   | 403 | nack | the envelope names another gateway |
   | 413 | nack | larger than a batch may be |
   | 429, 503 | nack, `Retry-After` | too much under way, or over its quota; the journal is full or cannot be
   |  |  | written; a version that this cloud does not read yet |
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias

from cloud.intake import MAX_STATE_BYTES, RETRY_BUSY_S, Arrival, Intake, StateError, Verdict
from cloud.journal.contract import JournalError, JournalFull
from cloud.metrics import Metrics
from sync.identity import GatewayName, Secret
from sync.wire import MAX_BATCH_BYTES, Ack, Nack, encode_reply

# ASGI's own shapes (asgiref's specification, "HTTP & WebSocket ASGI Message Format").
Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Asgi: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

READING: Final = 256  #: bodies read at once, 64 MiB at most; the others wait in their senders
PER_GATEWAY: Final = 128  #: requests of one gateway at once; an agent has one or a few
HOLD_BACK_S: Final = 1.0  #: how long the answer to one request too many takes
HELD_BACK: Final = 1024  #: of them at once; a request that only waits costs some 10 KB
BODY_TIMEOUT_S: Final = 30.0  #: 256 KiB at 70 kbit/s; slower is not a link but a siege
INGEST: Final = "/v1/ingest"
STATE: Final = "/v1/state"
DOOR: Final = "http"

_TEXT: Final = b"text/plain; charset=utf-8"
_REPLY: Final = b"application/vnd.headgate.reply"
_NACK_STATUS: Final = {
    "identity": 403,
    "version": 503,
    "size": 413,
    "busy": 429,
    "quota": 429,
    "full": 503,
    "journal": 503,
}


class Credentials:
    """The admitted gateways' tokens, as digests."""

    def __init__(self, tokens: Mapping[GatewayName, Secret]) -> None:
        self._digests = {
            str(name).encode(): _digest(token.reveal().encode()) for name, token in tokens.items()
        }
        self._nobody = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The gateway that these headers prove to be, or None."""
        name = token = b""
        for key, value in headers:
            if key == b"headgate-gateway":
                name = value
            elif key == b"authorization" and value[:7].lower() == b"bearer ":
                token = value[7:].strip()
        known = hmac.compare_digest(self._digests.get(name, self._nobody), _digest(token))
        return name.decode() if known else None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class HttpDoor:
    """An ASGI application: our two paths here, everything else to `rest`."""

    def __init__(self, intake: Intake, credentials: Credentials, metrics: Metrics, rest: Asgi) -> None:
        self._intake = intake
        self._credentials = credentials
        self._metrics = metrics
        self._rest = rest
        self._reading = asyncio.Semaphore(READING)
        self._under_way: dict[str, int] = {}  # requests with a batch, by gateway
        self._held_back = 0
        self.closing = False  #: set at shutdown: what comes now is asked to come again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or path not in (INGEST, STATE):
            await self._rest(scope, receive, send)
            return
        if scope["method"] != "POST":
            await _answer(send, 405, b"only POST\n", extra=((b"allow", b"POST"),))
            return
        gateway = self._credentials.admit(scope["headers"])
        if gateway is None:
            self._metrics.unauthorized += 1
            await _answer(
                send, 401, b"a valid Headgate-Gateway and bearer token are required\n",
                extra=((b"www-authenticate", b'Bearer realm="headgate"'),),
            )  # fmt: skip
            return
        if self.closing:
            await _answer(send, 503, b"shutting down\n", extra=((b"retry-after", b"1"),))
            return
        if path == INGEST:
            await self._in_turn(gateway, scope, receive, send)
        else:
            await self._state(gateway, scope, receive, send)

    async def _in_turn(self, gateway: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Whoever is over its quota, or has many requests under way, is answered without its body being looked at, and
        not at once: a client that comes again on the same connection costs one request a second, not a thousand."""
        wait_s = self._intake.quotas.wait_s(gateway, time.monotonic())
        under_way = self._under_way.get(gateway, 0)
        if wait_s <= 0 and under_way < PER_GATEWAY:
            self._under_way[gateway] = under_way + 1
            try:
                await self._ingest(gateway, scope, receive, send)
            finally:
                self._under_way[gateway] -= 1
                if not self._under_way[gateway]:
                    del self._under_way[gateway]
            return
        self._metrics.batches[DOOR] += 1
        code = "quota" if wait_s > 0 else "busy"
        self._metrics.retry[code] += 1
        if wait_s > 0:
            self._intake.quotas.refuse(gateway, time.monotonic())
        wait_s = wait_s or RETRY_BUSY_S
        if self._held_back < HELD_BACK:
            self._held_back += 1
            try:
                await asyncio.sleep(min(wait_s, HOLD_BACK_S))
            finally:
                self._held_back -= 1
        nack = Nack(0, 0, 0, code, "more than this gateway may send", wait_s)
        # An answer before the end of the body, and then a close, may reach the client as a reset: it would see a broken
        # link where it was asked to wait. What is thrown away was waiting in the kernel's buffers until now.
        whole = await _thrown_away(receive, MAX_BATCH_BYTES)
        extra = (_retry_after(wait_s), *(() if whole else ((b"connection", b"close"),)))
        await _answer(send, 429, encode_reply(nack), content_type=_REPLY, extra=extra)

    async def _ingest(self, gateway: str, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        payload = await self._body(scope, receive, send, MAX_BATCH_BYTES)
        if payload is None:
            return
        [verdict] = await self._intake.accept([Arrival(gateway, payload, started_s)], door=DOOR)
        await _reply(send, verdict)

    async def _state(self, gateway: str, scope: Scope, receive: Receive, send: Send) -> None:
        payload = await self._body(scope, receive, send, MAX_STATE_BYTES)
        if payload is None:
            return
        try:
            await self._intake.on_state(gateway, payload, door=DOOR)
        except StateError as err:
            await _answer(send, 400, f"{err}\n".encode())
        except JournalFull as err:
            await _answer(send, 503, b"no room\n", extra=(_retry_after(err.retry_after_s),))
        except JournalError:
            await _answer(send, 503, b"cannot be stored now\n", extra=(_retry_after(30.0),))
        else:
            await _answer(send, 204, b"")

    async def _body(self, scope: Scope, receive: Receive, send: Send, limit: int) -> bytes | None:
        """The whole body, or None where it was answered (or its sender has gone)."""
        for key, value in scope["headers"]:
            if key == b"content-length" and (not value.isdigit() or int(value) > limit):
                await self._too_large(send, limit)
                return None
        parts: list[bytes] = []
        size = 0
        try:
            async with self._reading, asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        self._metrics.door_drops["disconnect"] += 1
                        return None
                    part: bytes = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        break
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self._metrics.door_drops["slow_body"] += 1
            await _answer(send, 408, b"the body did not come in time\n", extra=((b"connection", b"close"),))
            return None
        await self._too_large(send, limit)
        return None

    async def _too_large(self, send: Send, limit: int) -> None:
        self._metrics.refused["size"] += 1
        nack = Nack(0, 0, 0, "size", f"more than {limit} bytes")
        await _answer(send, 413, encode_reply(nack), content_type=_REPLY, extra=((b"connection", b"close"),))


async def _reply(send: Send, verdict: Verdict) -> None:
    reply = verdict.reply
    if isinstance(reply, Ack):
        await _answer(send, 409 if verdict.duplicate else 200, encode_reply(reply), content_type=_REPLY)
        return
    extra = () if reply.retry_after_s is None else (_retry_after(reply.retry_after_s),)
    status = _NACK_STATUS.get(reply.code, 400)
    await _answer(send, status, encode_reply(reply), content_type=_REPLY, extra=extra)


async def _thrown_away(receive: Receive, most_bytes: int) -> bool:
    """Take a body and keep nothing of it; False where the client went away, or sends more than any batch has."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while size <= most_bytes:
                message = await receive()
                if message["type"] != "http.request":
                    return False
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    return False


def _retry_after(seconds: float) -> tuple[bytes, bytes]:
    # RFC 9110, 10.2.3: whole seconds.
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: bytes = _TEXT,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    headers = [*extra]
    if status != 204:
        headers += [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
