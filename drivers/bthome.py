"""BTHome v2: the service data of one advertisement into raw values. Pure; the only error it raises is `AdvertError`.

The tables are those of https://bthome.io/format/ (as of 2026-04-30): every object id with its size, sign and factor.

One property may be sent under several object ids (a temperature as 0.01 °C in 16 bits, or as 0.35 °C in 8). So that a
point has one type and one scale whatever its sensor sends, the raw value is counted in the finest published step of the
property; every published factor is a whole multiple of it, so nothing is rounded: 0x58 with -22 is -770 steps of 0.01.

Why not the library `bthome-ble` (3.25)? It gives floats already multiplied, takes 119 µs for an advert of four values
where this takes 6, and with habluetooth and the rest adds 10.5 MB to a gateway that has 64 (bleak already counted).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from drivers.advert import Advert, AdvertError, Format, Heard, Key, Property, uuid_of
from drivers.contract import Reason, Value, ValueType

SERVICE_UUID: Final = uuid_of(0xFCD2)

_ENCRYPTED = 0x01
_WITH_ADDRESS = 0x02  # "reserved" today; until 2023 it meant that the six bytes of the address follow
_TRIGGERED = 0x04
_VERSION_SHIFT = 5
_VERSION = 2


class _Form(enum.Enum):
    """How the bytes of an object are read, where it is not a number."""

    FLAG = enum.auto()
    TEXT = enum.auto()
    RAW = enum.auto()
    VERSION = enum.auto()
    DIMMER = enum.auto()
    COMMAND = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    name: str
    size: int  #: bytes; 0: the next byte tells
    signed: bool = False
    steps: int = 1  #: of the property's finest step
    form: _Form | None = None


# Object id, property, bytes, signed?, factor, unit. Units are UCUM where the page's own is not.
_NUMBERS: Final[tuple[tuple[int, str, int, bool, str, str], ...]] = (
    (0x00, "packet_id", 1, False, "1", ""),
    (0x51, "acceleration", 2, False, "0.001", "m/s2"),
    (0x63, "acceleration", 4, True, "0.000001", "m/s2"),
    (0x01, "battery", 1, False, "1", "%"),
    (0x60, "channel", 1, False, "1", ""),
    (0x12, "co2", 2, False, "1", "ppm"),
    (0x56, "conductivity", 2, False, "1", "uS/cm"),
    (0x09, "count", 1, False, "1", ""),
    (0x3D, "count", 2, False, "1", ""),
    (0x3E, "count", 4, False, "1", ""),
    (0x59, "count", 1, True, "1", ""),
    (0x5A, "count", 2, True, "1", ""),
    (0x5B, "count", 4, True, "1", ""),
    (0x43, "current", 2, False, "0.001", "A"),
    (0x5D, "current", 2, True, "0.001", "A"),
    (0x08, "dewpoint", 2, True, "0.01", "Cel"),
    (0x5E, "direction", 2, False, "0.01", "deg"),
    (0x40, "distance_mm", 2, False, "1", "mm"),
    (0x41, "distance_m", 2, False, "0.1", "m"),
    (0x42, "duration", 3, False, "0.001", "s"),
    (0x4D, "energy", 4, False, "0.001", "kWh"),
    (0x0A, "energy", 3, False, "0.001", "kWh"),
    (0x4B, "gas", 3, False, "0.001", "m3"),
    (0x4C, "gas", 4, False, "0.001", "m3"),
    (0x52, "gyroscope", 2, False, "0.001", "deg/s"),
    (0x03, "humidity", 2, False, "0.01", "%"),
    (0x2E, "humidity", 1, False, "1", "%"),
    (0x05, "illuminance", 3, False, "0.01", "lx"),
    (0x64, "light_level", 1, False, "1", ""),
    (0x06, "mass_kg", 2, False, "0.01", "kg"),
    (0x07, "mass_lb", 2, False, "0.01", "[lb_av]"),
    (0x14, "moisture", 2, False, "0.01", "%"),
    (0x2F, "moisture", 1, False, "1", "%"),
    (0x0D, "pm2_5", 2, False, "1", "ug/m3"),
    (0x0E, "pm10", 2, False, "1", "ug/m3"),
    (0x0B, "power", 3, False, "0.01", "W"),
    (0x5C, "power", 4, True, "0.01", "W"),
    (0x5F, "precipitation", 2, False, "0.1", "mm"),
    (0x04, "pressure", 3, False, "0.01", "hPa"),
    (0x3F, "rotation", 2, True, "0.1", "deg"),
    (0x61, "rotational_speed", 2, False, "1", "{rpm}"),
    (0x65, "settings_revision", 1, False, "1", ""),
    (0x44, "speed", 2, False, "0.01", "m/s"),
    (0x62, "speed", 4, True, "0.000001", "m/s"),
    (0x57, "temperature", 1, True, "1", "Cel"),
    (0x58, "temperature", 1, True, "0.35", "Cel"),
    (0x45, "temperature", 2, True, "0.1", "Cel"),
    (0x02, "temperature", 2, True, "0.01", "Cel"),
    (0x50, "timestamp", 4, False, "1", "s"),  # seconds since 1970-01-01 UTC
    (0x13, "tvoc", 2, False, "1", "ug/m3"),
    (0x0C, "voltage", 2, False, "0.001", "V"),
    (0x4A, "voltage", 2, False, "0.1", "V"),
    (0x4E, "volume", 4, False, "0.001", "L"),
    (0x47, "volume", 2, False, "0.1", "L"),
    (0x48, "volume", 2, False, "0.001", "L"),  # published as 1 mL
    (0x55, "volume_storage", 4, False, "0.001", "L"),
    (0x49, "volume_flow_rate", 2, False, "0.001", "m3/h"),
    (0x46, "uv_index", 1, False, "0.1", ""),
    (0x4F, "water", 4, False, "0.001", "L"),
    (0x3A, "button", 1, False, "1", ""),  # an event: 1 press, 2 double press, … (see the page)
    (0xF0, "device_type_id", 2, False, "1", ""),
)

# Binary sensors. Four share their name with a number, so they say what true means.
_FLAGS: Final[tuple[tuple[int, str], ...]] = (
    (0x15, "battery_low"),
    (0x16, "battery_charging"),
    (0x17, "carbon_monoxide"),
    (0x18, "cold"),
    (0x19, "connectivity"),
    (0x1A, "door"),
    (0x1B, "garage_door"),
    (0x1C, "gas_detected"),
    (0x0F, "generic_boolean"),
    (0x1D, "heat"),
    (0x1E, "light"),
    (0x1F, "lock"),
    (0x20, "moisture_detected"),
    (0x21, "motion"),
    (0x22, "moving"),
    (0x23, "occupancy"),
    (0x11, "opening"),
    (0x24, "plug"),
    (0x10, "power_on"),
    (0x25, "presence"),
    (0x26, "problem"),
    (0x27, "running"),
    (0x28, "safety"),
    (0x29, "smoke"),
    (0x2A, "sound"),
    (0x2B, "tamper"),
    (0x2C, "vibration"),
    (0x2D, "window"),
)

# Objects that are no single number.
_OTHERS: Final[tuple[tuple[int, str, int, _Form], ...]] = (
    (0x53, "text", 0, _Form.TEXT),
    (0x54, "raw", 0, _Form.RAW),
    (0x3B, "command", 0, _Form.COMMAND),
    (0x3C, "dimmer", 2, _Form.DIMMER),
    (0xF1, "firmware_version", 4, _Form.VERSION),
    (0xF2, "firmware_version", 3, _Form.VERSION),
)

# Smallest first: what a property's raw values fit into, from all object ids that carry it.
_INT_TYPES: Final = (
    (ValueType.U8, 0, (1 << 8) - 1),
    (ValueType.I8, -(1 << 7), (1 << 7) - 1),
    (ValueType.U16, 0, (1 << 16) - 1),
    (ValueType.I16, -(1 << 15), (1 << 15) - 1),
    (ValueType.U32, 0, (1 << 32) - 1),
    (ValueType.I32, -(1 << 31), (1 << 31) - 1),
    (ValueType.I64, -(1 << 63), (1 << 63) - 1),
)


def _build() -> tuple[tuple[_Object | None, ...], dict[str, Property]]:
    objects: list[_Object | None] = [None] * 256
    properties: dict[str, Property] = {}
    ranges: dict[str, tuple[int, int]] = {}
    finest: dict[str, Fraction] = {}
    for _, name, _, _, factor, _ in _NUMBERS:
        finest[name] = min(Fraction(factor), finest.get(name, Fraction(factor)))
    for number, name, size, signed, factor, unit in _NUMBERS:
        steps = Fraction(factor) / finest[name]
        if steps.denominator != 1:
            raise AssertionError(f"{name}: {factor} is not a whole multiple of {finest[name]}")
        objects[number] = _Object(name, size, signed, steps.numerator)
        low, high = (-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1) if signed else (0, (1 << 8 * size) - 1)
        so_far = ranges.get(name, (0, 0))
        ranges[name] = (min(so_far[0], low * steps.numerator), max(so_far[1], high * steps.numerator))
        kind = next(
            kind for kind, least, most in _INT_TYPES if least <= ranges[name][0] and ranges[name][1] <= most
        )
        properties[name] = Property(name, kind, float(finest[name]), unit, ranges[name])
    for number, name in _FLAGS:
        objects[number] = _Object(name, 1, form=_Form.FLAG)
        properties[name] = Property(name, ValueType.BOOL)
    for number, name, size, form in _OTHERS:
        objects[number] = _Object(name, size, form=form)
        properties[name] = Property(name, ValueType.STR)
    # Events of two parts: which, and how far or with what.
    properties["dimmer"] = Property("dimmer", ValueType.U8)
    properties["dimmer_steps"] = Property("dimmer_steps", ValueType.U8)
    properties["command"] = Property("command", ValueType.U8)
    properties["command_args"] = Property("command_args", ValueType.STR)
    return tuple(objects), properties


_OBJECTS, PROPERTIES = _build()
"""What a point's `object` may name, without the `_2` of a second one."""


def _opened(key: Key, information: int, body: bytes) -> tuple[bytes, int]:
    """The objects of an encrypted message, and its counter (https://bthome.io/encryption/)."""
    if len(body) < 8:
        raise AdvertError("encrypted message is too short", Reason.FRAMING)
    counter = body[-8:-4]
    nonce = key.address + b"\xd2\xfc" + bytes((information,)) + counter
    return key.open(nonce, body[:-8] + body[-4:]), int.from_bytes(counter, "little")


def decode(data: bytes, key: Key | None = None) -> Advert:
    """The service data of UUID 0xFCD2, without the UUID. With a `key`, only what is encrypted by it is believed."""
    if not data:
        raise AdvertError("message is empty", Reason.FRAMING)
    information = data[0]
    if information >> _VERSION_SHIFT != _VERSION:
        raise AdvertError(f"BTHome version {information >> _VERSION_SHIFT}; only 2 is read", Reason.FRAMING)
    begin = 1
    if information & _WITH_ADDRESS:
        begin = 7
        if len(data) < begin:
            raise AdvertError("message is cut off in its address", Reason.FRAMING)
    triggered = bool(information & _TRIGGERED)
    counter = None
    if information & _ENCRYPTED:
        if key is None:
            raise AdvertError("message is encrypted and no key is given", Reason.DECRYPT)
        data, counter = _opened(key, information, data[begin:])
        begin = 0
    elif key is not None:
        raise AdvertError("message is not encrypted although a key is given", Reason.DECRYPT)
    values, unknown = _read(data, begin)
    packet_id = values.get("packet_id")
    return Advert(values, packet_id if isinstance(packet_id, int) else None, counter, triggered, unknown)


def _read(data: bytes, at: int) -> tuple[dict[str, Value | None], int | None]:
    """The objects from `at` on. An id that is not known has no known size, so it ends the reading; sensors send them
    in rising order, which puts the newest ids last."""
    values: dict[str, Value | None] = {}
    end = len(data)
    from_bytes = int.from_bytes
    while at < end:
        number = data[at]
        found = _OBJECTS[number]
        if found is None:
            return values, number
        at += 1
        size = found.size
        if not size:
            if at >= end:
                raise AdvertError(f"object 0x{number:02X} is cut off", Reason.FRAMING)
            # The length of a command counts its arguments, in the low 5 bits; its code comes before them.
            size = (data[at] & 0x1F) + 1 if found.form is _Form.COMMAND else data[at]
            at += 1
        after = at + size
        if after > end:
            raise AdvertError(f"object 0x{number:02X} is cut off", Reason.FRAMING)
        name = found.name
        nth = ""
        if name in values:
            nth = _nth(values, name)
            name += nth
        if found.form is None:
            values[name] = from_bytes(data[at:after], "little", signed=found.signed) * found.steps
        else:
            values[name] = _other(found.form, data[at:after])
            if found.form is _Form.DIMMER:
                values["dimmer_steps" + nth] = data[at + 1]
            elif found.form is _Form.COMMAND:
                values["command_args" + nth] = data[at + 1 : after].hex()
        at = after
    return values, None


def _other(form: _Form, data: bytes) -> Value | None:
    match form:
        case _Form.FLAG:
            # "Its value should be 1 for on, and 0 for off."
            return bool(data[0]) if data[0] < 2 else None
        case _Form.TEXT:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                return None
        case _Form.RAW:
            return data.hex()
        case _Form.VERSION:
            return ".".join(str(part) for part in reversed(data))
        case _Form.DIMMER | _Form.COMMAND:
            return data[0]


def _nth(values: Mapping[str, Value | None], name: str) -> str:
    """The suffix of a property that is there already: `_2`, `_3`, … in the order of the message."""
    nth = 2
    while f"{name}_{nth}" in values:
        nth += 1
    return f"_{nth}"


def _of(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.service_data.get(SERVICE_UUID)
    return None if data is None else decode(data, key)


FORMAT: Final = Format(
    name="bthome",
    title="BTHome v2",
    properties=PROPERTIES,
    read=_of,
    services=frozenset({SERVICE_UUID}),
    encrypts=True,
)
