"""One document over HTTP, and nothing else: no bigger, no slower and from nowhere else than was asked.

Rules:
1. The address that was judged is the address that is connected to: a name is resolved here, once per connection, and
   one private address among its addresses refuses it (a name that is made to point inside is how a firewall is passed
   from within). A private address is reached only where the configuration names it or says `allow_private`.
2. Every redirect is judged like the first address. To another origin it carries no credential and no header of the
   configuration; from https to http it is refused.
3. TLS is always verified. A body is read to `max_bytes`, unpacked, and not a byte further.
4. A failure has a reason and a text that names the host, never a credential and never the query.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import httpcore
import httpx
import msgspec

from drivers.contract import Reason
from drivers.http_extract import retry_after_s

LONGEST_RETRY_AFTER_S: Final = 86_400.0  #: a server that asks for more is asked once a day
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRIED: Final = 4  #: addresses of one name
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  #: RFC 6052: an IPv4 address within
_NAT64_OWN: Final = ipaddress.IPv6Network("64:ff9b:1::/48")  #: RFC 8215: a network's own translation
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")  #: RFC 4291 2.5.5.1: deprecated

_HOST: Final = re.compile(rb"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(Exception):
    """No document. `retry_after_s` where the server said when to come again."""

    def __init__(self, text: str, reason: Reason, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Document(msgspec.Struct, frozen=True):
    """What a server answered; `body` is empty for 304."""

    status: int
    headers: httpx.Headers
    body: bytes


def literal(host: str) -> Address | None:
    """A host that is written as an address."""
    try:
        return ipaddress.ip_address(host.strip("[]").split("%")[0])
    except ValueError:
        return None


def has_host(url: httpx.URL) -> bool:
    """Whether a host stands there that may be looked for: a name (RFC 1123, or with underscores), or an address."""
    if url.port is not None and not 0 < url.port <= 65_535:
        return False
    if literal(url.host) is not None:
        return True
    labels = url.raw_host.removesuffix(b".").split(b".")
    return _HOST.fullmatch(url.raw_host) is not None and all(0 < len(label) <= 63 for label in labels)


def is_private(address: Address) -> bool:
    """Whether an address is not one of the public internet; an IPv4 address within an IPv6 one counts as itself."""
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if within is None and address in _NAT64:
            within = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if within is not None:
            return is_private(within)
        if address.is_site_local or address in _NAT64_OWN or address in _COMPATIBLE:
            return True
    return not address.is_global or address.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    """A name's addresses. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The world as a fetcher sees it; tests exchange it."""

    resolve: Callable[[str, int], Awaitable[list[str]]] = resolve
    is_private: Callable[[Address], bool] = is_private


class _Barred(Exception):
    """A name that leads to where it may not."""


class _Backend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were judged, and to no other."""

    def __init__(self, network: Network, named: str | None, *, allow_private: bool) -> None:
        self._network = network
        self._named = literal(named) if named else None
        self._allow_private = allow_private
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        written = literal(host)
        addresses = (
            [host.strip("[]").replace("%25", "%")]
            if written is not None
            else await self._network.resolve(host, port)
        )
        for each in addresses:
            address = literal(each)
            if address is None or (
                not self._allow_private and self._network.is_private(address) and address != self._named
            ):
                raise _Barred(
                    f"{host} leads to the private address {each}; allow_private = true would allow it"
                )
        last: Exception = OSError("it has no address")
        for each in addresses[:_TRIED]:
            try:
                return await self._inner.connect_tcp(each, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as err:
                last = err
        raise last

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches for one device; connections are kept for a while where the server allows it."""

    def __init__(
        self,
        network: Network,
        *,
        named_host: str,
        allow_private: bool,
        ca_file: str | None,
        timeout_s: float,
        max_bytes: int,
        max_redirects: int,
    ) -> None:
        """Raises `OSError` where `ca_file` cannot be used."""
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(cafile=ca_file),
            max_connections=4,
            max_keepalive_connections=1,
            keepalive_expiry=30.0,
            network_backend=_Backend(network, named_host, allow_private=allow_private),
        )
        self._timeout_s = timeout_s
        self.max_bytes = max_bytes
        self._max_redirects = max_redirects

    async def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, httpcore.NetworkError):
            await self._pool.aclose()

    async def fetch(
        self,
        url: httpx.URL,
        headers: Sequence[tuple[str, str]],
        own: Sequence[tuple[str, str]],
        *,
        before: Callable[[httpx.URL], Awaitable[None]],
        max_bytes: int | None = None,
    ) -> Document:
        """`own` go to the first origin only. `before` each request waits its turn, or raises. Raises `FetchError`."""
        first = _origin(url)
        for _ in range(self._max_redirects + 1):
            await before(url)
            sent = [*headers, *own] if _origin(url) == first else list(headers)
            with _translated(url, self._timeout_s):
                async with asyncio.timeout(self._timeout_s):
                    document, target = await self._once(url, sent, max_bytes or self.max_bytes)
            if document is not None:
                return document
            url = _judged(url, target)
        raise FetchError(f"{url.host}: more than {self._max_redirects} redirects", Reason.REFUSED)

    async def _once(
        self, url: httpx.URL, headers: Sequence[tuple[str, str]], max_bytes: int
    ) -> tuple[Document | None, str]:
        request = httpx.Request("GET", url, headers=[*headers, ("Accept-Encoding", "gzip")])
        response = await self._pool.handle_async_request(
            httpcore.Request(
                "GET",
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
            )
        )
        try:
            told = httpx.Headers(response.headers)
            if response.status in _REDIRECTS and "location" in told:
                return None, told["location"]
            if response.status != 304 and not 200 <= response.status < 300:
                raise _refusal(url, response.status, told)
            body = b"" if response.status in (204, 304) else await self._body(url, told, response, max_bytes)
            return Document(response.status, told, body), ""
        finally:
            await response.aclose()

    async def _body(
        self, url: httpx.URL, headers: httpx.Headers, response: httpcore.Response, max_bytes: int
    ) -> bytes:
        too_large = FetchError(f"{url.host}: the document is larger than {max_bytes} bytes", Reason.FRAMING)
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > max_bytes):
            raise too_large
        packed = headers.get("content-encoding", "identity").strip().lower()
        if packed not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"{url.host}: packed as {packed!r}, which was not asked for", Reason.FRAMING)
        # wbits 47: gzip or zlib, whichever it is (zlib's inflateInit2).
        unpack = None if packed in ("identity", "") else zlib.decompressobj(wbits=47)
        body = bytearray()
        stream: AsyncIterator[bytes] = aiter(response.stream)  # type: ignore[arg-type]
        async for chunk in stream:
            body += chunk if unpack is None else unpack.decompress(chunk, max_bytes - len(body) + 1)
            if len(body) > max_bytes:
                raise too_large
            if unpack is not None and unpack.unused_data:
                raise FetchError(f"{url.host}: something follows the packed document", Reason.FRAMING)
        if unpack is not None and body and not unpack.eof:
            raise FetchError(f"{url.host}: the packed document is cut short", Reason.FRAMING)
        return bytes(body)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _judged(url: httpx.URL, location: str) -> httpx.URL:
    """Where a redirect leads. Raises `FetchError`."""
    try:
        target = url.join(location)
    except (httpx.InvalidURL, ValueError) as err:
        raise FetchError(f"{url.host}: redirects to something that is no address", Reason.FRAMING) from err
    if target.scheme not in ("http", "https") or not has_host(target):
        raise FetchError(f"{url.host}: redirects to {target.scheme or 'nowhere'}:", Reason.REFUSED)
    if url.scheme == "https" and target.scheme == "http":
        raise FetchError(
            f"{url.host}: redirects from https to http, to {target.host}; refused", Reason.REFUSED
        )
    return target.copy_with(userinfo=b"")


def _refusal(url: httpx.URL, status: int, headers: httpx.Headers) -> FetchError:
    """A status that is no document, as a reason and a remedy."""
    text = f"{url.host} answered {status}"
    wait_s = retry_after_s(headers.get("retry-after", ""))
    if wait_s is not None:
        wait_s = min(wait_s, LONGEST_RETRY_AFTER_S)
    if status in (429, 503):
        asked = "" if wait_s is None else f", to be asked again in {wait_s:g} s"
        return FetchError(f"{text} (busy{asked})", Reason.BUSY, wait_s)
    if status >= 500:
        return FetchError(text, Reason.EXCEPTION, wait_s)
    remedies = {
        401: "; check the credential (auth, secret_file)",
        403: "; it may want a credential (auth) or another user_agent",
        404: "; check the url",
        407: "; a proxy is in the way",
        410: "; the document was taken away",
    }
    return FetchError(text + remedies.get(status, ""), Reason.REFUSED, wait_s)


@contextlib.contextmanager
def _translated(url: httpx.URL, timeout_s: float) -> Any:
    """Foreign errors as ours, once."""
    try:
        yield
    except (TimeoutError, httpcore.TimeoutException) as err:
        raise FetchError(f"{url.host}: no answer within {timeout_s:g} s", Reason.TIMEOUT) from err
    except _Barred as err:
        raise FetchError(str(err), Reason.REFUSED) from err
    except socket.gaierror as err:
        raise FetchError(
            f"{url.host}: the name has no address ({err.strerror})", Reason.DISCONNECTED
        ) from err
    except (httpcore.ProtocolError, httpcore.UnsupportedProtocol, zlib.error, h11_error()) as err:
        raise FetchError(f"{url.host}: not HTTP as it should be: {err}", Reason.FRAMING) from err
    except (OSError, httpcore.NetworkError, ssl.SSLError) as err:
        raise FetchError(f"{url.host}: {str(err) or type(err).__name__}", Reason.DISCONNECTED) from err


def h11_error() -> type[Exception]:
    import h11

    return h11.ProtocolError
