"""The operator's API from the other side: the same answers as `operator.py`, from a server by HTTP.

Rule: the token goes in a header, over TLS or to this machine only; it is in no message and no log.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from cloud.api.models import (
    DeadLetterContent,
    DeadLettersPage,
    Dropped,
    Gap,
    Gateway,
    ReadingsPage,
    Replay,
    Selection,
    SinkReplay,
    SinkReplayRequest,
    Taken,
    Verdict,
)
from cloud.api.operator import NotFound, NotNow, OperatorError
from sync.identity import IdentityError, Secret, require_private

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 60.0
VERIFY_TIMEOUT_S: Final = 3600.0  #: it counts every row

Parameters = Mapping[str, str | int | None]


class Remote:
    """A server's API. Raises `OperatorError` and its kinds."""

    def __init__(self, url: str, token: Secret, *, ca_file: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OperatorError(f"{url!r} is no address; give https://host:port")
        try:
            require_private(
                "the operator's token", parts.hostname, tls="on" if parts.scheme == "https" else "off"
            )
        except IdentityError as err:
            raise OperatorError(f"{err.args[0].split(';')[0]}; use https://") from err
        try:
            verify = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        except (OSError, ssl.SSLError) as err:
            raise OperatorError(f"{ca_file}: {err}; give the CA's certificate as PEM") from err
        self._url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=f"{self._url}/v1",
            headers={"Authorization": f"Bearer {token.reveal()}"},
            verify=verify,
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # a proxy from the environment would see the token
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def gateways(self) -> list[Gateway]:
        return await self._get("/gateways", {}, list[Gateway])

    async def gaps(self, gateway: str | None, limit: int = 1_000, *, since_ns: int = 0) -> list[Gap]:
        parameters: Parameters = {"gateway": gateway, "since": since_ns, "limit": limit}
        return await self._get("/gaps", parameters, list[Gap])

    async def page(self, parameters: Parameters) -> ReadingsPage:
        """Readings as records."""
        return await self._get("/readings", parameters, ReadingsPage)

    @asynccontextmanager
    async def stream(self, parameters: Parameters) -> AsyncIterator[AsyncIterator[bytes]]:
        """Readings as the server writes them, in the format that the parameters ask for."""
        with _Translated(self._url):
            async with self._client.stream("GET", "/readings", params=_given(parameters)) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise self._error(answer)
                yield answer.aiter_bytes()

    async def dead_letters(
        self, *, sink: str | None = None, gateway: str | None = None, after: int = 0, limit: int = 100
    ) -> DeadLettersPage:
        parameters: Parameters = {"sink": sink, "gateway": gateway, "after": after, "limit": limit}
        return await self._get("/dead-letters", parameters, DeadLettersPage)

    async def dead_letter(self, letter_id: int) -> DeadLetterContent:
        return await self._get(f"/dead-letters/{letter_id}", {}, DeadLetterContent)

    async def replay(self, selection: Selection) -> Replay:
        return await self._post("/dead-letters/replay", selection, Replay)

    async def replay_sink(self, asked: SinkReplayRequest) -> SinkReplay:
        return await self._post("/replay", asked, SinkReplay, timeout_s=asked.wait_s + VERIFY_TIMEOUT_S)

    async def drop(self, selection: Selection) -> int:
        return (await self._post("/dead-letters/drop", selection, Dropped)).dropped

    async def take(self, payloads: Sequence[bytes], *, gateway: str | None = None) -> list[Taken]:
        body = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
        with _Translated(self._url):
            answer = await self._client.post(
                "/import",
                params=_given({"gateway": gateway}),
                content=body,
                headers={"Content-Type": "application/octet-stream"},
            )
        return self._decoded(answer, list[Taken])

    async def verify(self) -> Verdict:
        return await self._get("/verify", {}, Verdict, timeout_s=VERIFY_TIMEOUT_S)

    async def _get(
        self, path: str, parameters: Parameters, kind: type[T], *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> T:
        with _Translated(self._url):
            timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
            answer = await self._client.get(path, params=_given(parameters), timeout=timeout)
        return self._decoded(answer, kind)

    async def _post(
        self, path: str, body: object, kind: type[T], *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> T:
        with _Translated(self._url):
            answer = await self._client.post(
                path,
                content=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )
        return self._decoded(answer, kind)

    def _decoded(self, answer: httpx.Response, kind: type[T]) -> T:
        if answer.status_code != 200:
            raise self._error(answer)
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError as err:
            raise OperatorError(
                f"{self._url} answers what this version does not read ({err}); is it headgate-cloud?"
            ) from err

    def _error(self, answer: httpx.Response) -> OperatorError:
        try:
            detail = msgspec.json.decode(answer.content, type=_Detail).detail
        except msgspec.DecodeError:
            detail = answer.text[:200]
        text = f"{self._url}: {detail if isinstance(detail, str) else msgspec.json.encode(detail).decode()}"
        if answer.status_code == 503:
            return NotNow(text)
        return NotFound(text) if answer.status_code == 404 else OperatorError(text)


class _Detail(msgspec.Struct):
    detail: str | list[object]


class _Translated:
    """httpx's errors as ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: object) -> None:
        if isinstance(err, httpx.HTTPError | httpx.InvalidURL):
            raise NotNow(
                f"{self._url} cannot be reached: {str(err) or type(err).__name__}; is headgate-cloud running there?"
            ) from err


def _given(parameters: Parameters) -> dict[str, str]:
    return {name: str(value) for name, value in parameters.items() if value is not None}
