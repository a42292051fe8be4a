"""The records of an M-Bus telegram (EN 13757-3, formerly EN 1434-3), each a number with its quantity and unit, or the
reason why it is none.

pyMeterBus takes the records apart and holds the table of quantities and units. It is imported by `load` alone. Done
here, because the library gives a number where the standard says that there is none, or leaves it out:

- A record keeps its number in the telegram whatever it holds: one without data counts too.
- BCD with a digit above 9 (but F in the highest place: minus), 80…00 of a signed number, not-a-number of a real: no
  number, NAN.
- A record's own error (a VIFE of 8.4.7 in m-bus.com/documentation-wired) takes the place of its number.
- Correction factors (VIFE E111 0nnn, E111 1101) are applied; an additive one makes the number unusable, DECODE.
- What is short, or does not end where the telegram does, ends the list with FRAMING: nobody knows what follows.
- Numbers stay exact (integers and fractions of integers) until they are a point's.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import msgspec

from drivers.contract import ConfigError, Reason

if TYPE_CHECKING:
    from types import ModuleType

INSTALL: Final = "pip install 'headgate[mbus]'"
FUNCTIONS: Final = ("instantaneous", "maximum", "minimum", "error")  #: by the two bits of the DIF, 6.3.2

Content: TypeAlias = int | float | str | Reason
"""What a record holds: a whole number, a real one, text (dates too, ISO 8601), or why it is none."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One record, as it stands in the telegrams of one readout."""

    number: int  #: counted from 1, through all telegrams of the readout
    function: str
    storage: int
    tariff: int
    subunit: int
    quantity: str  #: a word of `QUANTITIES`; empty: the maker's own, or unknown
    unit: str  #: of `UNITS`, or the meter's own text; empty: the number has none
    factor: Fraction  #: number * factor is in that unit
    codes: bytes  #: VIF and VIFEs, extension bits and error codes left out
    plain: bool  #: nothing modifies the quantity
    content: Content
    flagged: bool = False  #: the meter says of its own clock that it is wrong
    digits: str = ""  #: of a BCD number, as they stand there, leading zeros too

    def __str__(self) -> str:
        where = ", ".join(
            f"{name} {value}"
            for name, value in (("storage", self.storage), ("tariff", self.tariff), ("subunit", self.subunit))
            if value
        )
        what = f"{self.function} {self.quantity or self.codes.hex()}"
        return f"record {self.number} ({what}{', ' + where if where else ''})"


class Records(msgspec.Struct, frozen=True):
    """The records of one telegram."""

    records: tuple[Record, ...]
    more: bool  #: more follow, in the next telegram
    broken: bool  #: the telegram's end could not be read


# ------------------------------------------------------------------------------------------------------------- units


def _units(dimension: str, **sizes: str) -> Iterator[tuple[str, tuple[str, Fraction]]]:
    for name, size in sizes.items():
        yield name.replace("_per_", "/"), (dimension, Fraction(size))


#: A unit's dimension and size.
UNITS: Final[dict[str, tuple[str, Fraction]]] = dict(
    [
        *_units("energy", Wh="3600", kWh="3600e3", MWh="3600e6", GWh="3600e9"),
        *_units("energy", J="1", kJ="1e3", MJ="1e6", GJ="1e9", TJ="1e12"),
        *_units("power", W="1", mW="1/1000", kW="1e3", MW="1e6", GW="1e9"),
        *_units("power", J_per_h="1/3600", kJ_per_h="10/36", MJ_per_h="10000/36", GJ_per_h="10000000/36"),
        *_units("volume", m3="1", dm3="1/1000", l="1/1000", ml="1/1000000", hl="1/10"),
        *_units(
            "volume", gal="0.003785411784", ft3="0.028316846592"
        ),  # US gallon of 231 in³; NIST SP 811, B.8
        *_units("volume_flow", m3_per_h="1", l_per_h="1/1000", m3_per_min="60", l_per_min="6/100"),
        *_units("volume_flow", m3_per_s="3600", l_per_s="36/10", ml_per_s="36/10000"),
        *_units("volume_flow", gal_per_min="0.22712470704", gal_per_h="0.003785411784"),
        *_units("mass", kg="1", g="1/1000", t="1000"),
        *_units("mass_flow", kg_per_h="1", g_per_h="1/1000", t_per_h="1000"),
        *_units("temperature", Cel="1"),
        *_units("temperature_f", degF="1"),
        *_units("difference", K="1", mK="1/1000"),
        *_units("pressure", bar="1", mbar="1/1000", Pa="1/100000", hPa="1/1000", kPa="1/100", MPa="10"),
        *_units("time", s="1", min="60", h="3600", d="86400"),
        *_units("months", mo="1", a="12"),
        *_units("voltage", V="1", mV="1/1000", kV="1000"),
        *_units("current", A="1", mA="1/1000", kA="1000"),
        ("%", ("percent", Fraction(1))),
        *_units("signal", dBm="1"),
        *_units("speed", Bd="1"),
    ]
)
_OTHER_NAMES: Final = {
    "C": "Cel", "°C": "Cel", "degC": "Cel", "°F": "degF", "%RH": "%",
    "L": "l", "L/h": "l/h", "L/min": "l/min", "L/s": "l/s",
}  # fmt: skip


def plain_unit(unit: str) -> str:
    """A unit as it is called here: `m³` and `m^3` are `m3`."""
    unit = unit.strip().replace("³", "3").replace("^", "")
    return _OTHER_NAMES.get(unit, unit)


def conversion(record: Record, unit: str) -> Fraction | None:
    """What to multiply the record's number with, to have it in this unit (empty: the record's own); `None`: it cannot
    be had in it."""
    unit = plain_unit(unit)
    if not unit or unit == record.unit:
        return record.factor
    if not record.unit:
        # A count may be called what one likes, but not kilowatt-hours.
        return None if unit in UNITS else record.factor
    here, wanted = UNITS.get(record.unit), UNITS.get(unit)
    if here is None or wanted is None or here[0] != wanted[0]:
        return None
    return record.factor * here[1] / wanted[1]


# -------------------------------------------------------------------------------------------------------- quantities

#: The library's name for a quantity, ours, and what its unit must be one of (empty: it has none).
_QUANTITIES: Final = {
    "ENERGY_WH": ("energy", "energy"), "ENERGY_J": ("energy", "energy"), "Energy": ("energy", "energy"),
    "VOLUME": ("volume", "volume"), "Volume": ("volume", "volume"), "MASS": ("mass", "mass"), "Mass": ("mass", "mass"),
    "ON_TIME": ("on_time", "time"), "OPERATING_TIME": ("operating_time", "time"),
    "POWER_W": ("power", "power"), "POWER_J_H": ("power", "power"), "Power": ("power", "power"),
    "VOLUME_FLOW": ("volume_flow", "volume_flow"), "VOLUME_FLOW_EXT": ("volume_flow", "volume_flow"),
    "VOLUME_FLOW_EXT_S": ("volume_flow", "volume_flow"), "Volume flow": ("volume_flow", "volume_flow"),
    "MASS_FLOW": ("mass_flow", "mass_flow"),
    "FLOW_TEMPERATURE": ("flow_temperature", "temperature"), "Flow temperature": ("flow_temperature", "temperature"),
    "RETURN_TEMPERATURE": ("return_temperature", "temperature"),
    "Return temperature": ("return_temperature", "temperature"),
    "TEMPERATURE_DIFFERENCE": ("temperature_difference", "difference"),
    "Temperature difference": ("temperature_difference", "difference"),
    "EXTERNAL_TEMPERATURE": ("external_temperature", "temperature"),
    "External temperature": ("external_temperature", "temperature"),
    "Cold / Warm Temperature Limit": ("temperature_limit", "temperature"),
    "PRESSURE": ("pressure", "pressure"), "RELATIVE_HUMIDITY": ("relative_humidity", "percent"),
    "Cumul count max power": ("cumulated_maximum_power", "power"),
    "DATE": ("date", ""), "DATE_TIME_GENERAL": ("date_time", ""), "UNITS_FOR_HCA": ("heat_cost", ""),
    "AVG_DURATION": ("averaging_duration", "time"), "ACTUALITY_DURATION": ("actuality_duration", "time"),
    "FABRICATION_NO": ("fabrication_number", ""), "IDENTIFICATION": ("identification", ""),
    "ADDRESS": ("bus_address", ""),
    "CURRENCY_CREDIT": ("credit", ""), "CURRENCY_DEBIT": ("debit", ""), "ACCESS_NUMBER": ("access_number", ""),
    "MEDIUM": ("medium", ""), "MANUFACTURER": ("manufacturer", ""), "PARAMETER_SET_ID": ("parameter_set", ""),
    "MODEL_VERSION": ("model_version", ""), "HARDWARE_VERSION": ("hardware_version", ""),
    "FIRMWARE_VERSION": ("firmware_version", ""), "SOFTWARE_VERSION": ("software_version", ""),
    "CUSTOMER_LOCATION": ("customer_location", ""), "CUSTOMER": ("customer", ""),
    "ERROR_FLAGS": ("error_flags", ""), "ERROR_MASKS": ("error_mask", ""),
    "DIGITAL_OUTPUT": ("digital_output", ""), "DIGITAL_INPUT": ("digital_input", ""),
    "BAUDRATE": ("baud", "speed"), "FIRST_STORAGE_NR": ("first_storage", ""), "LAST_STORAGE_NR": ("last_storage", ""),
    "SIZE_OF_STORAGE_BLOCK": ("storage_block_size", ""), "STORAGE_INTERVAL": ("storage_interval", "time"),
    "DURATION_SINCE_LAST_READOUT": ("since_readout", "time"), "DURATION_OF_TARIFF": ("tariff_duration", "time"),
    "PERIOD_OF_TARIFF": ("tariff_period", "time"), "DIMENSIONLESS": ("dimensionless", ""),
    "VOLTS": ("voltage", "voltage"), "AMPERE": ("current", "current"), "RESET_COUNTER": ("reset_counter", ""),
    "CUMULATION_COUNTER": ("cumulation_counter", ""), "CONTROL_SIGNAL": ("control_signal", ""),
    "DAY_OF_WEEK": ("day_of_week", ""), "WEEK_NUMBER": ("week_number", ""),
    "DURATION_SINCE_LAST_CUMULATION": ("since_cumulation", "time"),
    "OPERATING_TIME_BATTERY": ("battery_time", "time"), "DATEAND_TIME_OF_BATTERY_CHANGE": ("battery_change", ""),
    "RSSI": ("signal", "signal"),
}  # fmt: skip
QUANTITIES: Final = dict(_QUANTITIES.values())
_LIBRARY_UNITS: Final = {
    "none": "", "m^3": "m3", "m^3/h": "m3/h", "m^3/min": "m3/min", "m^3/s": "m3/s", "C": "Cel", "seconds": "s",
    "date": "", "date time": "", "H.C.A": "", "Currency unit": "", "Baud": "Bd", "feet^3": "ft3",
    "American gallon": "gal", "American gallon/min": "gal/min", "American gallon/h": "gal/h",
}  # fmt: skip
#: Where the library's table differs from the standard's (EN 13757-3, tables of the main and both extended VIFs), or
#: has none: quantity, unit, factor. A month and a year are no number of seconds.
_CORRECTED: Final = {
    0x208: ("Energy", "J", "1e8"), 0x209: ("Energy", "J", "1e9"),  # FB 08, 09: 0.1 GJ, 1 GJ
    0x21B: ("RELATIVE_HUMIDITY", "%", "1"),
    0x230: ("Power", "J/h", "1e8"), 0x231: ("Power", "J/h", "1e9"),  # there: J
    0x279: ("Cumul count max power", "W", "1/100"),  # there: 1/1000, as for 278
    0x128: ("STORAGE_INTERVAL", "mo", "1"), 0x129: ("STORAGE_INTERVAL", "a", "1"),
    0x131: ("DURATION_OF_TARIFF", "min", "1"), 0x132: ("DURATION_OF_TARIFF", "h", "1"),
    0x133: ("DURATION_OF_TARIFF", "d", "1"),
    0x138: ("PERIOD_OF_TARIFF", "mo", "1"), 0x139: ("PERIOD_OF_TARIFF", "a", "1"),
    0x16A: ("DURATION_SINCE_LAST_CUMULATION", "mo", "1"), 0x16B: ("DURATION_SINCE_LAST_CUMULATION", "a", "1"),
    0x16E: ("OPERATING_TIME_BATTERY", "mo", "1"), 0x16F: ("OPERATING_TIME_BATTERY", "a", "1"),
}  # fmt: skip
#: Bits, not numbers: without a sign.
_BITS: Final = frozenset({"error_flags", "error_mask", "digital_output", "digital_input", "control_signal"})

# Record errors, in the slave's direction: a VIFE of its own (m-bus.com/documentation-wired, 8.4.7).
_ERRORS: Final = {
    **dict.fromkeys(range(0x01, 0x10), Reason.REFUSED),  # storage, tariff, … not implemented
    0x15: Reason.MISSING,  # no data available
    0x16: Reason.OVERFLOW,
    0x17: Reason.OVERFLOW,  # underflow
    0x18: Reason.EXCEPTION,  # data error
    0x1C: Reason.FRAMING,  # premature end of record
}
_FACTORS: Final = {0x70 + n: Fraction(10) ** (n - 6) for n in range(8)} | {0x7D: Fraction(1000)}
_ADDED: Final = range(0x78, 0x7C)
#: From here on codes have other meanings: the second table of combinable codes, the maker's own.
_OTHER_TABLE: Final = (0x7C, 0x7F)


# ----------------------------------------------------------------------------------------------------------- library


class _Block(Protocol):
    parts: list[int]


class _ValueBlock(_Block, Protocol):
    @property
    def customVIF(self) -> _Block: ...  # noqa: N802


class _Record(Protocol):
    """What is used of pyMeterBus' TelegramVariableDataRecord, for it has no types."""

    @property
    def dataField(self) -> _Block: ...  # noqa: N802
    @property
    def dib(self) -> _Block: ...
    @property
    def vib(self) -> _ValueBlock: ...


class _LeastByteFirst:
    """What the library asks of a telegram whose records it reads."""

    isLSBOrder = True  # noqa: N815

    @property
    def bodyHeader(self) -> _LeastByteFirst:  # noqa: N802
        return self


def refuse_without_library() -> None:
    """Raise `ConfigError` where pyMeterBus is not installed. Imports nothing."""
    if importlib.util.find_spec("meterbus") is None:
        raise ConfigError(f"needs pyMeterBus, which is not installed: {INSTALL}")


def load() -> None:
    """Import the library (some 150 ms), so that the first `records` does not have to."""
    _library()


def _library() -> ModuleType:
    """pyMeterBus. Its import calls logging.basicConfig, which does nothing where the root logger has a handler."""
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)
    try:
        import meterbus
    except ImportError as exc:
        raise ConfigError(f"pyMeterBus cannot be imported ({exc}): {INSTALL}") from exc
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return meterbus  # type: ignore[no-any-return]  # it has no types


# ----------------------------------------------------------------------------------------------------------- records


def records(data: bytes, first: int = 1) -> Records:
    """The records in a telegram's data, after its header; the first of them has this number."""
    library = _library()
    payload = library.TelegramBodyPayload(list(data), _LeastByteFirst())
    found: list[Record] = []
    at = 0
    while at < len(data):
        if data[at] == 0x2F:  # fills the telegram
            at += 1
            continue
        if data[at] in (0x0F, 0x1F):  # the maker's own follows, or nothing
            return Records(tuple(found), more=data[at] == 0x1F, broken=False)
        payload.records = []
        try:
            end = payload._parse_variable_data_rec(at)
            if end > len(data):
                break
            read: _Record = payload.records[0] if payload.records else _without_data(library, data[at:end])
            lvar = data[end - len(read.dataField.parts) - 1] if data[at] & 0x0F == 0x0D else 0
            if not _length_is_known(lvar):
                break
            found.append(_record(library, read, first + len(found), is_binary=lvar >= 0xE0))
        except (IndexError, KeyError, ValueError, library.MBusFrameDecodeError):
            break
        at = end
    return Records(tuple(found), more=False, broken=at < len(data))


def _length_is_known(lvar: int) -> bool:
    """Of data of variable length (table 5, LVAR): text and binary numbers. Of the others (BCD, reals) editions and
    programs differ in how long they are, so nobody knows where the next record begins."""
    return lvar < 0xC0 or 0xE0 <= lvar < 0xF0


def normalised(vib: bytes) -> tuple[bytes, list[int]]:
    """A VIF with its VIFEs without extension bits, and which of them (they stand at the end) modify it."""
    codes = [code & 0x7F for code in vib]
    own = len(codes) if codes[0] == 0x7F else 2 if vib[0] in (0xFD, 0xFB) else 1
    return bytes(codes[:own]), codes[own:]


def _sorted_out(modifiers: list[int]) -> tuple[list[int], Reason | None, Fraction]:
    """Of modifying codes: those that remain, the error that one of them tells, the factor of others."""
    kept: list[int] = []
    trouble: Reason | None = None
    factor = Fraction(1)
    for index, code in enumerate(modifiers):
        if code in _OTHER_TABLE:
            kept += modifiers[index:]
            break
        if code in _ERRORS:
            trouble = trouble or _ERRORS[code]
        elif code in _FACTORS:
            factor *= _FACTORS[code]
        elif code in _ADDED:
            trouble = trouble or Reason.DECODE
        elif code:
            kept.append(code)
    return kept, trouble, factor


def codes_of(vib: bytes) -> bytes:
    """What a VIF with its VIFEs is known by: without extension bits, errors and factors."""
    own, modifiers = normalised(vib)
    return own + bytes(_sorted_out(modifiers)[0])


def _without_data(library: ModuleType, head: bytes) -> _Record:
    """A record of no data, which the library leaves out: read again with one byte of them, then taken off."""
    low = head[0] & 0x0F
    if low == 0x0D:
        head = head[:-1]
    payload = library.TelegramBodyPayload([head[0] & 0xF0 | 0x01, *head[1:], 0], _LeastByteFirst())
    payload._parse_variable_data_rec(0)
    read: _Record = payload.records[0]
    read.dib.parts[0] = head[0]
    read.dataField.parts = []
    return read


def _record(library: ModuleType, read: _Record, number: int, *, is_binary: bool) -> Record:
    dib, vib = list(read.dib.parts), list(read.vib.parts)
    storage, tariff, subunit = _places(dib)
    own, modifiers = normalised(bytes(vib))
    key, text = own[0], ""
    if len(own) > 1 and vib[0] in (0xFD, 0xFB):
        key = (0x100 if vib[0] == 0xFD else 0x200) | own[1]
    elif key == 0x7C:
        key, text = -1, bytes(read.vib.customVIF.parts)[::-1].decode("latin-1")
    word, unit, size = _meaning(library, key)
    kept, trouble, factor = _sorted_out(modifiers)
    content, flagged, digits = _content(dib[0] & 0x0F, bytes(read.dataField.parts), word, unit)
    if is_binary:
        content = bytes(read.dataField.parts).hex(" ").upper()
    if any(0x20 <= code <= 0x38 for code in kept):
        unit = ""  # per hour, per litre, times seconds: another unit than the quantity's
    return Record(
        number=number, function=FUNCTIONS[dib[0] >> 4 & 3], storage=storage, tariff=tariff, subunit=subunit,
        quantity=word, unit=plain_unit(text) if text else unit, factor=size * factor, codes=own + bytes(kept),
        plain=not kept, content=trouble or content, flagged=flagged, digits=digits,
    )  # fmt: skip


def _places(dib: list[int]) -> tuple[int, int, int]:
    """Storage number, tariff and subunit: bits of the DIF and each DIFE, lowest first (6.3.2)."""
    storage, tariff, subunit = dib[0] >> 6 & 1, 0, 0
    for index, more in enumerate(dib[1:]):
        storage |= (more & 0x0F) << (1 + 4 * index)
        tariff |= (more >> 4 & 3) << (2 * index)
        subunit |= (more >> 6 & 1) << index
    return storage, tariff, subunit


def _meaning(library: ModuleType, key: int) -> tuple[str, str, Fraction]:
    """Quantity, unit and factor of a VIF."""
    if key in _CORRECTED:
        name, unit, size = _CORRECTED[key]
        return _QUANTITIES[name][0], unit, Fraction(size)
    entry = library.VIFTable.lut.get(key)
    if entry is None:
        return "", "", Fraction(1)
    factor, measured, kind = entry
    word = _QUANTITIES.get(getattr(kind, "name", kind), ("", ""))[0]
    if not word:
        return "", "", Fraction(1)
    name = getattr(measured, "value", measured)
    return word, _LIBRARY_UNITS.get(name, name), Fraction(repr(factor))


# ------------------------------------------------------------------------------------------------------------- data

_WIDTHS: Final = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 6, 7: 8, 8: 0, 9: 1, 10: 2, 11: 3, 12: 4, 14: 6}


def _content(form: int, data: bytes, word: str, unit: str) -> tuple[Content, bool, str]:
    """What the data field says by its form (6.3.2, table 5): content, whether the meter itself doubts it, and the
    digits of BCD."""
    if form != 0x0D and len(data) != _WIDTHS[form]:
        return Reason.FRAMING, False, ""
    if not data:
        return Reason.MISSING, False, ""
    if form == 0x0D:
        # Text comes last character first; what is none is shown as it came.
        text = data[::-1].decode("latin-1")
        return text if text.isprintable() else data.hex(" ").upper(), False, ""
    if word in ("date", "date_time", "battery_change") and form in (2, 4, 6):
        return *_moment(data), ""
    if form == 5:
        real = struct.unpack("<f", data)[0]
        if not math.isfinite(real):
            return Reason.NAN if math.isnan(real) else Reason.INFINITE, False, ""
        return real, False, ""
    if form >= 9:
        return *_bcd(data), data[::-1].hex().upper()
    if word in _BITS:
        return int.from_bytes(data, "little"), False, ""
    number = int.from_bytes(data, "little", signed=True)
    if unit and number == -(1 << (8 * len(data) - 1)):
        return Reason.NAN, False, ""  # type B: only the sign bit set says "invalid" (EN 13757-3, annex A)
    return number, False, ""


def _bcd(data: bytes) -> tuple[int | Reason, bool]:
    """Type A: A to F in any digit tell an error, but F in the highest is a minus (annex A)."""
    digits = data[::-1].hex()
    if digits.isdecimal():
        return int(digits), False
    if digits[0] == "f" and digits[1:].isdecimal():
        return -int(digits[1:]), False
    return Reason.NAN, False


def _moment(data: bytes) -> tuple[str | Reason, bool]:
    """Types G (date), F (to the minute) and I (to the second), as ISO 8601 in the meter's own local time."""
    invalid = False
    second = minute = hour = 0
    if len(data) == 2:
        day, month = data
    elif len(data) == 4:
        invalid = bool(data[0] & 0x80)
        minute, hour, day, month = data[0] & 0x3F, data[1] & 0x1F, data[2], data[3]
    else:
        invalid = bool(data[1] & 0x80)
        second, minute, hour, day, month = data[0] & 0x3F, data[1] & 0x3F, data[2] & 0x1F, data[3], data[4]
    year = day >> 5 | (month & 0xF0) >> 1
    century = data[1] >> 5 & 3 if len(data) == 4 else 0
    # Without a century (older meters), 0 to 80 are 2000 to 2080 (annex A, type F and G).
    year += 1900 + 100 * century if century else 2000 if year <= 80 else 1900
    try:
        at = datetime.datetime(year, month & 0x0F, day & 0x1F, hour, minute, second)  # noqa: DTZ001 - has no zone
    except ValueError:
        return Reason.DECODE, False
    return at.date().isoformat() if len(data) == 2 else at.isoformat(), invalid
