"""The way to the cloud, as the forwarder sees it: hand over a batch, get the cloud's own word.

Rules: `send` returns only when the cloud's journal holds the batch, and nothing else counts (no PUBACK, no closed
socket). Several `send` calls may be under way at once. An uplink never resends by itself, never splits a batch and
never changes a byte: the forwarder decides. TLS is never downgraded.

Errors, by who acts::

    UplinkError
    ├── LinkDown        the way is broken or was never there: back off, open again
    ├── AckTimeout      sent, but no word came in time: resend the same bytes
    ├── RetryLater      the cloud asks to wait `after_s` (full journal, quota)
    └── BatchRefused    the cloud will never take this batch as it is (code, text): split, then park and report

Both uplinks (`sync.mqtt`, `sync.https`) pass `tests/uplink_conformance.py`.
"""

from __future__ import annotations

from typing import Protocol

from sync.wire import Ack, Sealed


class UplinkError(Exception):
    """The root of what an uplink may raise."""


class LinkDown(UplinkError):
    """There is no way to the cloud now; the text says which step failed (DNS, connect, TLS, login, subscribe), `cause`
    in one word: dns, refused, timeout, tls, credential, silent, or down."""

    def __init__(self, text: str, cause: str = "down") -> None:
        super().__init__(text)
        self.cause = cause


class AckTimeout(UplinkError):
    """The cloud did not answer for this batch in time."""


class RetryLater(UplinkError):
    """The cloud asks to send this again, no sooner than `after_s` seconds from now."""

    def __init__(self, text: str, after_s: float) -> None:
        super().__init__(text)
        self.after_s = after_s


class BatchRefused(UplinkError):
    """The cloud (or the broker) will never accept these bytes; `code` is one word for counters."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class Uplink(Protocol):
    """One way to the cloud. Not reentrant in `open` and `close`; `send` and `report` may overlap."""

    @property
    def name(self) -> str:
        """ "kind host:port", of the way in use."""

    async def open(self) -> None:
        """Make the way usable. Raises `LinkDown`. May be called again after any `LinkDown`."""

    async def send(self, batch: Sealed) -> Ack:
        """Send these bytes; return the cloud's ack that covers the whole batch (its ranges may cover more).
        Raises any `UplinkError`."""

    async def report(self, state: bytes) -> None:
        """Send one heartbeat, best effort: nothing waits for it. Raises `LinkDown`."""

    async def close(self) -> None:
        """Let go of the way; pending `send` calls raise `LinkDown`. Never raises."""
