"""M-Bus' link layer (EN 13757-2; m-bus.com/documentation-wired, chapter 5): what is sent, and what came, judged.

Rules: a telegram counts only if both lengths, both start characters, the stop character and the sum are right; what is
before it (an adapter's echo of our own question, noise) is no part of it. Pure: bytes in, plain values out.
"""

from __future__ import annotations

from typing import Final

import msgspec

from drivers.contract import Reason

ACK: Final = 0xE5
_SHORT, _LONG, _STOP = 0x10, 0x68, 0x16
SND_NKE: Final = 0x40  #: initialise: the slave answers with ACK, and forgets which frame count bit came last
_SND_UD: Final = 0x53
_REQ_UD2: Final = 0x5B  #: with the frame count bit valid
_FCB: Final = 0x20
_RSP_UD: Final = 0x08
_RSP_BITS: Final = 0xCF  #: of a reply's C field, without access demand and data flow control
_SELECT: Final = 0x52  #: CI field: select by secondary address
NETWORK: Final = 253  #: the address of whoever is selected
ANYBODY: Final = 254  #: everybody answers, so it must be alone
_LONGEST: Final = 1024  #: a telegram has 261 bytes at most; more are a line that babbles


class Telegram(msgspec.Struct, frozen=True):
    """A long frame that came: who sent it, what kind of data it holds, the data."""

    address: int
    ci: int
    data: bytes


def _short(control: int, address: int) -> bytes:
    return bytes((_SHORT, control, address, (control + address) & 0xFF, _STOP))


def initialise(address: int) -> bytes:
    """SND_NKE: to `NETWORK`, whoever is selected is no more."""
    return _short(SND_NKE, address)


def request(address: int, *, fcb: bool) -> bytes:
    """REQ_UD2. A slave that sees the same frame count bit again repeats its last telegram; another one is asked for the
    next (EN 13757-2, 5.7)."""
    return _short(_REQ_UD2 | (_FCB if fcb else 0), address)


def select(wanted: bytes) -> bytes:
    """SND_UD to `NETWORK`: the slave whose secondary address this is answers with ACK, all others are deselected."""
    return long_frame(_SND_UD, NETWORK, _SELECT, wanted)


def long_frame(control: int, address: int, ci: int, data: bytes) -> bytes:
    body = bytes((control, address, ci)) + data
    return bytes((_LONG, len(body), len(body), _LONG)) + body + bytes((sum(body) & 0xFF, _STOP))


# ------------------------------------------------------------------------------------------------------------ heard


def _after_echo(heard: bytes, sent: bytes) -> int:
    """Where an answer may begin; -1: what was heard may be the begin of our own question's echo."""
    if heard.startswith(sent):
        return len(sent)
    return -1 if sent.startswith(heard) else 0


def acknowledged(heard: bytes, sent: bytes) -> int:
    """How many bytes there are to the end of the ACK; 0: none has come."""
    begin = _after_echo(heard, sent)
    if begin < 0:
        return 0
    at = heard.find(ACK, begin)
    return at + 1 if at >= 0 else len(heard) if len(heard) > _LONGEST else 0


def _frame(heard: bytes, sent: bytes) -> tuple[int, int] | None:
    """Where the first frame begins and ends; `None`: none is whole yet."""
    at = _after_echo(heard, sent)
    if at < 0:
        return None
    while (at := heard.find(_LONG, at)) >= 0 and len(heard) >= at + 4:
        length = heard[at + 1]
        if length >= 3 and heard[at + 2] == length and heard[at + 3] == _LONG:
            end = at + 4 + length + 2
            return (at, end) if len(heard) >= end else None
        at += 1
    return None


def telegram_size(heard: bytes, sent: bytes) -> int:
    """How many bytes there are to the end of the first frame, right or damaged; 0: it goes on."""
    found = _frame(heard, sent)
    return found[1] if found is not None else len(heard) if len(heard) > _LONGEST else 0


def telegram(heard: bytes, sent: bytes) -> Telegram | Reason:
    """The telegram that `telegram_size` bytes hold, or what is wrong with them."""
    found = _frame(heard, sent)
    if found is None:
        return Reason.FRAMING
    frame = heard[found[0] : found[1]]
    body = frame[4:-2]
    if sum(body) & 0xFF != frame[-2]:
        return Reason.CRC
    if frame[-1] != _STOP or body[0] & _RSP_BITS != _RSP_UD:
        return Reason.FRAMING
    return Telegram(body[1], body[2], body[3:])


# --------------------------------------------------------------------------------------------------- secondary address


def secondary(text: str) -> bytes | None:
    """A secondary address as it is sent: eight digits of the identification (F: any digit), then, as the bus carries
    them, four of the manufacturer, two of version and two of medium (FF: any). `None`: this is none."""
    text = text.upper().ljust(16, "F") if len(text) == 8 else text.upper()
    if len(text) != 16 or not text.isascii() or not all(char in "0123456789ABCDEF" for char in text):
        return None
    if any(char in "ABCDE" for char in text[:8]):
        return None
    return bytes.fromhex(text[:8])[::-1] + bytes.fromhex(text[8:])


def answers(wanted: bytes, found: bytes) -> bool:
    """Is a meter of the second address one of those that the first asks for?"""
    for index, (want, have) in enumerate(zip(wanted, found, strict=True)):
        if index < 4:
            if any(digit(want) not in (0xF, digit(have)) for digit in (_high, _low)):
                return False
        elif want not in (0xFF, have):
            return False
    return True


def secondary_text(found: bytes) -> str:
    """A secondary address as `secondary` takes it."""
    return (found[:4][::-1] + found[4:]).hex().upper()


def _high(byte: int) -> int:
    return byte >> 4


def _low(byte: int) -> int:
    return byte & 0xF
