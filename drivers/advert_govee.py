"""Govee thermometers and hygrometers: manufacturer data into raw values. Pure.

Govee publishes no format. What is here is what two well-kept open-source parsers agree on and test with recordings of
real devices: https://github.com/Bluetooth-Devices/govee-ble and https://github.com/custom-components/ble_monitor.

Rules:
- The model is told by company id and length, and where these are shared, by the name. Without the name such an
  advertisement is not read at all: the same six bytes are 24.8 °C of one model and something else of another.
- The battery's byte has a bit for "the sensor has failed": DEVICE_FAULT. A temperature outside -40…100 °C, which no
  model of theirs can measure, is RANGE.
- Most send their values in the scan response: an active scan is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from drivers.advert import Advert, Format, Heard, Key, Property, property_table
from drivers.contract import Reason, Value, ValueType

PROPERTIES: Final = {
    "temperature": Property("temperature", ValueType.I32, 0.01, "Cel", (-83_880, 83_880)),
} | property_table(
    ("humidity", ValueType.U16, 0.01, "%"),
    ("battery", ValueType.U8, 1.0, "%"),
    ("co2", ValueType.U16, 1.0, "ppm"),
    ("pm2_5", ValueType.U16, 1.0, "ug/m3"),
)

OWN: Final = 0xEC88  #: most models
SHARED: Final = 0x0001  #: Nokia's by right; Govee's newer models send it
H5179: Final = 0x8801

_LITTLE: Final = struct.Struct("<hHB")
_LEAST, _MOST = -40_00, 100_00  # hundredths of a degree
_GLUED_ON: Final = b"INTELLI_ROCKS"  # an iBeacon of theirs, which some stacks append with its 25 bytes
_GLUED_BYTES: Final = 25

# Names that stand in the six bytes of company 1 and in the eight of the same with two more: GVH5102_AB12, GV51085242.
_SIX: Final = (
    "H5100",
    "H5101",
    "H5102",
    "H5103",
    "H5104",
    "H5105",
    "H5108",
    "H5110",
    "H5174",
    "H5177",
    "GV5179",
)
_EIGHT: Final = ("5108",)


def decode(company: int, data: bytes, name: str) -> Advert | None:
    """The data after the company id."""
    if len(data) > _GLUED_BYTES and _GLUED_ON in data:
        data = data[:-_GLUED_BYTES]
    reader = _reader(company, len(data), name)
    return None if reader is None else reader(data)


def _reader(company: int, size: int, name: str) -> Callable[[bytes], Advert | None] | None:
    if company == OWN:
        # 6: H5072, H5075, H5129; 7: H5074; 9: H5051, H5052, H5071
        return {6: _packed_at_1, 7: _little_at_1, 9: _little_at_1}.get(size)
    if company == H5179:
        return _little_at_4 if size == 9 else None
    if size == 9:
        return _h5178
    if size == 8 and "5112" in name:
        return _h5112
    if size == 8 and "5140" in name:
        return _h5140
    if size == 8 and any(model in name for model in _EIGHT):
        return _packed_at_2
    if size == 6 and "H5106" in name:
        return _h5106
    if size == 6 and any(model in name for model in _SIX):
        return _packed_at_2
    return None


def _packed_at_1(data: bytes) -> Advert:
    return _packed(data[1:4], data[4])


def _packed_at_2(data: bytes) -> Advert:
    return _packed(data[2:5], data[5])


def _little_at_1(data: bytes) -> Advert:
    return _little(data, 1)


def _little_at_4(data: bytes) -> Advert:
    return _little(data, 4)


def _little(data: bytes, at: int) -> Advert:
    temperature, humidity, battery = _LITTLE.unpack_from(data, at)
    return _measured(temperature, humidity, battery, failed=False)


def _packed(three: bytes, battery: int, nth: str = "") -> Advert:
    temperature, humidity = _unpacked(three)
    return _measured(temperature, humidity, battery & 0x7F, failed=bool(battery & 0x80), nth=nth)


def _unpacked(three: bytes) -> tuple[int, int]:
    """Both in hundredths. One number of 23 bits and a sign: tenths of a degree times 1000, plus tenths of a percent."""
    number = int.from_bytes(three, "big")
    tenths, humidity = divmod(number & 0x7FFFFF, 1000)
    return (-tenths if number & 0x800000 else tenths) * 10, humidity * 10


def _measured(temperature: int, humidity: int, battery: int, *, failed: bool, nth: str = "") -> Advert:
    reasons: dict[str, Reason] = {}
    if failed:
        reasons = {"temperature" + nth: Reason.DEVICE_FAULT, "humidity" + nth: Reason.DEVICE_FAULT}
    elif not _LEAST <= temperature <= _MOST:
        # Both come out of one number, so both are wrong.
        reasons = {"temperature" + nth: Reason.RANGE, "humidity" + nth: Reason.RANGE}
    values: dict[str, Value | None] = {
        "temperature" + nth: temperature,
        "humidity" + nth: humidity,
        "battery" + nth: battery,
    }
    return Advert(values, reasons=reasons)


def _h5178(data: bytes) -> Advert | None:
    """The outdoor part's values come as `temperature_2` and so on; byte 2 tells which part speaks."""
    if data[2] > 1:
        return None
    return _packed(data[3:6], data[6], nth="_2" if data[2] else "")


def _h5112(data: bytes) -> Advert | None:
    """Two probes: the first has humidity too."""
    nth = {0x41: "", 0x82: "_2"}.get(data[7])
    if nth is None:
        return None
    one = _packed(data[2:5], data[5], nth)
    values = {name: value for name, value in one.values.items() if not (nth and name == "humidity_2")}
    # The battery is the device's, whichever probe speaks.
    values["battery"] = values.pop("battery" + nth)
    return Advert(values, reasons={name: why for name, why in one.reasons.items() if name in values})


def _h5140(data: bytes) -> Advert:
    temperature, humidity = _unpacked(data[2:5])
    co2 = int.from_bytes(data[5:7], "big")
    one = _measured(temperature, humidity, 0, failed=bool(data[7]))
    values = {name: value for name, value in one.values.items() if name != "battery"} | {"co2": co2}
    reasons = one.reasons | ({"co2": one.reasons["humidity"]} if "humidity" in one.reasons else {})
    return Advert(values, reasons=reasons)


def _h5106(data: bytes) -> Advert:
    number = int.from_bytes(data[2:6], "big")
    tenths, rest = divmod(number & 0x7FFFFFFF, 1_000_000)
    permille, pm2_5 = divmod(rest, 1000)
    temperature = (-tenths if number & 0x80000000 else tenths) * 10
    one = _measured(temperature, permille * 10, 0, failed=False)
    values = {name: value for name, value in one.values.items() if name != "battery"} | {"pm2_5": pm2_5}
    return Advert(values, reasons=one.reasons)


def _of(heard: Heard, key: Key | None) -> Advert | None:
    for company, data in heard.company_data.items():
        if company in COMPANIES:
            found = decode(company, data, heard.name)
            if found is not None:
                return found
    return None


COMPANIES: Final = frozenset({OWN, SHARED, H5179})

FORMAT: Final = Format(name="govee", title="Govee", properties=PROPERTIES, read=_of, companies=COMPANIES)
