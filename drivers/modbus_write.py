"""What a Modbus write sends, what must confirm it, and what it must read back as. Pure.

Rules: only what the configuration asks for is written, and only within its limits; a value that its registers cannot
hold is refused before anything is sent, never clamped.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from pymodbus.pdu import ModbusPDU
from pymodbus.pdu.bit_message import WriteMultipleCoilsRequest, WriteSingleCoilRequest
from pymodbus.pdu.register_message import (
    MaskWriteRegisterRequest,
    WriteMultipleRegistersRequest,
    WriteSingleRegisterRequest,
)

from drivers import codec
from drivers.contract import PointRefused, Value, engineering
from drivers.modbus_plan import Table
from drivers.modbus_table import ModbusPoint

_CONFIRMED: Final = 5  #: bytes that confirm a write: function, address, and value (5, 6) or quantity (15, 16)


class Writing(msgspec.Struct, frozen=True):
    """A write: the request's PDU, the confirmation it must get, and what it must read back as."""

    value: Value
    pdu: bytes
    confirmation: bytes
    expected: Value


def whole(point: ModbusPoint, value: Value, data: bytes, expected: Value, *, single: bool) -> Writing:
    """Whole registers; with `single`, one of them by the function for one (6), else by that for many (16)."""
    registers = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    kind = WriteSingleRegisterRequest if single and len(registers) == 1 else WriteMultipleRegistersRequest
    pdu = pdu_of(kind(address=point.register, registers=registers))
    return Writing(value, pdu, pdu[:_CONFIRMED], expected)


def unknown(point: ModbusPoint, writing: Writing, unconfirmed: str, why: str) -> str:
    sent = f"no confirmation ({unconfirmed})" if unconfirmed else "the device confirmed the write"
    return (
        f"{point.name}: {sent}, and it cannot be read back ({why}): whether {writing.value!r} was written is not "
        "known, and it was not sent again"
    )


def other_way(function: int) -> str:
    """What may help where the device does not know the function that was used."""
    if function in (5, 6):
        return "; if it knows functions 15 and 16 alone, say write_single = false in its options"
    if function == 22:
        return "; it seems not to know function 22: say write_bits = 'rewrite' in its options"
    return "; if it knows functions 5 and 6 alone, say write_single = true in its options"


def allow(point: ModbusPoint, value: Value) -> None:
    """Raises `PointRefused` for what the configuration does not let be written."""
    if point.table in (Table.INPUT, Table.DISCRETE):
        raise PointRefused(point.name, f"the {point.table} table is read only")
    if not point.writable:
        raise PointRefused(point.name, "not writable; if it is to be, say so in its table: writable = true")
    if isinstance(value, bool | str):
        return
    shown = engineering(value, point.scale, point.offset)
    if not math.isfinite(shown):
        raise PointRefused(point.name, f"{value!r} is not a number")
    low = -math.inf if point.valid_min is None else point.valid_min
    high = math.inf if point.valid_max is None else point.valid_max
    if not low <= shown <= high:
        raise PointRefused(point.name, f"{shown:g} is outside valid_min..valid_max ({low:g}..{high:g})")
    if point.one_of is not None and shown not in point.one_of:
        raise PointRefused(point.name, f"{shown:g} is not one of {', '.join(f'{n:g}' for n in point.one_of)}")
    if value in point.not_available:
        raise PointRefused(point.name, f"{value!r} is the device's code for no value (not_available)")


def switching(point: ModbusPoint, value: Value, *, single: bool) -> Writing:
    """A coil, by function 5 or 15. Raises `ValueError`."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    kind = WriteSingleCoilRequest if single else WriteMultipleCoilsRequest
    pdu = pdu_of(kind(address=point.register, bits=[value]))
    return Writing(value, pdu, pdu[:_CONFIRMED], value)


def masking(point: ModbusPoint, value: Value, masks: tuple[int, int], field: codec.Field) -> Writing:
    """Function 22: what stands there AND the first mask, OR the second (Modbus application protocol 1.1b3, 6.16)."""
    if field.registers > 1:
        raise ValueError("two registers are not written by one mask; say write_bits = 'rewrite'")
    clear, put = (_swapped(mask) if codec.swaps_bytes(field.order) else mask for mask in masks)
    pdu = pdu_of(MaskWriteRegisterRequest(address=point.register, and_mask=0xFFFF & ~clear, or_mask=put))
    return Writing(value, pdu, pdu, value)  # confirmed by an echo of all of it


def _swapped(register: int) -> int:
    return register >> 8 | (register & 0xFF) << 8


def sticks(expected: Value, found: Value) -> bool:
    """Whether what reads back is what was written, as the registers can hold it. A device may keep a float with fewer
    digits than it was sent."""
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-6)
    return expected == found


def pdu_of(request: ModbusPDU) -> bytes:
    """Function code and data."""
    return bytes([request.function_code]) + request.encode()
