"""What the formats of Bluetooth advertisements have in common: what was heard, what it said, and why it said nothing.

Rules for a format's decoder:

1. Pure. The only error it raises is `AdvertError`, whatever the bytes.
2. `None` means "not mine": another format's data, or a frame of mine that carries no reading.
3. A value is the raw number in its property's step; nothing is rounded, but where the sender itself sends floats. What
   the sender marks as not available or faulty keeps its number and gets a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from drivers.contract import Reason, Value, ValueType

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESCCM

KEY_BYTES: Final = 16  #: AES-128, in every format that encrypts
_TAG_BYTES: Final = 4  #: likewise


def uuid_of(short: int) -> str:
    """A 16-bit UUID as BlueZ writes it (Bluetooth Core 5.4, vol. 3, part B, 2.5.1)."""
    return f"{short:08x}-0000-1000-8000-00805f9b34fb"


class AdvertError(Exception):
    """These bytes claim to be a message of a format, and cannot be read. `reason` goes on the points."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text)
        self.reason = reason


class Property(msgspec.Struct, frozen=True):
    """What a point can name: the type and step of its raw value, and its unit."""

    name: str
    type: ValueType
    scale: float = 1.0
    unit: str = ""
    span: tuple[int, int] | None = None  #: what the sender can say, where that is less than the type holds


class Heard(msgspec.Struct, frozen=True):
    """One advertisement of one sender: only what this very advertisement carried."""

    address: str  #: "A4:C1:38:0B:5F:2E"
    taken_at_ns: int
    rssi: int | None = None  #: dBm
    service_data: Mapping[str, bytes] = {}  #: by UUID, as BlueZ writes it
    company_data: Mapping[int, bytes] = {}  #: "manufacturer specific data", by company id
    name: str = ""  #: as far as it is known yet


class Advert(msgspec.Struct, frozen=True, gc=False):
    """What one message said. `values` holds what it carried by property, the second of a kind as `temperature_2`;
    `None` is a value that was there but cannot be read."""

    values: dict[str, Value | None]
    packet_id: int | None = None  #: 0..255; the same again within seconds is the same message again
    counter: int | None = None  #: of an encrypted message; only grows
    triggered: bool = False  #: the sensor sends when something happens, not at an interval
    unknown: int | None = None  #: the first object that is not in the table
    sequence: int | None = None  #: the same again is the same measurement again, however late
    reasons: dict[str, Reason] = {}  #: of values that are there and not good, by property


class Key:
    """The key of one sensor: AES-CCM with a 4-byte tag, as BTHome, pvvx and MiBeacon 4 and 5 have it."""

    def __init__(self, key: bytes, address: str) -> None:
        """`key` has 16 bytes; `address` is the sensor's, as `AA:BB:CC:DD:EE:FF`."""
        from cryptography.hazmat.primitives.ciphers.aead import AESCCM

        self._cipher: AESCCM = AESCCM(key, tag_length=_TAG_BYTES)
        self.address: Final = bytes.fromhex(address.replace(":", ""))  #: as it is written

    def open(self, nonce: bytes, sealed: bytes, associated: bytes | None = None) -> bytes:
        """What is sealed, its tag at the end. Raises `AdvertError`."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < _TAG_BYTES:
            raise AdvertError("encrypted message is too short", Reason.FRAMING)
        try:
            return self._cipher.decrypt(nonce, sealed, associated)
        except InvalidTag:
            raise AdvertError("does not decrypt with this key", Reason.DECRYPT) from None


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """One format: which advertisements may be its own, and how they are read."""

    name: str  #: as the option `format` has it
    title: str
    properties: Mapping[str, Property]
    read: Callable[[Heard, Key | None], Advert | None]
    services: frozenset[str] = frozenset()  #: UUIDs of the service data that it sends
    companies: frozenset[int] = frozenset()  #: company ids of the manufacturer data that it sends
    encrypts: bool = False  #: it knows keys
    numbered: bool = False  #: each new measurement changes the bytes, so that a passive scan hears it


def of_address(data: bytes, heard: Heard) -> bool:
    """Is this the sender's address, as bytes in the order of writing?"""
    return data.hex() == heard.address.replace(":", "").lower()


def property_table(*rows: tuple[str, ValueType, float, str]) -> dict[str, Property]:
    """Name, type, step, unit."""
    return {name: Property(name, kind, scale, unit) for name, kind, scale, unit in rows}
