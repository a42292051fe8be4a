"""Thermometers with the firmware of ATC1441 or pvvx: service data of UUID 0x181A into raw values. Pure.

Four layouts, told apart by their length: pvvx' "custom" (0.01 units), ATC1441's (0.1 units), and the encrypted forms of
both. By https://github.com/pvvx/ATC_MiThermometer, README "Bluetooth Advertising Formats" and
python-interface/atc_mi_interface/atc_mi_construct.py. UUID 0x181A is the public "Environmental Sensing", so another
length is somebody else's data. (BTHome and MiBeacon, which pvvx can send too, are formats of their own.)
"""

from __future__ import annotations

import struct
from typing import Final

from drivers.advert import (
    Advert,
    AdvertError,
    Format,
    Heard,
    Key,
    Property,
    of_address,
    property_table,
    uuid_of,
)
from drivers.contract import Reason, Value, ValueType

SERVICE_UUID: Final = uuid_of(0x181A)

PROPERTIES: Final = {
    "temperature": Property(
        "temperature", ValueType.I32, 0.01, "Cel", (-327_680, 327_670)
    ),  # ATC1441's are tenths
} | property_table(
    ("humidity", ValueType.U16, 0.01, "%"),
    ("battery", ValueType.U8, 1.0, "%"),
    ("voltage", ValueType.U16, 0.001, "V"),
    ("packet_id", ValueType.U8, 1.0, ""),
    ("reed_switch", ValueType.BOOL, 1.0, ""),
    ("trigger_output", ValueType.BOOL, 1.0, ""),
    ("temperature_trigger", ValueType.BOOL, 1.0, ""),
    ("humidity_trigger", ValueType.BOOL, 1.0, ""),
)

_CUSTOM: Final = struct.Struct("<6shHHBBB")
_ATC: Final = struct.Struct(">6shBBHB")
_SEALED_CUSTOM: Final = struct.Struct("<hHBB")
_SEALED_ATC: Final = struct.Struct("<BBB")
_COUNTER_AND_TAG: Final = 5
_LENGTH_BEYOND_DATA: Final = 3  # the AD structure's own type and UUID, which its length byte counts
_FIRST_TENTH: Final = 40  # ATC1441, encrypted: half degrees from -40


def decode(data: bytes, heard: Heard, key: Key | None = None) -> Advert | None:
    """The service data without its UUID."""
    match len(data):
        case _CUSTOM.size:
            _is_plain(key)
            address, temperature, humidity, millivolts, percent, count, flags = _CUSTOM.unpack(data)
            _is_own(address[::-1], heard)
            values: dict[str, Value | None] = {"temperature": temperature, "humidity": humidity}
            values |= {"battery": percent, "voltage": millivolts, "packet_id": count} | _flags(flags)
        case _ATC.size:
            _is_plain(key)
            address, temperature, humidity, percent, millivolts, count = _ATC.unpack(data)
            _is_own(address, heard)
            values = {"temperature": temperature * 10, "humidity": humidity * 100}
            values |= {"battery": percent, "voltage": millivolts, "packet_id": count}
        case size if size == _SEALED_CUSTOM.size + _COUNTER_AND_TAG:
            temperature, humidity, percent, flags = _SEALED_CUSTOM.unpack(_opened(data, key))
            count = data[0]
            values = {
                "temperature": temperature,
                "humidity": humidity,
                "battery": percent,
                "packet_id": count,
            }
            values |= _flags(flags)
        case size if size == _SEALED_ATC.size + _COUNTER_AND_TAG:
            half_degrees, half_percents, battery = _SEALED_ATC.unpack(_opened(data, key))
            count = data[0]
            values = {"temperature": half_degrees * 50 - _FIRST_TENTH * 100, "humidity": half_percents * 50}
            values |= {"battery": battery & 0x7F, "packet_id": count, "trigger_output": bool(battery & 0x80)}
        case _:
            return None
    return Advert(values, sequence=count)


def _flags(flags: int) -> dict[str, Value | None]:
    return {
        "reed_switch": bool(flags & 0x01),
        "trigger_output": bool(flags & 0x02),
        "temperature_trigger": bool(flags & 0x08),
        "humidity_trigger": bool(flags & 0x10),
    }


def _is_plain(key: Key | None) -> None:
    if key is not None:
        raise AdvertError("message is not encrypted although a key is given", Reason.DECRYPT)


def _is_own(address: bytes, heard: Heard) -> None:
    if not of_address(address, heard):
        raise AdvertError(f"message carries the address {address.hex(':').upper()}", Reason.FRAMING)


def _opened(data: bytes, key: Key | None) -> bytes:
    """Counter, what is sealed, tag."""
    if key is None:
        raise AdvertError("message is encrypted and no key is given", Reason.DECRYPT)
    head = bytes((len(data) + _LENGTH_BEYOND_DATA, 0x16, 0x1A, 0x18, data[0]))
    return key.open(key.address[::-1] + head, data[1:], b"\x11")


def _of(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.service_data.get(SERVICE_UUID)
    return None if data is None else decode(data, heard, key)


FORMAT: Final = Format(
    name="pvvx",
    title="ATC1441 or pvvx",
    properties=PROPERTIES,
    read=_of,
    services=frozenset({SERVICE_UUID}),
    encrypts=True,
    numbered=True,
)
