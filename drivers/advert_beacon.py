"""Beacons: Eddystone's telemetry frame, and iBeacon. Pure.

Eddystone: https://github.com/google/eddystone/blob/master/eddystone-tlm/tlm-plain.md. Its identifying frames (UID, URL,
EID) carry no reading and are passed over. What a beacon says of its own temperature is `beacon_temperature`, counted in
1/256 of a degree as it is sent.

iBeacon: Apple's "Proximity Beacon Specification" R1: company 0x004C, type 0x02, length 0x15, UUID, major, minor, and
the power measured at one metre.
"""

from __future__ import annotations

import struct
import uuid
from typing import Final

from drivers.advert import Advert, AdvertError, Format, Heard, Key, property_table, uuid_of
from drivers.contract import Reason, Value, ValueType

EDDYSTONE_UUID: Final = uuid_of(0xFEAA)
APPLE: Final = 0x004C

EDDYSTONE_PROPERTIES: Final = property_table(
    ("voltage", ValueType.U16, 0.001, "V"),
    ("beacon_temperature", ValueType.I16, 1 / 256, "Cel"),
    ("advert_count", ValueType.U32, 1.0, ""),
    ("uptime", ValueType.U32, 0.1, "s"),
)
IBEACON_PROPERTIES: Final = property_table(
    ("uuid", ValueType.STR, 1.0, ""),
    ("major", ValueType.U16, 1.0, ""),
    ("minor", ValueType.U16, 1.0, ""),
    ("tx_power", ValueType.I8, 1.0, "dBm"),
)

_TLM: Final = 0x20
_TLM_ENCRYPTED: Final = 1  # its version
_TELEMETRY: Final = struct.Struct(">BBHhII")
_IBEACON: Final = struct.Struct(">BB16sHHb")


def decode_eddystone(data: bytes) -> Advert | None:
    """The service data of UUID 0xFEAA."""
    if not data or data[0] != _TLM:
        return None
    if len(data) > 1 and data[1] == _TLM_ENCRYPTED:
        raise AdvertError("telemetry is encrypted, which only its owner's resolver can read", Reason.DECRYPT)
    if len(data) != _TELEMETRY.size or data[1]:
        raise AdvertError("telemetry is cut off, or of a version other than 0", Reason.FRAMING)
    _, _, millivolts, temperature, adverts, tenths = _TELEMETRY.unpack(data)
    values: dict[str, Value | None] = {
        "voltage": millivolts,
        "beacon_temperature": temperature,
        "advert_count": adverts,
        "uptime": tenths,
    }
    reasons: dict[str, Reason] = {}
    if not millivolts:  # "if not supported … the value should be zeroed"
        reasons["voltage"] = Reason.SENTINEL
    if temperature == -0x8000:
        reasons["beacon_temperature"] = Reason.SENTINEL
    return Advert(values, sequence=adverts, reasons=reasons)


def decode_ibeacon(data: bytes) -> Advert | None:
    """The manufacturer data of Apple, which has many kinds; type 2 is this one."""
    if len(data) < 2 or data[0] != 0x02 or data[1] != 0x15:
        return None
    if len(data) < _IBEACON.size:
        raise AdvertError("iBeacon is cut off", Reason.FRAMING)
    _, _, proximity, major, minor, tx_power = _IBEACON.unpack_from(data)
    return Advert(
        {"uuid": str(uuid.UUID(bytes=proximity)), "major": major, "minor": minor, "tx_power": tx_power}
    )


def _eddystone(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.service_data.get(EDDYSTONE_UUID)
    return None if data is None else decode_eddystone(data)


def _ibeacon(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.company_data.get(APPLE)
    return None if data is None else decode_ibeacon(data)


EDDYSTONE: Final = Format(
    name="eddystone",
    title="Eddystone TLM",
    properties=EDDYSTONE_PROPERTIES,
    read=_eddystone,
    services=frozenset({EDDYSTONE_UUID}),
    numbered=True,
)
IBEACON: Final = Format(
    name="ibeacon",
    title="iBeacon",
    properties=IBEACON_PROPERTIES,
    read=_ibeacon,
    companies=frozenset({APPLE}),
)
