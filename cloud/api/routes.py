"""The operator's API over HTTP: `/v1`, documented by the OpenAPI document that the server gives at `/v1/openapi.json`.

Rules:
1. Every path needs the operator's bearer token, compared in constant time. Without one configured, everybody is
   refused: there is no default.
2. An answer is a record of `models.py`; an error is `{"detail": text}` with a status by who acts: 400 and 404 the
   asker, 401 the asker's credential, 503 nobody but time (`Retry-After` where it is known).
3. Readings stream: their first page is taken before the status is sent, so a store that is down is a 503 and not a
   broken answer.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError

from cloud.api import formats, models, times
from cloud.api.operator import MAX_LIMIT, NotFound, NotNow, Operator, OperatorError, Pages
from cloud.api.operator import Query as Readings
from cloud.dead_letters import DeadLettersError
from cloud.intake import Intake
from cloud.journal.contract import JournalError
from cloud.sinks.contract import RetryLater, SinkError
from sync.identity import Secret

if TYPE_CHECKING:
    from cloud.server import Services

MAX_IMPORT_BYTES: Final = 8 * 1024 * 1024  #: of one request: a moment's work, and bounded memory

Format: TypeAlias = Literal["json", "csv", "arrow"]

Tenant = Annotated[str, Path(description="The tenant's name.", pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Name = Annotated[str, Path(description="The gateway's name.", pattern=r"^[A-Za-z0-9_-]{1,64}$")]
From = Annotated[str | None, Query(alias="from", description="Not before: ISO 8601, `-15m`, or nanoseconds.")]
To = Annotated[str | None, Query(description="Before: ISO 8601, `-15m`, `now`, or nanoseconds.")]
Since = Annotated[
    str | None, Query(description="Told here not before: ISO 8601, `-15m`, or nanoseconds.", max_length=64)
]
GatewayName = Annotated[str | None, Query(description="Only this one: tenant/gateway.", max_length=129)]
DeviceName = Annotated[str | None, Query(description="Only this device.", max_length=255)]
Some = Annotated[int, Query(ge=1, le=10_000, description="At most so many.")]


class Token:
    """Admits whoever holds the operator's token."""

    def __init__(self, token: Secret | None) -> None:
        self._digest = hashlib.sha256(token.reveal().encode()).digest() if token is not None else None

    def __call__(self, authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> None:
        if self._digest is None:
            raise _unauthorized("no operator's token is configured: set server.operator_token_file")
        scheme, _, given = (authorization or "").partition(" ")
        # Digests are of one length, and the comparison takes the same time wherever they differ.
        right = hmac.compare_digest(hashlib.sha256(given.strip().encode()).digest(), self._digest)
        if scheme.lower() != "bearer" or not right:
            raise _unauthorized("give the operator's token: Authorization: Bearer …")


def _unauthorized(text: str) -> HTTPException:
    return HTTPException(401, text, headers={"WWW-Authenticate": 'Bearer realm="headgate operator"'})


def mount(app: FastAPI, services: Services) -> None:
    """Adds the API to the server's application."""
    operator = Operator(
        services.config,
        dead_letters=services.dead_letters,
        journal=services.journal,
        runners=services.runners,
        mysql=services.secrets.mysql,
        intake=Intake(services.journal, services.journal, services.metrics),
    )
    services.on_close.push_async_callback(operator.close)
    app.include_router(router(operator, services.secrets.operator))
    handle_errors(app)


def handle_errors(app: FastAPI) -> None:
    """Our errors as answers (rule 2)."""

    def answer(status: int, text: str, after_s: float | None = None) -> Response:
        headers = {"Retry-After": str(max(1, round(after_s)))} if after_s is not None else None
        return JSONResponse({"detail": text}, status, headers)

    async def refused(_: Request, err: Exception) -> Response:
        if isinstance(err, NotNow):
            return answer(503, str(err), err.after_s or 1.0)
        return answer(404 if isinstance(err, NotFound) else 400, str(err))

    async def down(_: Request, err: Exception) -> Response:
        after_s = err.after_s if isinstance(err, RetryLater) else None
        return answer(503, f"a store cannot be asked: {err}", after_s or 5.0)

    asked_wrongly: tuple[type[Exception], ...] = (OperatorError, times.TimeError)
    cannot_now: tuple[type[Exception], ...] = (SinkError, SQLAlchemyError, JournalError, DeadLettersError)
    for kind in asked_wrongly:
        app.add_exception_handler(kind, refused)
    for kind in cannot_now:
        app.add_exception_handler(kind, down)


def router(operator: Operator, token: Secret | None) -> APIRouter:
    """Every path below `/v1`."""
    # HTTPBearer documents the scheme in the OpenAPI document; Token decides.
    api = APIRouter(
        prefix="/v1",
        dependencies=[
            Depends(Token(token)),
            Depends(HTTPBearer(auto_error=False, description="The operator's token.")),
        ],
        responses={401: {"description": "No valid operator's token."}},
        tags=["operator"],
    )
    _add_gateways(api, operator)
    _add_readings(api, operator)
    _add_dead_letters(api, operator)
    _add_replay(api, operator)
    _add_import(api, operator)

    @api.get("/verify", summary="The accounting identity, counted", response_model=models.Verdict)
    async def verify() -> Response:
        """received = journaled + duplicate (frames), and per sink journaled = stored + dead + pending + expired
        (readings). `ok` is false where a sink misses or doubles a reading, or could not be asked. It counts every row:
        for an audit, not for a dashboard."""
        return _json(await operator.verify())

    return api


def _add_gateways(api: APIRouter, operator: Operator) -> None:
    @api.get("/gateways", summary="All gateways", response_model=list[models.Gateway])
    async def gateways() -> Response:
        """Admitted, seen, or both; with their counters and latest heartbeat."""
        return _json(await operator.gateways())

    @api.get("/gateways/{tenant}/{name}", summary="One gateway", response_model=models.Gateway)
    async def gateway(tenant: Tenant, name: Name) -> Response:
        return _json(await operator.gateway(f"{tenant}/{name}"))

    @api.get(
        "/gateways/{tenant}/{name}/devices",
        summary="Its devices and points",
        response_model=list[models.Device],
    )
    async def devices(tenant: Tenant, name: Name) -> Response:
        return _json(await operator.devices(f"{tenant}/{name}"))

    @api.get(
        "/gateways/{tenant}/{name}/latest",
        summary="The newest reading of every point",
        response_model=list[models.Reading],
    )
    async def latest(tenant: Tenant, name: Name, device: DeviceName = None) -> Response:
        return _json(await operator.latest(f"{tenant}/{name}", device))

    @api.get(
        "/gateways/{tenant}/{name}/gaps",
        summary="Counted holes, newest first",
        response_model=list[models.Gap],
    )
    async def gaps(tenant: Tenant, name: Name, since: Since = None, limit: Some = 1000) -> Response:
        return _json(await operator.gaps(f"{tenant}/{name}", limit, since_ns=_since(since)))

    @api.get("/gaps", summary="Counted holes of all gateways, newest first", response_model=list[models.Gap])
    async def all_gaps(gateway: GatewayName = None, since: Since = None, limit: Some = 1000) -> Response:
        return _json(await operator.gaps(gateway, limit, since_ns=_since(since)))

    @api.get(
        "/gateways/{tenant}/{name}/events", summary="Events, newest first", response_model=list[models.Event]
    )
    async def events(
        tenant: Tenant, name: Name, from_: From = None, to: To = None, limit: Some = 1000
    ) -> Response:
        from_ns, to_ns = _span(from_, to)
        return _json(await operator.events(f"{tenant}/{name}", from_ns, to_ns, limit))


def _since(text: str | None) -> int:
    return 0 if text is None else times.parse(text, time.time_ns())


def _add_readings(api: APIRouter, operator: Operator) -> None:
    @api.get(
        "/readings",
        summary="Readings by gateway, device, point and time",
        response_model=models.ReadingsPage,
        responses={
            200: {
                "description": "A page as JSON; or CSV (RFC 4180, safe in spreadsheets), or an Arrow IPC stream.",
                "content": {formats.CSV_TYPE: {}, formats.ARROW_TYPE: {}},
            }
        },
    )
    async def readings(
        gateway: Annotated[str, Query(description="`tenant/gateway`", max_length=129)],
        device: DeviceName = None,
        point: Annotated[str | None, Query(description="Only this point.", max_length=255)] = None,
        from_: From = None,
        to: To = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="At most so many readings.")] = 1000,
        after: Annotated[str | None, Query(description="`next` of the page before.", max_length=100)] = None,
        format: Annotated[Format, Query(description="How to answer.")] = "json",  # noqa: A002 - the parameter's name
        store: Annotated[models.Store | None, Query(description="Which store to ask.")] = None,
    ) -> Response:
        """Point by point, each in order of time (from the archive: in the order of its files). Without `from` and `to`
        all there are, up to `limit`; `next` leads on."""
        from_ns, to_ns = _span(from_, to)
        pages = await operator.readings(Readings(gateway, device, point, from_ns, to_ns, limit, after, store))
        primed = _Primed(pages)
        await primed.first()
        name = gateway.replace("/", "-")
        if format == "csv":
            disposition = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
            return StreamingResponse(
                formats.as_csv(aiter(primed)), media_type=formats.CSV_TYPE, headers=disposition
            )
        if format == "arrow":
            disposition = {"Content-Disposition": f'attachment; filename="{name}.arrows"'}
            return StreamingResponse(
                formats.as_arrow(aiter(primed)), media_type=formats.ARROW_TYPE, headers=disposition
            )
        return StreamingResponse(formats.as_json(aiter(primed), primed), media_type=formats.JSON_TYPE)


def _add_replay(api: APIRouter, operator: Operator) -> None:
    @api.post("/replay", summary="Give a sink again what was received", response_model=models.SinkReplay)
    async def replay_sink(asked: models.SinkReplayRequest) -> Response:
        """From the journal and, for what that no longer holds, from the archive. What the sink has already stays as it
        is; readings whose time was an estimate and is known by now are moved to it. Answers once the sink is through,
        or after `wait_s`: it then goes on by itself."""
        return _json(await operator.replay_sink(asked))


def _add_dead_letters(api: APIRouter, operator: Operator) -> None:
    @api.get("/dead-letters", summary="What sinks refused", response_model=models.DeadLettersPage)
    async def dead_letters(
        sink: Annotated[str | None, Query(description="Only of this sink.", max_length=32)] = None,
        gateway: Annotated[str | None, Query(description="`tenant/gateway`", max_length=129)] = None,
        after: Annotated[int, Query(ge=0, description="`next` of the page before.")] = 0,
        limit: Some = 100,
    ) -> Response:
        """The oldest first, each with its reason."""
        return _json(await operator.dead_letters(sink=sink, gateway=gateway, after=after, limit=limit))

    @api.get(
        "/dead-letters/{letter}",
        summary="One letter and what is in it",
        response_model=models.DeadLetterContent,
    )
    async def dead_letter(letter: Annotated[int, Path(ge=1)]) -> Response:
        return _json(await operator.dead_letter(letter))

    @api.post(
        "/dead-letters/replay", summary="Give letters to their sinks again", response_model=models.Replay
    )
    async def replay(selection: models.Selection) -> Response:
        """A letter leaves once its sink has taken it; one that is refused again stays, with the new reason."""
        return _json(await operator.replay(selection))

    @api.post("/dead-letters/drop", summary="Remove letters for good", response_model=models.Dropped)
    async def drop(selection: models.Selection) -> Response:
        """`verify` counts what was dropped as missing from the sink: it is."""
        return _json(models.Dropped(await operator.drop(selection)))


def _add_import(api: APIRouter, operator: Operator) -> None:
    @api.post(
        "/import",
        summary="Batches of an export, carried by hand",
        response_model=list[models.Taken],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def take(
        request: Request,
        gateway: Annotated[
            str | None, Query(description="Admit this one, `tenant/gateway`.", max_length=129)
        ] = None,
    ) -> Response:
        """The body: each batch after its size (u32, big-endian), as in the file; at most 8 MiB. Each is checked and
        deduped as if it had come by network, and durable when it is answered."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_IMPORT_BYTES:
                raise HTTPException(413, f"at most {MAX_IMPORT_BYTES} bytes at a time")
        return _json(await operator.take(_parted(bytes(body)), gateway=gateway))


def _parted(body: bytes) -> list[bytes]:
    payloads: list[bytes] = []
    at = 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        payload = body[at + 4 : at + 4 + size]
        if at + 4 > len(body) or not size or len(payload) != size:
            raise OperatorError(f"the body ends within batch {len(payloads) + 1}")
        payloads.append(payload)
        at += 4 + size
    return payloads


class _Primed:
    """Pages whose first is taken before the answer begins."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._rest = aiter(pages)
        self._first: Sequence[models.Reading] | None = None

    @property
    def next(self) -> str | None:
        return self._pages.next

    async def first(self) -> None:
        self._first = await anext(self._rest, None)

    async def __aiter__(self) -> AsyncIterator[Sequence[models.Reading]]:
        if self._first is not None:
            yield self._first
            async for page in self._rest:
                yield page


def _span(from_: str | None, to: str | None) -> tuple[int, int]:
    now_ns = time.time_ns()
    from_ns = times.parse(from_, now_ns) if from_ is not None else 0
    to_ns = times.parse(to, now_ns) if to is not None else times.MAX_NS
    return from_ns, to_ns


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
