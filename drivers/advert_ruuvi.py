"""RuuviTag, data formats 3 (RAWv1) and 5 (RAWv2): the manufacturer data of one advertisement into raw values. Pure.

By https://docs.ruuvi.com/communication/bluetooth-advertisements, pages "Data format 3" and "Data format 5". A code for
"not available" keeps its number, with reason SENTINEL. Humidity above 100 % "indicates a fault in sensor" (format 3)
or "generally" a faulty or miscalibrated one (format 5), which is DEVICE_FAULT and DEVICE_DOUBT.
"""

from __future__ import annotations

import struct
from typing import Final

from drivers.advert import Advert, AdvertError, Format, Heard, Key, property_table
from drivers.contract import Reason, Value, ValueType

COMPANY: Final = 0x0499

PROPERTIES: Final = property_table(
    ("temperature", ValueType.I16, 0.005, "Cel"),
    ("humidity", ValueType.U16, 0.0025, "%"),
    ("pressure", ValueType.U32, 0.01, "hPa"),  # sent in Pa
    ("acceleration_x", ValueType.I16, 0.001, "[g]"),
    ("acceleration_y", ValueType.I16, 0.001, "[g]"),
    ("acceleration_z", ValueType.I16, 0.001, "[g]"),
    ("voltage", ValueType.U16, 0.001, "V"),
    ("tx_power", ValueType.I8, 1.0, "dBm"),
    ("movement_counter", ValueType.U8, 1.0, ""),
    ("sequence", ValueType.U16, 1.0, ""),
)

_RAW_V1: Final = struct.Struct(">BBBBHhhhH")
_RAW_V2: Final = struct.Struct(">BhHHhhhHBH6s")
_PRESSURE_FROM_PA: Final = 50_000
_BATTERY_FROM_MV: Final = 1_600
_TX_POWER_FROM_DBM: Final = -40

_V1_STEPS: Final = {"temperature": 2, "humidity": 200}  # 0.01 Cel and 0.5 % in our steps
_V1_ALL_HUMIDITY: Final = 200  # 100 %
_V2_ALL_HUMIDITY: Final = 40_000


def decode(data: bytes) -> Advert | None:
    """The data after the company id. Formats other than 3 and 5 (2 and 4 are URLs, 8 is encrypted) are nobody's."""
    kind = data[0] if data else 0
    if kind == 5:
        return _raw_v2(data)
    if kind == 3:
        return _raw_v1(data)
    return None


def _raw_v2(data: bytes) -> Advert:
    if len(data) != _RAW_V2.size:
        raise AdvertError(f"format 5 has {_RAW_V2.size} bytes; {len(data)} came", Reason.FRAMING)
    _, temperature, humidity, pressure, x, y, z, power, moved, sequence, _ = _RAW_V2.unpack(data)
    battery, tx_power = power >> 5, power & 0x1F
    values: dict[str, Value | None] = {
        "temperature": temperature,
        "humidity": humidity,
        "pressure": pressure + _PRESSURE_FROM_PA,
        "acceleration_x": x,
        "acceleration_y": y,
        "acceleration_z": z,
        "voltage": battery + _BATTERY_FROM_MV,
        "tx_power": 2 * tx_power + _TX_POWER_FROM_DBM,
        "movement_counter": moved,
        "sequence": sequence,
    }
    reasons: dict[str, Reason] = {}
    if humidity > _V2_ALL_HUMIDITY:
        reasons["humidity"] = Reason.DEVICE_DOUBT
    # "Largest presentable number for unsigned values, smallest presentable number for signed values."
    if -0x8000 in (temperature, x, y, z) or 0xFFFF in (humidity, pressure, sequence) or moved == 0xFF:
        absent = {
            "temperature": temperature == -0x8000,
            "humidity": humidity == 0xFFFF,
            "pressure": pressure == 0xFFFF,
            "acceleration_x": x == -0x8000,
            "acceleration_y": y == -0x8000,
            "acceleration_z": z == -0x8000,
            "movement_counter": moved == 0xFF,
            "sequence": sequence == 0xFFFF,
        }
        reasons |= {name: Reason.SENTINEL for name, is_absent in absent.items() if is_absent}
    if battery == 0x7FF:
        reasons["voltage"] = Reason.SENTINEL
    if tx_power == 0x1F:
        reasons["tx_power"] = Reason.SENTINEL
    return Advert(values, sequence=None if sequence == 0xFFFF else sequence, reasons=reasons)


def _raw_v1(data: bytes) -> Advert:
    if len(data) != _RAW_V1.size:
        raise AdvertError(f"format 3 has {_RAW_V1.size} bytes; {len(data)} came", Reason.FRAMING)
    _, humidity, whole, hundredths, pressure, x, y, z, millivolts = _RAW_V1.unpack(data)
    # Sign and magnitude: the top bit of the whole degrees is the sign of both.
    celsius = (whole & 0x7F) * 100 + hundredths
    values: dict[str, Value | None] = {
        "temperature": (-celsius if whole & 0x80 else celsius) * _V1_STEPS["temperature"],
        "humidity": humidity * _V1_STEPS["humidity"],
        "pressure": pressure + _PRESSURE_FROM_PA,
        "acceleration_x": x,
        "acceleration_y": y,
        "acceleration_z": z,
        "voltage": millivolts,
    }
    if hundredths > 99:
        values["temperature"] = None
    reasons = {"humidity": Reason.DEVICE_FAULT} if humidity > _V1_ALL_HUMIDITY else {}
    return Advert(values, reasons=reasons)


def _of(heard: Heard, key: Key | None) -> Advert | None:
    data = heard.company_data.get(COMPANY)
    return None if data is None else decode(data)


FORMAT: Final = Format(
    name="ruuvi",
    title="RuuviTag",
    properties=PROPERTIES,
    read=_of,
    companies=frozenset({COMPANY}),
    numbered=True,
)
