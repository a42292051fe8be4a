"""Documents over HTTP, from devices and public stations: JSON, HTML, CSV or text, fetched now and then.

Rules:
1. A document that has not changed is no reading: told by 304, by its ETag, by its own time (`time_point`) or by its
   bytes, also across a restart. A device that answers afresh each time, equal or not, says `live = true`.
2. A document older than `stale_after_s` by its own account, and silence of new ones for as long, are `STALE`.
   What has not changed is told once, by a scan without points, when the server answers again after a failure.
3. A failure is told with its reason (`DeviceUnreachable`) and tried again at the period, or when the server says.
   The host is asked no more often than `host_interval_s` by all devices together, and only what its robots.txt allows.
4. Credentials come from a file or the environment, go to the configured origin only, and stand in no message.

`http_fetch` gets the bytes, `http_extract` makes values of them, `http_hosts` has the manners; this has the schedule.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

import httpx
import msgspec

from drivers import http_extract, http_fetch, http_hosts
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    boot_ns,
)
from drivers.http_extract import Extractor, Form, HttpPoint
from drivers.http_fetch import Document, FetchError, Network

LARGEST_BYTES: Final = 16_777_216  #: a gateway has 64 MB in all
_IN_THREAD_BYTES: Final = 32_768  #: a larger document is decoded beside the event loop
_BACKOFF_CAP_S: Final = 8.0  #: a device that is back is read within 10 s, where its period is not longer
_SECRET_BYTES: Final = 8_192
_OWN_HEADERS: Final = frozenset(
    {
        "authorization", "cookie", "host", "proxy-authorization", "accept-encoding", "content-length", "connection",
        "if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "range", "te",
        "transfer-encoding", "upgrade", "user-agent",
    }
)  # fmt: skip
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  #: a header's name (RFC 9110 5.6.2)


class HttpPollOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a document; every key is explained in http_poll.toml."""

    url: str
    format: Literal["json", "html", "csv", "text"] = "json"
    period_s: Annotated[float, msgspec.Meta(ge=0.1, le=2_592_000)] = 60.0
    jitter: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.1
    live: bool = False
    stale_after_s: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] = 3600.0
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 20.0
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BYTES)] = 1_000_000
    max_redirects: Annotated[int, msgspec.Meta(ge=0, le=10)] = 5
    allow_private: bool = False
    host_interval_s: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 1.0
    obey_robots: bool = True
    user_agent: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] = "headgate"
    headers: dict[str, str] = {}
    auth: Literal["none", "basic", "bearer", "header", "query"] = "none"
    auth_user: str = ""
    auth_header: str = ""
    auth_query: str = ""
    secret_file: str = ""
    secret_env: str = ""
    ca_file: str = ""
    time_point: str = ""
    time_format: str = "iso"
    time_zone: str = "UTC"
    encoding: str = ""
    decimal: Literal[".", ","] = "."
    delimiter: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] = ","
    header: bool = True
    skip_lines: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    comment: Annotated[str, msgspec.Meta(max_length=8)] = ""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """The last document, as far as the next one must be told from it."""

    about: bytes  #: the digest of what was asked for
    etag: str = ""
    modified: str = ""
    body: bytes = b""  #: its digest
    told: str = ""  #: its own time


class HttpPollDriver(PushDriver[HttpPollOptions, HttpPoint]):
    """Asks at its period, and yields a scan when something new came."""

    options_type: ClassVar[type[msgspec.Struct]] = HttpPollOptions
    point_type: ClassVar[type[Point]] = HttpPoint

    def __init__(
        self,
        name: str,
        options: HttpPollOptions,
        points: Sequence[HttpPoint],
        *,
        network: Network | None = None,
        hosts: http_hosts.Hosts | None = None,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(name, options, points)
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        self._network = network or Network()
        self._hosts = hosts
        self._rng = rng or random.Random()
        self._url = self._asked = self._checked_url()  #: what is asked may hold the secret: never told
        self._check_auth()
        self._extractor = Extractor(
            Form(
                format=options.format,
                encoding=options.encoding,
                decimal=options.decimal,
                delimiter=options.delimiter,
                header=options.header,
                skip_lines=options.skip_lines,
                comment=options.comment,
            ),
            self.points,
        )
        self._time = self._checked_time()
        if 0 < options.stale_after_s < options.period_s:
            raise ConfigError(
                f"options.stale_after_s is {options.stale_after_s:g}, below period_s ({options.period_s:g}): it would "
                "always be stale; make it several periods, or 0 for never"
            )
        self._about = hashlib.blake2b(
            msgspec.json.encode((options.url, options.format, self.points)), digest_size=16
        ).digest()
        self._seen = Seen(self._about)
        self._told_seen = self._seen
        self._fetcher: http_fetch.Fetcher | None = None
        self._next_s = 0.0
        self._failures = 0
        self._heard_s: float | None = None  #: when something new came, or the listening began
        self._stale_told = False
        self._useful = True  #: whether the last document gave a value; of an earlier life's nothing is known
        self._well_told = False  #: since the connect; before it there may have been a failure

    # --- configuration ---

    def _checked_url(self) -> httpx.URL:
        try:
            url = httpx.URL(self.options.url)
        except (httpx.InvalidURL, ValueError) as err:
            raise ConfigError(f"options.url is no address: {err}") from err
        if url.scheme not in ("http", "https") or not http_fetch.has_host(url):
            raise ConfigError(
                'options.url begins with http:// or https:// and a host, as in "http://192.168.1.9/api"'
            )
        if url.userinfo:
            raise ConfigError("options.url holds a credential; use auth, auth_user and secret_file instead")
        if url.fragment:
            raise ConfigError(f"options.url: #{url.fragment} is never sent to a server; leave it out")
        for key, value in self.options.headers.items():
            if key.lower() in _OWN_HEADERS:
                raise ConfigError(
                    f"options.headers: {key} is not set here; a credential goes into auth, a name into user_agent"
                )
            if not _TOKEN.fullmatch(key) or not _sendable(value) or value != value.strip():
                raise ConfigError(f"options.headers: {key!r} is no header that can be sent")
        if not self.options.user_agent.isascii() or not self.options.user_agent.isprintable():
            raise ConfigError("options.user_agent: plain ASCII only")
        return url

    def _check_auth(self) -> None:
        options = self.options
        given = [key for key in ("secret_file", "secret_env") if getattr(options, key)]
        if options.auth == "none":
            for key in [
                *given,
                *(key for key in ("auth_user", "auth_header", "auth_query") if getattr(options, key)),
            ]:
                raise ConfigError(f'options.{key} has no use with auth = "none"')
            return
        if len(given) != 1:
            raise ConfigError(
                f'options.auth = "{options.auth}" needs its secret from one of secret_file and secret_env'
            )
        if (options.auth == "basic") != bool(options.auth_user):
            raise ConfigError('options.auth_user belongs to auth = "basic", and is needed there')
        if (options.auth == "header") != bool(options.auth_header):
            raise ConfigError('options.auth_header belongs to auth = "header", and is needed there')
        if (options.auth == "query") != bool(options.auth_query):
            raise ConfigError('options.auth_query belongs to auth = "query", and is needed there')
        if options.auth_header and (
            not _TOKEN.fullmatch(options.auth_header)
            or options.auth_header.lower() in _OWN_HEADERS - {"authorization", "cookie"}
        ):
            raise ConfigError(f"options.auth_header: {options.auth_header!r} is no header for a credential")
        if ":" in options.auth_user or not options.auth_user.isprintable():
            raise ConfigError(f"options.auth_user: {options.auth_user!r} cannot be sent (RFC 7617)")
        written = http_fetch.literal(self._url.host)
        near = options.allow_private or (written is not None and http_fetch.is_private(written))
        if self._url.scheme == "http" and not near:
            raise ConfigError(
                f'options.auth = "{options.auth}" over http would show the secret to everybody on the way to '
                f"{self._url.host}; use https, or allow_private = true for a host of your own network"
            )

    def _checked_time(self) -> http_extract.TimeFormat | None:
        options = self.options
        if options.time_point and options.time_point not in {point.name for point in self.points}:
            raise ConfigError(f"options.time_point: there is no point {options.time_point!r}")
        found = http_extract.time_format(options.time_format, options.time_zone)
        return found if options.time_point else None

    def _credential(self) -> list[tuple[str, str]]:
        """The header that carries the credential; read anew at every connect. Raises `ConfigError`."""
        options = self.options
        if options.auth == "none":
            return []
        if options.secret_env:
            secret = os.environ.get(options.secret_env, "")
            where = f"the environment's {options.secret_env}"
        else:
            where = options.secret_file
            try:
                with Path(options.secret_file).open("rb") as file:
                    secret = file.read(_SECRET_BYTES).decode("utf-8")
            except (OSError, UnicodeDecodeError) as err:
                why = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
                raise ConfigError(f"options.secret_file: {where} cannot be read: {why}") from err
        secret = secret.strip()
        if not secret or not secret.isprintable() or (options.auth != "basic" and not secret.isascii()):
            raise ConfigError(f"options.auth: {where} holds no secret that can be sent")
        match options.auth:
            case "basic":
                pair = base64.b64encode(f"{options.auth_user}:{secret}".encode()).decode()
                return [("Authorization", f"Basic {pair}")]
            case "bearer":
                return [("Authorization", f"Bearer {secret}")]
            case "query":
                self._asked = self._url.copy_add_param(options.auth_query, secret)
                return []
            case _:
                return [(options.auth_header, secret)]

    # --- the contract ---

    async def connect(self) -> None:
        """Nothing is asked yet: when that may be is the schedule's affair."""
        await self.close()
        self._well_told = False
        options = self.options
        self._own = [*options.headers.items(), *self._credential()]
        try:
            self._fetcher = http_fetch.Fetcher(
                self._network,
                named_host=self._url.host,
                allow_private=options.allow_private,
                ca_file=options.ca_file or None,
                timeout_s=options.timeout_s,
                max_bytes=options.max_bytes,
                max_redirects=options.max_redirects,
            )
        except OSError as err:  # ssl.SSLError is one
            raise ConfigError(f"options.ca_file: {options.ca_file} cannot be used: {err}") from err
        if self._heard_s is None:
            self._heard_s = asyncio.get_running_loop().time()

    async def close(self) -> None:
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            await fetcher.close()

    async def scans(self) -> AsyncIterator[Scan]:
        fetcher = self._fetcher
        if fetcher is None:
            raise DeviceUnreachable(f"{self._url.host}: not connected")
        while True:
            asking = asyncio.create_task(self._ask(fetcher))
            try:
                while not asking.done():
                    await asyncio.wait({asking}, timeout=self._until_stale_s())
                    if not asking.done() and not self._stale_told:
                        self._stale_told = True
                        yield self._bad(boot_ns(), Reason.STALE)
            finally:
                if not asking.done():
                    asking.cancel()
                    await asyncio.wait({asking})
            try:
                scan = asking.result()
            except FetchError as err:
                raise self._failed(err) from err
            if scan is not None:
                yield scan

    def remembered(self) -> bytes | None:
        if self._seen == self._told_seen:
            return None
        self._told_seen = self._seen
        return msgspec.msgpack.encode(self._seen)

    def recall(self, remembered: bytes) -> None:
        try:
            seen = msgspec.msgpack.decode(remembered, type=Seen)
        except (ValueError, RecursionError):  # msgspec.DecodeError is a ValueError, text that is none another
            return
        if seen.about == self._about and _sendable(seen.etag + seen.modified):
            self._seen = self._told_seen = seen

    # --- one poll ---

    async def _ask(self, fetcher: http_fetch.Fetcher) -> Scan | None:
        """Wait for the time, fetch, and make a scan of what is new. Raises `FetchError`."""
        loop = asyncio.get_running_loop()
        options = self.options
        await asyncio.sleep(max(0.0, self._next_s - loop.time()))
        # Set before anything is asked: a cancelled poll counts as one.
        self._next_s = loop.time() + options.period_s * (1 + options.jitter * (2 * self._rng.random() - 1))
        plain = [("User-Agent", options.user_agent)]
        own = list(self._own)
        if self._seen.etag and not options.live:
            own.append(("If-None-Match", self._seen.etag))
        if self._seen.modified and not options.live:
            own.append(("If-Modified-Since", self._seen.modified))

        async def before(url: httpx.URL) -> None:
            if options.obey_robots and await self._is_public(url.host):
                await self._manners.robots_allow(url, robots)
            await self._manners.turn(url, options.host_interval_s)

        async def robots(url: httpx.URL) -> Document:
            async def turn(at: httpx.URL) -> None:
                await self._manners.turn(at, options.host_interval_s)

            return await fetcher.fetch(url, plain, [], before=turn, max_bytes=http_hosts.ROBOTS_BYTES)

        document = await fetcher.fetch(self._asked, plain, own, before=before)
        taken_at_ns = boot_ns()
        self._failures = 0
        if document.status == 304:
            if not (self._seen.etag or self._seen.modified) or options.live:
                raise FetchError(f"{self._url.host} answered 304 to a question for the whole", Reason.FRAMING)
            return self._unchanged(taken_at_ns, document.headers)
        return await self._scan_of(document, taken_at_ns)

    async def _scan_of(self, document: Document, taken_at_ns: int) -> Scan | None:
        digest = hashlib.blake2b(document.body, digest_size=16).digest()
        headers = document.headers
        seen = Seen(
            self._about,
            _validator(headers.get("etag", ""), 512),
            _validator(headers.get("last-modified", ""), 64),
            digest,
            self._seen.told,
        )
        same = digest == self._seen.body or (
            seen.etag and not seen.etag.startswith("W/") and seen.etag == self._seen.etag
        )
        if same and not self.options.live:
            self._seen = seen
            return self._unchanged(taken_at_ns, headers)
        charset = _charset(headers.get("content-type", ""))
        extract = self._extractor.extract
        if len(document.body) > _IN_THREAD_BYTES:
            results = await asyncio.to_thread(extract, document.body, charset)
        else:
            results = extract(document.body, charset)
        told = self._told_time(results)
        if told is not None:
            seen = msgspec.structs.replace(seen, told=str(told))
            if seen.told == self._seen.told and not self.options.live:
                self._seen = seen  # something else on the page changed
                return self._unchanged(taken_at_ns, headers)
        self._seen = seen
        self._heard_s = asyncio.get_running_loop().time()
        self._stale_told = False
        self._well_told = True
        scan = self._scan(taken_at_ns, results, told, headers)
        self._useful = any(
            value is not None and point.name != self.options.time_point
            for point, value in zip(scan.points, scan.values, strict=True)
        )
        return scan

    def _unchanged(self, taken_at_ns: int, headers: httpx.Headers) -> Scan | None:
        """The sign of life, where what was read last still holds."""
        told, limit_s = self._seen.told or None, self.options.stale_after_s
        age_s = self._age_s(told, headers)
        if (
            self._well_told
            or self._stale_told
            or not self._useful
            or (limit_s and age_s is not None and age_s > limit_s)
        ):
            return None
        self._well_told = True
        return Scan(taken_at_ns, (), ())

    def _told_time(self, results: Sequence[Value | Reason]) -> Value | None:
        for point, result in zip(self.points, results, strict=True):
            if point.name == self.options.time_point:
                return None if isinstance(result, Reason) else result
        return None

    def _scan(
        self, taken_at_ns: int, results: Sequence[Value | Reason], told: Value | None, headers: httpx.Headers
    ) -> Scan:
        values: list[Value | None] = []
        reasons: dict[int, Reason] = {}
        age_s = self._age_s(told, headers)
        limit_s = self.options.stale_after_s
        stale = bool(limit_s) and age_s is not None and age_s > limit_s
        timeless = self._time is not None and (
            told is None or http_extract.read_time(told, self._time) is None
        )
        for i, (point, result) in enumerate(zip(self.points, results, strict=True)):
            is_time = point.name == self.options.time_point
            if stale and not is_time:
                result = Reason.STALE
            if isinstance(result, Reason):
                reasons[i] = result
                values.append(None)
                continue
            values.append(result)
            if timeless and not is_time:
                reasons[i] = Reason.CLOCK  # it was to tell its time, and does not
        return Scan(taken_at_ns, self.points, values, reasons)

    def _age_s(self, told: Value | None, headers: httpx.Headers) -> float | None:
        """How old the document is by its own account; the server's clock is the judge where it tells its time."""
        written_s = None
        if self._time is not None:
            written_s = None if told is None else http_extract.read_time(told, self._time)
        else:
            written_s = http_extract.http_time(headers.get("last-modified", ""))
        if written_s is None:
            return None
        now_s = http_extract.http_time(headers.get("date", ""))
        return (time.time() if now_s is None else now_s) - written_s

    async def _is_public(self, host: str) -> bool:
        written = http_fetch.literal(host)
        if written is not None:
            return not self._network.is_private(written)
        try:
            found = await self._network.resolve(host, 80)
        except OSError:
            return False  # the fetch will say so
        addresses = [http_fetch.literal(each) for each in found]
        return not any(each is not None and self._network.is_private(each) for each in addresses)

    @property
    def _manners(self) -> http_hosts.Hosts:
        if self._hosts is None:
            self._hosts = http_hosts.shared()
        return self._hosts

    # --- trouble ---

    def _failed(self, err: FetchError) -> DeviceUnreachable:
        wait_s = min(
            2.0 ** min(self._failures, 10) * self.options.period_s, max(self.options.period_s, _BACKOFF_CAP_S)
        )
        self._failures += 1
        wait_s *= 1 - self.options.jitter * self._rng.random()
        if err.retry_after_s is not None:
            self._manners.hold(self._url, err.retry_after_s)
            wait_s = max(wait_s, err.retry_after_s)
        self._next_s = asyncio.get_running_loop().time() + wait_s
        return DeviceUnreachable(str(err), err.reason)

    def _until_stale_s(self) -> float | None:
        if self._stale_told or not self.options.stale_after_s or self._heard_s is None:
            return None
        return max(0.0, self._heard_s + self.options.stale_after_s - asyncio.get_running_loop().time())

    def _bad(self, taken_at_ns: int, reason: Reason) -> Scan:
        count = len(self.points)
        return Scan(taken_at_ns, self.points, [None] * count, dict.fromkeys(range(count), reason))


def _sendable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _validator(told: str, most: int) -> str:
    """An ETag or a Last-Modified as it may be sent back; a part of one would be another."""
    return told if len(told) <= most and _sendable(told) else ""


def _charset(content_type: str) -> str:
    """The charset that a server names, where Python knows it too."""
    for part in content_type.split(";")[1:]:
        key, _, value = part.strip().partition("=")
        if key.lower() == "charset":
            name = value.strip("\"' ")
            try:
                "".encode(name)
            except (LookupError, ValueError):
                return ""
            return name
    return ""
