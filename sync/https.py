"""The uplink over HTTPS: `POST /v1/ingest` with a batch as its body, answered by the cloud's ack.

Rules:
1. 200 and 409 carry an ack; 413 and 400, 422 refuse for good; 429 and 503 ask to wait; 401, 403 and anything that is
   no answer of ours mean that the way is not right, and nothing is concluded about the batch.
2. TLS is verified and never downgraded; redirects are not followed; plaintext only to loopback.
3. The token goes in one header and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Final

import httpx

from config.agent import Uplink as UplinkSettings
from sync.identity import GatewayName, IdentityError, Secret, require_private
from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater
from sync.wire import Ack, Nack, Sealed, WireError, decode_reply

TLS_PORT: Final = 443
PLAIN_PORT: Final = 8080
INGEST: Final = "/v1/ingest"
STATE: Final = "/v1/state"
HEALTH: Final = "/healthz"
BATCH_TYPE: Final = "application/x-headgate-batch"
STATE_TYPE: Final = "application/json"
GATEWAY_HEADER: Final = "Headgate-Gateway"

_RETRY_S: Final = 5.0  #: where the cloud asks to wait and does not say for how long
_IDLE_S: Final = 4.0  #: below the 5 s after which common servers close an idle connection
_SEND_BUFFER: Final = (
    64 * 1024
)  #: keeps the kernel from hiding a slow line: the ack timer starts when it is written


class HttpsUplink:
    """`sync.uplink.Uplink` over HTTPS."""

    def __init__(self, gateway: GatewayName, settings: UplinkSettings, secret: Secret) -> None:
        """Raises `IdentityError` for plaintext to anywhere but loopback, and for a token that no header takes."""
        require_private("uplink.host", settings.host, tls="on" if settings.tls else "off")
        token = secret.reveal()
        if not (token.isascii() and token.isprintable()):
            raise IdentityError("uplink: the token must be one line of plain ASCII: it travels in a header")
        port = settings.port or (TLS_PORT if settings.tls else PLAIN_PORT)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.name = f"https {settings.host}:{port}"
        self._base = f"{'https' if settings.tls else 'http'}://{host}:{port}"
        self._gateway = gateway
        self._settings = settings
        self._secret = secret
        self._client: httpx.AsyncClient | None = None
        self._posting: set[asyncio.Task[httpx.Response]] = set()

    # --- the contract ---

    async def open(self) -> None:
        """There is no login to be had; asking for the cloud's health proves name, route and certificate."""
        await self.close()
        self._client = self._new_client()
        try:
            with self._translated():
                await self._client.get(HEALTH)
        except AckTimeout as err:
            await self.close()
            raise LinkDown(f"{self.name}: connected, and no answer", "silent") from err
        except BaseException:
            await self.close()
            raise

    async def send(self, batch: Sealed) -> Ack:
        response = await self._post(INGEST, batch.payload, BATCH_TYPE)
        match response.status_code:
            case 200 | 409:
                return self._ack(response, batch)
            case 401 | 403:
                raise LinkDown(
                    f"{self.name}: the cloud refuses the credential of {self._gateway} ({response.status_code});"
                    " check the token",
                    "credential",
                )
            case 413:
                raise BatchRefused(f"{self.name}: too large for the cloud", "size")
            case 429 | 503:
                nack = _nack(response)
                asked_s = nack.retry_after_s if nack else None
                raise RetryLater(
                    f"{self.name}: {nack.text if nack else response.reason_phrase}",
                    retry_after_s(response.headers.get("Retry-After")) if asked_s is None else asked_s,
                )
            case 400 | 422 if nack := _nack(response):
                raise BatchRefused(nack.text, nack.code)
            case 408:
                raise AckTimeout(f"{self.name}: the cloud gave up waiting for the request")
            case 500 | 502 | 504:
                raise RetryLater(f"{self.name}: status {response.status_code}", _RETRY_S)
            case status:
                raise LinkDown(
                    f"{self.name}: {INGEST} answers {status}: this is not Headgate's door; check host and port"
                )

    async def report(self, state: bytes) -> None:
        try:
            response = await self._post(STATE, state, STATE_TYPE)
        except AckTimeout as err:
            raise LinkDown(str(err)) from err
        if response.status_code in (401, 403):
            raise LinkDown(f"{self.name}: the cloud refuses the credential of {self._gateway}", "credential")

    async def close(self) -> None:
        client, self._client = self._client, None
        for task in self._posting:
            task.cancel()
        if client is not None:
            with contextlib.suppress(httpx.HTTPError, OSError, RuntimeError):
                await client.aclose()

    # --- within ---

    def _new_client(self) -> httpx.AsyncClient:
        verify: ssl.SSLContext | bool = True
        if self._settings.tls:
            try:
                verify = ssl.create_default_context(cafile=self._settings.ca_file)
            except (OSError, ssl.SSLError) as err:
                raise LinkDown(
                    f"{self.name}: TLS: cannot read ca_file {self._settings.ca_file}: {err}", "tls"
                ) from err
        transport = httpx.AsyncHTTPTransport(
            verify=verify,
            limits=httpx.Limits(max_connections=self._settings.window + 2, keepalive_expiry=_IDLE_S),
            socket_options=[
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            ],
        )
        return httpx.AsyncClient(
            base_url=self._base,
            transport=transport,
            headers={
                "Authorization": f"Bearer {self._secret.reveal()}",
                GATEWAY_HEADER: str(self._gateway),
                "User-Agent": "headgate",
                "Accept-Encoding": "identity",
            },
            timeout=httpx.Timeout(
                self._settings.ack_timeout_s, connect=self._settings.connect_timeout_s, pool=None
            ),
            follow_redirects=False,
            trust_env=False,
        )

    async def _post(self, path: str, body: bytes, kind: str) -> httpx.Response:
        client = self._client
        if client is None:
            raise LinkDown(f"{self.name}: not connected")
        with self._translated():
            task = asyncio.ensure_future(client.post(path, content=body, headers={"Content-Type": kind}))
            self._posting.add(task)
            try:
                return await task
            except asyncio.CancelledError as err:
                current = asyncio.current_task()
                if self._client is not client and current is not None and not current.cancelling():
                    raise LinkDown(f"{self.name}: closed") from err
                raise
            finally:
                self._posting.discard(task)

    def _ack(self, response: httpx.Response, batch: Sealed) -> Ack:
        try:
            reply = decode_reply(response.content)
        except WireError as err:
            raise LinkDown(
                f"{self.name}: {INGEST} answers what is no ack ({err}); is a proxy in between?"
            ) from err
        if (
            isinstance(reply, Ack)
            and reply.epoch == batch.epoch
            and any(a <= batch.first and batch.last <= b for a, b in reply.ranges)
        ):
            return reply
        raise AckTimeout(f"{self.name}: the answer does not cover {batch.first}..{batch.last}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's errors as ours, told by who acts."""
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as err:
            raise AckTimeout(f"{self.name}: no answer within {self._settings.ack_timeout_s:g} s") from err
        except httpx.ConnectTimeout as err:
            raise LinkDown(f"{self.name}: connect: no answer", "timeout") from err
        except httpx.ConnectError as err:
            step, cause = _step(err)
            raise LinkDown(f"{self.name}: {step}", cause) from err
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as err:
            # RuntimeError: httpx's word for a client that was closed meanwhile
            raise LinkDown(f"{self.name}: {type(err).__name__}: {err}") from err


def _step(err: httpx.ConnectError) -> tuple[str, str]:
    """Which step of connecting failed, and its cause in one word; httpx keeps the cause at the end of the chain."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            said = getattr(cause, "verify_message", "") or cause.reason or str(cause)
            return f"TLS: {said}; check uplink.ca_file, host and the clock", "tls"
        if isinstance(cause, socket.gaierror):
            return f"DNS: {cause.strerror}", "dns"
        if isinstance(cause, OSError) and cause.strerror:
            return f"connect: {cause.strerror}", "refused"
        cause = cause.__cause__ or cause.__context__
    return f"connect: {err}", "refused"


def _nack(response: httpx.Response) -> Nack | None:
    try:
        reply = decode_reply(response.content)
    except WireError:
        return None
    return reply if isinstance(reply, Nack) else None


def retry_after_s(header: str | None) -> float:
    """`Retry-After` as seconds from now: a number, or an HTTP date (RFC 9110, 10.2.3)."""
    if not header:
        return _RETRY_S
    try:
        return min(max(0.0, float(header)), 3600.0)
    except ValueError:
        pass
    try:
        return min(max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time()), 3600.0)
    except ValueError:
        return _RETRY_S
