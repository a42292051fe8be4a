"""Xiaomi's MiBeacon, versions 2 to 5: service data of UUID 0xFE95 into raw values. Pure.

Frame, encryption and objects by https://iot.mi.com/new/doc/accesses/direct-access/embedded-development/ble (MiBeacon
protocol; object definition), as https://github.com/pvvx/ATC_MiThermometer/tree/master/InfoMijiaBLE has it in English;
objects from 0x4800 on, which differ by model, by https://github.com/Bluetooth-Devices/xiaomi-ble.

Rules:
- Versions 4 and 5 seal their objects with AES-CCM. The encryption of versions 2 and 3 carries no proof of its key (a
  wrong one gives numbers, not an error), so it is not read: reason DECRYPT.
- Objects say their own length: one that is not in the table is stepped over, one of the wrong length is DECODE.
- Temperatures and humidities that newer models send as floats are rounded to 0.01, finer than any of these measures.
- A frame without objects ("I am here") is nobody's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

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

SERVICE_UUID: Final = uuid_of(0xFE95)

PROPERTIES: Final = {
    "temperature": Property("temperature", ValueType.I32, 0.01, "Cel", (-327_680, 327_670)),
} | property_table(
    ("humidity", ValueType.U16, 0.01, "%"),
    ("illuminance", ValueType.U32, 0.01, "lx"),
    ("moisture", ValueType.U8, 1.0, "%"),
    ("conductivity", ValueType.U16, 1.0, "uS/cm"),
    ("battery", ValueType.U8, 1.0, "%"),
    ("battery_low", ValueType.BOOL, 1.0, ""),
    ("formaldehyde", ValueType.U16, 0.01, "mg/m3"),
    ("consumable", ValueType.U8, 1.0, "%"),
    ("idle_time", ValueType.U32, 1.0, "s"),
    ("power_on", ValueType.BOOL, 1.0, ""),
    ("moisture_detected", ValueType.BOOL, 1.0, ""),
    ("smoke", ValueType.BOOL, 1.0, ""),
    ("light", ValueType.BOOL, 1.0, ""),
    ("motion", ValueType.BOOL, 1.0, ""),
    ("occupancy", ValueType.BOOL, 1.0, ""),
    ("opening", ValueType.BOOL, 1.0, ""),
    ("left_open", ValueType.BOOL, 1.0, ""),
    ("door", ValueType.BOOL, 1.0, ""),
    ("tamper", ValueType.BOOL, 1.0, ""),
    ("button", ValueType.U8, 1.0, ""),  # BTHome's numbers: 1 press, 2 double press, 4 long press
    ("button_index", ValueType.U16, 1.0, ""),
    ("packet_id", ValueType.U8, 1.0, ""),
)

_MESH = 1 << 7
_OBJECTS = 1 << 6
_CAPABILITY = 1 << 5
_ADDRESS = 1 << 4
_ENCRYPTED = 1 << 3
_VERSION_SHIFT = 12
_OLDEST = 2
_SEALED_FROM = 4  # the first version whose encryption proves its key
_CAPABILITY_IO = 0x20
_HEAD = 5  # frame control, product, frame counter
_COUNTER_AND_TAG = 7

_PRESSES: Final = {0: 1, 1: 2, 2: 4}

# Products whose "moving" object (0x000F) says something of the light besides.
_LIGHT_BY_THRESHOLD: Final = frozenset({0x07F6, 0x0A8D})  # MJYD02YL, RTCGQ02LM: 100 and more is light
_LIGHT_IN_LUX: Final = frozenset({0x0A83})  # CGPR1
# Products whose illuminance (0x1007) is a yes or no: 100 is light.
_LIGHT_AS_FLAG: Final = frozenset({0x07F6, 0x098B})  # MJYD02YL, MCCGQ02HL

Values: TypeAlias = dict[str, Value | None]
_Reader: TypeAlias = Callable[[bytes, int], Values]


def _number(
    name: str, size: int, steps: int = 1, *, signed: bool = False
) -> tuple[int, tuple[str, ...], _Reader]:
    def read(data: bytes, product: int) -> Values:
        return {name: int.from_bytes(data, "little", signed=signed) * steps}

    return size, (name,), read


def _flag(name: str) -> tuple[int, tuple[str, ...], _Reader]:
    def read(data: bytes, product: int) -> Values:
        return {name: data[0] > 0}

    return 1, (name,), read


def _float(name: str) -> tuple[int, tuple[str, ...], _Reader]:
    def read(data: bytes, product: int) -> Values:
        (value,) = struct.unpack("<f", data)
        hundredths = round(value * 100) if math.isfinite(value) and abs(value) < 300 else None
        return {name: hundredths if hundredths is None or name == "temperature" or hundredths >= 0 else None}

    return 4, (name,), read


def _lux(data: bytes) -> int | None:
    (value,) = struct.unpack("<f", data)
    return round(value * 100) if math.isfinite(value) and 0 <= value <= 1e7 else None


def _float_lux(data: bytes, product: int) -> Values:
    return {"illuminance": _lux(data)}


def _motion_and_lux(data: bytes, product: int) -> Values:
    return {"motion": True, "illuminance": _lux(data)}


def _moving(data: bytes, product: int) -> Values:
    light = int.from_bytes(data, "little")
    if product in _LIGHT_BY_THRESHOLD:
        return {"motion": True, "light": light >= 100}
    if product in _LIGHT_IN_LUX:
        return {"motion": True, "illuminance": light * 100}
    return {"motion": True}


def _illuminance(data: bytes, product: int) -> Values:
    light = int.from_bytes(data, "little")
    return {"light": light == 100} if product in _LIGHT_AS_FLAG else {"illuminance": light * 100}


def _moving_at_all(data: bytes, product: int) -> Values:
    return {"motion": True}


def _still(data: bytes, product: int) -> Values:
    return {"motion": False}


def _temperature_and_humidity(data: bytes, product: int) -> Values:
    temperature, humidity = struct.unpack("<hH", data)
    return {"temperature": temperature * 10, "humidity": _hundredths(humidity)}


def _hundredths(tenths: int) -> int | None:
    """In hundredths; what 16 bits of those do not hold is far beyond all humidity."""
    return tenths * 10 if tenths <= 6553 else None


def _humidity(data: bytes, product: int) -> Values:
    return {"humidity": _hundredths(int.from_bytes(data, "little"))}


def _kettle(data: bytes, product: int) -> Values:
    return {"power_on": data[0] > 0, "temperature": data[1] * 100}


def _button(data: bytes, product: int) -> Values:
    return {"button": _PRESSES.get(data[2]), "button_index": data[0] | data[1] << 8}


def _opening(data: bytes, product: int) -> Values:
    """0 opened, 1 closed, 2 open for too long, 3 reset."""
    state = data[0]
    return {"opening": {0: True, 1: False, 2: True}.get(state), "left_open": state == 2}


def _door(data: bytes, product: int) -> Values:
    """0 opened, 1 closed, 2 not closed in time, 3 knocked at, 4 pried open, 5 stuck."""
    return {"door": {0: True, 1: False, 2: True, 3: False, 4: True, 5: False}.get(data[0])}


def _opening_from_1(data: bytes, product: int) -> Values:
    return {"opening": {1: True, 2: False}.get(data[0])}


def _opening_from_0(data: bytes, product: int) -> Values:
    return {"opening": {0: True, 1: False}.get(data[0])}


def _left_open(data: bytes, product: int) -> Values:
    return {"opening": True, "left_open": True} if data[0] == 1 else {"left_open": None}


def _removed(data: bytes, product: int) -> Values:
    return {"tamper": data[0] == 1}


# Object id: bytes, what it tells, how. An id that is missing here is stepped over and named in `Advert.unknown`.
_OBJECT_TABLE: Final[dict[int, tuple[int, tuple[str, ...], _Reader]]] = {
    0x0003: (1, ("motion",), _moving_at_all),
    0x0007: (1, ("door",), _door),
    0x000A: _number("temperature", 2, 1, signed=True),  # of a body
    0x000F: (3, ("motion",), _moving),
    0x1001: (3, ("button", "button_index"), _button),
    0x1004: _number("temperature", 2, 10, signed=True),
    0x1005: (2, ("power_on", "temperature"), _kettle),
    0x1006: (2, ("humidity",), _humidity),
    0x1007: (3, ("illuminance",), _illuminance),
    0x1008: _number("moisture", 1),
    0x1009: _number("conductivity", 2),
    0x100A: _number("battery", 1),
    0x100D: (4, ("temperature", "humidity"), _temperature_and_humidity),
    0x1010: _number("formaldehyde", 2),
    0x1012: _flag("power_on"),
    0x1013: _number("consumable", 1),
    0x1014: _flag("moisture_detected"),
    0x1015: _flag("smoke"),
    0x1017: _number("idle_time", 4),
    0x1018: _flag("light"),
    0x1019: (1, ("opening", "left_open"), _opening),
    0x101B: (4, ("motion",), _still),
    0x4801: _float("temperature"),
    0x4802: _number("humidity", 1, 100),
    0x4803: _number("battery", 1),
    0x4804: (1, ("opening",), _opening_from_1),
    0x4805: (4, ("illuminance",), _float_lux),
    0x4806: _flag("moisture_detected"),
    0x4808: _float("humidity"),
    0x480C: (1, ("opening",), _opening_from_0),
    0x4818: _number("idle_time", 2),
    0x484E: _flag("occupancy"),
    0x4A01: _flag("battery_low"),
    0x4A08: (4, ("motion", "illuminance"), _motion_and_lux),
    0x4A0F: (1, ("tamper",), _removed),
    0x4A12: (1, ("opening",), _opening_from_1),
    0x4A1A: (1, ("left_open",), _left_open),
    0x4C01: _float("temperature"),
    0x4C02: _number("humidity", 1, 100),
    0x4C03: _number("battery", 1),
    0x4C08: _float("humidity"),
    0x4E01: _flag("battery_low"),
    0x5003: _number("battery", 1),
}


def decode(data: bytes, heard: Heard, key: Key | None = None) -> Advert | None:
    """The service data without its UUID."""
    if len(data) < _HEAD:
        raise AdvertError("message is cut off in its head", Reason.FRAMING)
    control = data[0] | data[1] << 8
    version = control >> _VERSION_SHIFT
    if control & _MESH or not control & _OBJECTS:
        return None
    if version < _OLDEST:
        raise AdvertError(f"MiBeacon version {version}; 2 to 5 are read", Reason.FRAMING)
    begin = _HEAD
    if control & _ADDRESS:
        begin += 6
        if len(data) < begin:
            raise AdvertError("message is cut off in its address", Reason.FRAMING)
        if not of_address(data[_HEAD:begin][::-1], heard):
            raise AdvertError("message carries another device's address", Reason.FRAMING)
    if control & _CAPABILITY:
        begin += 1
        if len(data) < begin:
            raise AdvertError("message is cut off in its capabilities", Reason.FRAMING)
        if data[begin - 1] & _CAPABILITY_IO:
            begin += 1
    if len(data) < begin:
        raise AdvertError("message is cut off in its capabilities", Reason.FRAMING)
    if control & _ENCRYPTED:
        objects = _opened(data, begin, version, key)
    elif key is not None:
        raise AdvertError("message is not encrypted although a key is given", Reason.DECRYPT)
    else:
        objects = data[begin:]
    values, unknown = _read(objects, data[2] | data[3] << 8)
    if not values and unknown is None:
        return None
    values["packet_id"] = data[4]
    return Advert(values, unknown=unknown, sequence=data[4])


def _opened(data: bytes, begin: int, version: int, key: Key | None) -> bytes:
    if version < _SEALED_FROM:
        raise AdvertError(
            f"MiBeacon {version}'s encryption cannot tell a wrong key, so it is not read", Reason.DECRYPT
        )
    if key is None:
        raise AdvertError("message is encrypted and no key is given", Reason.DECRYPT)
    if len(data) < begin + _COUNTER_AND_TAG:
        raise AdvertError("encrypted message is too short", Reason.FRAMING)
    # Address, product and frame counter, extended counter; the sender's address as it goes over the air.
    nonce = key.address[::-1] + data[2:_HEAD] + data[-7:-4]
    return key.open(nonce, data[begin:-7] + data[-4:], b"\x11")


def _read(data: bytes, product: int) -> tuple[Values, int | None]:
    """Every object, and the first id that is not known."""
    values: Values = {}
    unknown: int | None = None
    at, end = 0, len(data)
    while at < end:
        if at + 3 > end or at + 3 + data[at + 2] > end:
            raise AdvertError("an object is cut off", Reason.FRAMING)
        number, size = data[at] | data[at + 1] << 8, data[at + 2]
        at += 3
        found = _OBJECT_TABLE.get(number)
        if found is None:
            unknown = number if unknown is None else unknown
        elif size != found[0]:
            values |= dict.fromkeys(found[1])
        else:
            values |= found[2](data[at : at + size], product)
        at += size
    return values, unknown


def _of(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.service_data.get(SERVICE_UUID)
    return None if data is None else decode(data, heard, key)


FORMAT: Final = Format(
    name="mibeacon",
    title="Xiaomi MiBeacon",
    properties=PROPERTIES,
    read=_of,
    services=frozenset({SERVICE_UUID}),
    encrypts=True,
    numbered=True,
)
