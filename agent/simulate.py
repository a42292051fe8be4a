"""A Modbus device that is not there: what a configuration or a profile expects, served with moving, plausible values.

Rules:

1. What is served is made from the points themselves (register, type, order, encoding, scale), so the device answers
   where the configuration asks; any other address is refused, as a real device would.
2. A value stays within the point's own limits and never is one of its `not_available` values. A value that was set or
   written stays as it is.
3. Registers are computed when they are asked for; nothing runs in between.

`served_unit` and its kin are pure; `Simulation` listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pty
import struct
import time
import tty
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from drivers import codec
from drivers.contract import Value, ValueType, boot_ns, engineering
from drivers.modbus import ModbusPoint
from drivers.modbus_plan import Table
from drivers.profiles import Detect, Mark
from drivers.simulator import SimulatorDriver, SimulatorOptions, SimulatorPoint, Wave

if TYPE_CHECKING:
    from pymodbus.constants import ExcCodes
    from pymodbus.simulator import SimDevice
    from pymodbus.simulator.simcore import SimCore

_BRIDGED: Final = (
    32  #: registers between two points that are served too: the driver reads along what is this narrow
)
_ROUNDED: Final = 1e-6  #: as far a float of 32 bits may be from what was asked for, of its size
_FRESH_S: Final = 0.1  #: values are computed anew after this
_SCALE_EXPONENT: Final = -2  #: what a scale register holds, where it can be chosen
_QUIET: Final = (
    "alarm",
    "error",
    "fault",
    "status",
    "state",
    "mode",
    "code",
    "trip",
    "warning",
    "active_setpoint",
)
_EPOCHS: Final = ("epoch_32", "epoch_64", "epoch_ms")

#: What a device shows on a usual day, by unit: least and greatest.
_USUAL: Final[Mapping[str, tuple[float, float]]] = {
    "V": (228.0, 232.0), "kV": (9.9, 10.1), "A": (2.0, 8.0), "mA": (4.0, 20.0), "W": (400.0, 1600.0),
    "kW": (0.4, 1.6), "VA": (450.0, 1700.0), "kVA": (0.45, 1.7), "var": (50.0, 200.0), "kvar": (0.05, 0.2),
    "Hz": (49.95, 50.05), "Cel": (20.0, 25.0), "°C": (20.0, 25.0), "K": (293.0, 298.0), "%": (40.0, 60.0),
    "bar": (1.5, 2.5), "Pa": (100_000.0, 102_000.0), "hPa": (1000.0, 1020.0), "m3/h": (8.0, 12.0),
    "m/s": (0.8, 1.2), "l/min": (8.0, 12.0), "rpm": (1400.0, 1500.0), "s": (5.0, 15.0), "GJ/h": (0.1, 0.3),
}  # fmt: skip
_COUNTED: Final = ("Wh", "kWh", "MWh", "varh", "kvarh", "VAh", "kVAh", "Ah", "m3", "l", "L", "GJ")


_PTYS: Final = "/dev/pts/"


class CannotSimulate(Exception):
    """What was asked for cannot be served; the text has the remedy."""


class Simulated(msgspec.Struct, frozen=True):
    """A device to serve: what it is called, its points, and how it names itself."""

    name: str
    unit: int
    points: tuple[ModbusPoint, ...]
    order: str = "ABCD"
    detect: Detect = Detect()


# ------------------------------------------------------------------------------------------- values


def wave_of(point: ModbusPoint) -> SimulatorPoint:
    """What the point does over time, in the unit that a person sees."""

    def wave(kind: Wave, low: float, high: float, period_s: float) -> SimulatorPoint:
        return SimulatorPoint(
            name=point.name, type=ValueType.F64, wave=kind, low=low, high=high, period_s=period_s
        )

    if point.one_of:
        return wave(Wave.CONSTANT, point.one_of[0], point.one_of[0], 1.0)
    quiet = any(word in point.name.lower() for word in _QUIET)
    if point.type is ValueType.BOOL:
        return wave(Wave.CONSTANT if quiet else Wave.SQUARE, 0.0, 0.0 if quiet else 1.0, 20.0)
    least, greatest = _limits(point)
    if point.unit in _COUNTED:
        low = min(max(least, 1000.0), greatest)
        return wave(Wave.COUNTER, low, max(low, min(greatest, low + 1e6)), 1.0)
    if quiet and not point.unit:
        return wave(Wave.CONSTANT, max(least, 0.0), max(least, 0.0), 1.0)
    low, high = (0.9, 0.99) if "power_factor" in point.name else _USUAL.get(point.unit, (10.0, 90.0))
    if not least <= low <= high <= greatest:
        span = greatest - least
        low, high = least + 0.45 * span, least + 0.55 * span
    return wave(Wave.SINE, low, high, 60.0)


def _limits(point: ModbusPoint) -> tuple[float, float]:
    """What the point allows, and what its type can hold."""
    if _is_scaled(point):
        least, greatest = (end * 10.0**_SCALE_EXPONENT for end in codec.limits_of(_held(point)))
    elif point.type in (ValueType.F32, ValueType.F64, ValueType.STR, ValueType.BOOL):
        least, greatest = -1e6, 1e6
    else:
        ends = [engineering(end, point.scale, point.offset) for end in codec.limits_of(_held(point))]
        least, greatest = min(ends), max(ends)
    if point.bits is not None:
        greatest = min(greatest, engineering((1 << point.bits) - 1, point.scale, point.offset))
    if point.length and point.encoding in ("bcd", "mod10000"):
        greatest = min(greatest, engineering(10**point.length - 1, point.scale, point.offset))
    if point.valid_min is not None:
        least = max(least, point.valid_min)
    if point.valid_max is not None:
        greatest = min(greatest, point.valid_max)
    return least, max(least, greatest)


def _held(point: ModbusPoint) -> ValueType:
    """The type of what the registers hold."""
    return ValueType(str(point.encoding)) if _is_scaled(point) else point.type


def _is_scaled(point: ModbusPoint) -> bool:
    return point.exponent_register is not None


def raw_of(point: ModbusPoint, shown: float) -> int | float | bool:
    """The raw value nearest to what a person is to see; never one that means "not available"."""
    raw = _nearest(point, shown)
    return raw + 1 if not isinstance(raw, float) and raw in point.not_available else raw


def _nearest(point: ModbusPoint, shown: float) -> int | float | bool:
    if point.type is ValueType.BOOL:
        return round(shown) != 0
    raw = (shown - point.offset) / point.scale if point.scale else shown
    if point.type in (ValueType.F32, ValueType.F64):
        return raw
    return round(raw)


def words_of(point: ModbusPoint, value: Value, order: str) -> dict[int, tuple[int, int]]:
    """The registers that hold a raw value: address -> (word, mask of the bits that are the point's). Raises
    `ValueError` for a value that they cannot hold."""
    if point.table.of_bits:
        return {point.register: (int(bool(value)), 0xFFFF)}
    if point.bit is not None:
        return _bits(point, int(value), order)
    if point.type in (ValueType.U8, ValueType.I8) and point.encoding is None:
        return {point.register: (int(codec.fitting(value, point.type)) & 0xFF, 0xFF)}
    data = _bytes(point, value, order)
    words = struct.unpack(f">{len(data) // 2}H", data)
    held = {point.register + i: (word, 0xFFFF) for i, word in enumerate(words)}
    if point.exponent_register is not None:
        exponent = _SCALE_EXPONENT if point.decimals_register is None else -_SCALE_EXPONENT
        held[point.exponent_register] = (exponent & 0xFFFF, 0xFFFF)
    return held


def _bits(point: ModbusPoint, value: int, order: str) -> dict[int, tuple[int, int]]:
    bit, count = point.bit or 0, point.bits or 1
    if not 0 <= value < 1 << count:
        raise ValueError(f"{value} does not fit {count} bits")
    mask = (1 << count) - 1 << bit
    if bit + count <= 16:
        return {point.register: (value << bit, mask)}
    parts = {}
    swapped = order in ("CDAB", "DCBA")
    for i in range(2):
        shift = 16 * (i if swapped else 1 - i)
        parts[point.register + i] = ((value << bit) >> shift & 0xFFFF, mask >> shift & 0xFFFF)
    return parts


def _bytes(point: ModbusPoint, value: Value, order: str) -> bytes:
    if _is_scaled(point):
        number = float(value) if not isinstance(value, str) else math.nan
        field = codec.Field(at=0, type=_held(point), order=order)
        return codec.encode(round(number * 10.0**-_SCALE_EXPONENT), field)
    if point.encoding is not None and point.encoding.startswith(("date_", "cp56")):
        return _date(str(point.encoding), float(value) + 60 * point.utc_offset_min)
    return codec.encode(
        value,
        codec.Field(at=0, type=point.type, order=order, encoding=point.encoding, length=point.length or 0),
    )


def _date(encoding: str, unix_s: float) -> bytes:
    """An instant in one of the packed forms (their fields: `drivers.codec.Encoding`)."""
    at = datetime.fromtimestamp(unix_s, UTC)
    parts = (at.year % 100, at.month, at.day, at.hour, at.minute, at.second)
    if encoding == "date_bcd":
        return bytes(int(f"{part:02d}", 16) for part in parts)
    if encoding == "date_bytes":
        return bytes(parts)
    if encoding == "date_registers":
        return struct.pack(">6H", at.year, *parts[1:])
    # IEC 60870-5-4 in four registers: year; month and day of month; hour and minute; milliseconds.
    day = at.isoweekday() << 5 | at.day
    return bytes((0, at.year % 100, at.month, day, at.hour, at.minute)) + struct.pack(">H", at.second * 1000)


# ------------------------------------------------------------------------------------------- a unit


class Tables:
    """The registers and bits of one unit: those of its devices' points, and the narrow holes between them."""

    def __init__(self, seed: int = 0, clock_ns: Callable[[], int] = boot_ns) -> None:
        self._seed = seed
        self._clock_ns = clock_ns
        self._devices: list[tuple[Simulated, SimulatorDriver]] = []
        self._set: dict[tuple[str, str], Value] = {}
        self._fixed: dict[tuple[Table, int], int] = {}
        self._written: dict[tuple[Table, int], int] = {}
        self._computed_s = -math.inf
        self.cells: dict[Table, dict[int, int]] = {table: {} for table in Table}

    def add(self, device: Simulated) -> None:
        """Raises `CannotSimulate` for a point whose registers cannot be made."""
        waves = [wave_of(point) for point in device.points if point.type is not ValueType.STR]
        driver = SimulatorDriver(device.name, SimulatorOptions(seed=self._seed), waves, self._clock_ns)
        self._devices.append((device, driver))
        for mark in device.detect.mark:
            self._mark(mark, device.order)

    def set(self, device: str, point: ModbusPoint, shown: Value, order: str) -> None:
        """From now on the point shows this. Raises `CannotSimulate`."""
        try:
            raw = shown if isinstance(shown, str) else _nearest(point, float(shown))
            held = words_of(point, raw, point.order or order)
            if not isinstance(shown, bool | str):
                _exactly(point, float(shown), held, point.order or order)
        except (ValueError, OverflowError) as err:
            raise CannotSimulate(f"--set {point.name}: {err}") from err
        self._set[device, point.name] = raw

    async def refresh(self) -> None:
        """What every point shows now."""
        if time.monotonic() - self._computed_s < _FRESH_S:
            return
        self._computed_s = time.monotonic()
        for table, at in self._fixed:
            self.cells[table][at] = self._fixed[table, at]
        for device, driver in self._devices:
            await driver.connect()
            scan = await driver.read(driver.points)
            shown = {point.name: value for point, value in zip(scan.points, scan.values, strict=True)}
            for point in device.points:
                raw = self._set.get((device.name, point.name))
                if raw is None:
                    raw = _moving(point, shown.get(point.name))
                self._put(point, raw, point.order or device.order)
        for (table, at), word in self._written.items():
            self.cells[table][at] = word

    def written(self, table: Table, address: int, words: Sequence[int]) -> None:
        """The master wrote them: they stay."""
        self._written.update({(table, address + i): int(word) for i, word in enumerate(words)})
        self.changed()

    def changed(self) -> None:
        """What was computed is no longer what is."""
        self._computed_s = -math.inf

    def bridge(self) -> None:
        """Serve the narrow holes between points too (zeros)."""
        for cells in self.cells.values():
            known = sorted(cells)
            for before, after in pairwise(known):
                if after - before - 1 <= _BRIDGED:
                    for at in range(before + 1, after):
                        cells.setdefault(at, 0)

    def _put(self, point: ModbusPoint, raw: Value, order: str) -> None:
        cells = self.cells[point.table]
        for at, (word, mask) in words_of(point, raw, order).items():
            cells[at] = cells.get(at, 0) & ~mask & 0xFFFF | word & mask

    def _mark(self, mark: Mark, order: str) -> None:
        wanted = mark.equals if mark.equals is not None else (mark.one_of or (None,))[0]
        if wanted is None:
            return  # a range: the points themselves stand in it
        if isinstance(wanted, str):
            wanted = wanted.rstrip("*")
        field = codec.Field(
            at=0, type=ValueType(mark.type), order=mark.order or order, length=mark.length or 0
        )
        with contextlib.suppress(ValueError):
            data = codec.encode(wanted, field)
            for i in range(0, len(data), 2):
                at = mark.register + i // 2
                self._fixed[Table(mark.table), at] = int.from_bytes(data[i : i + 2], "big")


def _moving(point: ModbusPoint, shown: Value | None) -> Value:
    if point.type is ValueType.STR:
        return "SIMULATED"[: point.length or 0]
    if point.encoding is not None and (
        point.encoding in _EPOCHS or point.encoding.startswith(("date_", "cp56"))
    ):
        now_s = time.time()
        return now_s if point.type is ValueType.F64 else int(now_s)
    return raw_of(point, float(shown) if isinstance(shown, int | float) else 0.0)


def _exactly(point: ModbusPoint, shown: float, held: Mapping[int, tuple[int, int]], order: str) -> None:
    """Raises `ValueError` where a person would see something else than he asked for."""
    told = _decoded(point, {at: word for at, (word, _) in held.items()}, order)
    if isinstance(told, int | float) and not math.isclose(told, shown, rel_tol=_ROUNDED, abs_tol=_ROUNDED):
        raise ValueError(f"its registers cannot hold {shown:.12g}; the nearest is {told:.12g}")


async def shown_now(tables: Tables, device: Simulated) -> dict[str, str]:
    """What each point shows, for a person."""
    await tables.refresh()
    told: dict[str, str] = {}
    for name, point in ((point.name, point) for point in device.points):
        value = _read_back(tables, point, device.order)
        if isinstance(value, float):
            value = f"{value:.6g}"
        told[name] = f"{value} {point.unit}".rstrip()
    return told


def _read_back(tables: Tables, point: ModbusPoint, order: str) -> Value | None:
    return _decoded(point, tables.cells[point.table], order)


def _decoded(point: ModbusPoint, cells: Mapping[int, int], order: str) -> Value | None:
    if point.table.of_bits:
        return bool(cells[point.register])
    field = codec.Field(
        at=0, type=point.type, order=point.order or order, encoding=point.encoding, bit=point.bit,
        bits=point.bits, length=point.length or 0, scale_at=0 if _is_scaled(point) else None,
    )  # fmt: skip
    count = field.registers
    words = [cells[point.register + i] for i in range(count)]
    if point.exponent_register is not None:
        words.append(cells[point.exponent_register])
        field = msgspec.structs.replace(
            field, scale_at=2 * count, decimals=point.decimals_register is not None
        )
    values, _ = codec.RegisterDecoder([field]).decode(struct.pack(f">{len(words)}H", *words))
    value = values[0]
    if isinstance(value, bool | str) or value is None:
        return value
    return engineering(value, point.scale, point.offset)


# ------------------------------------------------------------------------------------------- serving


class Listening(msgspec.Struct, frozen=True):
    """Where a line is served."""

    framing: str
    host: str = ""
    port: int = 0
    path: str = ""  #: of the pty

    def __str__(self) -> str:
        words = (
            self.framing.replace("_", " ").replace("tcp", "TCP").replace("rtu", "RTU").replace("udp", "UDP")
        )
        where = self.path or f"{self.host}:{self.port}"
        return f"Modbus {words.replace('ascii', 'ASCII')} on {where}"

    def options(self) -> dict[str, Value]:
        """What a device's options must say to reach it."""
        if self.path:
            serial: dict[str, Value] = {"serial": self.path, "parity": "none"}  # a Linux pty has none
            return serial if self.framing == "rtu" else {**serial, "framing": "ascii", "data_bits": 8}
        host: dict[str, Value] = {"host": self.host, "port": self.port}
        return host if self.framing == "tcp" else {**host, "framing": self.framing}


class Line(msgspec.Struct):
    """What is to be served on one line: its units, and how."""

    framing: str  #: tcp, udp, rtu_over_tcp, ascii_over_tcp; rtu, ascii (on a pty)
    units: dict[int, Tables]
    identity: dict[int, str] = {}  #: device identification, object id -> text


WrittenTo: TypeAlias = Callable[[int, Table, int, Sequence[int]], None]
"""Told what a master wrote: unit, table, first address, words."""

Action: TypeAlias = Callable[
    [int, int, int, int, list[int], list[int] | list[bool] | None], Coroutine[None, None, "ExcCodes | None"]
]


def _sim_devices(line: Line, on_write: WrittenTo) -> list[SimDevice]:
    from pymodbus.simulator import DataType, SimData, SimDevice

    made: list[SimDevice] = []
    for unit, tables in line.units.items():
        last = {table: max(cells, default=0) + 1 for table, cells in tables.cells.items()}
        made.append(
            SimDevice(
                unit,
                (
                    [SimData(0, values=[False] * last[Table.COIL], datatype=DataType.BITS)],
                    [SimData(0, values=[False] * last[Table.DISCRETE], datatype=DataType.BITS)],
                    [SimData(0, values=[0] * last[Table.HOLDING], datatype=DataType.REGISTERS)],
                    [SimData(0, values=[0] * last[Table.INPUT], datatype=DataType.REGISTERS)],
                ),
                action=_action(unit, tables, on_write),
            )
        )
    return made


class _OnlyItsUnits:
    """The simulator's memory asks unit 0 for every unit that it has not, and answers "device failed" where there is
    none: a scan would find 247 devices on the line of one."""

    def __init__(self, memory: SimCore) -> None:
        self._memory = memory

    def device_ids(self) -> list[int]:
        return self._memory.device_ids()

    async def async_getValues(  # noqa: N802 - the server's own name
        self, device_id: int, func_code: int, address: int, count: int = 1
    ) -> list[int] | list[bool] | ExcCodes:
        self._check(device_id)
        return await self._memory.async_getValues(device_id, func_code, address, count)

    async def async_setValues(  # noqa: N802 - the server's own name
        self, device_id: int, func_code: int, address: int, values: list[int] | list[bool]
    ) -> ExcCodes | None:
        self._check(device_id)
        return await self._memory.async_setValues(device_id, func_code, address, values)

    def _check(self, unit: int) -> None:
        from pymodbus.exceptions import NoSuchIdException

        if unit not in self._memory.device_ids():
            raise NoSuchIdException(f"no unit {unit}")


_TABLE_OF: Final = {
    1: Table.COIL, 2: Table.DISCRETE, 3: Table.HOLDING, 4: Table.INPUT,
    5: Table.COIL, 15: Table.COIL, 6: Table.HOLDING, 16: Table.HOLDING,
}  # fmt: skip


def _action(unit: int, tables: Tables, on_write: WrittenTo) -> Action:
    from pymodbus.constants import ExcCodes

    async def action(
        function: int,
        start: int,
        address: int,
        count: int,
        registers: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        table = _TABLE_OF.get(function)
        if table is None:
            return ExcCodes.ILLEGAL_FUNCTION
        await tables.refresh()
        cells = tables.cells[table]
        if any(at not in cells for at in range(address, address + count)):
            return ExcCodes.ILLEGAL_ADDRESS
        if values is not None:
            words = [int(value) for value in values]
            tables.written(table, address, words)
            on_write(unit, table, address, words)
            await tables.refresh()
        if table.of_bits:
            _lay_bits(cells, start, registers)
        else:
            registers[address - start : address - start + count] = [
                cells[at] for at in range(address, address + count)
            ]
        return None

    return action


def _lay_bits(cells: Mapping[int, int], start: int, registers: list[int]) -> None:
    """Bits lie sixteen to a register in the server's memory, the lowest first."""
    for i in range(len(registers)):
        word = 0
        for bit in range(16):
            word |= (cells.get(start + 16 * i + bit, 0) & 1) << bit
        registers[i] = word


@contextlib.asynccontextmanager
async def serve(
    line: Line, *, bind: str = "127.0.0.1", port: int = 0, link: Path | None = None, on_write: WrittenTo
) -> AsyncIterator[Listening]:
    """The line, for as long as the caller stays. Raises `CannotSimulate` where it cannot be opened."""
    from pymodbus.framer import FramerType
    from pymodbus.pdu.device import ModbusDeviceIdentification
    from pymodbus.server import ModbusSerialServer, ModbusTcpServer, ModbusUdpServer

    framers = {
        "tcp": FramerType.SOCKET, "udp": FramerType.SOCKET, "rtu_over_tcp": FramerType.RTU,
        "ascii_over_tcp": FramerType.ASCII, "rtu": FramerType.RTU, "ascii": FramerType.ASCII,
    }  # fmt: skip
    if line.framing not in framers:
        raise CannotSimulate(f"framing {line.framing!r} cannot be served (these can: {', '.join(framers)})")
    for tables in line.units.values():
        await tables.refresh()
        tables.bridge()
    devices = _sim_devices(line, on_write)
    identity = ModbusDeviceIdentification(info=line.identity)  # type: ignore[no-untyped-call]
    framer = framers[line.framing]
    if line.framing in ("rtu", "ascii"):
        async with _pty_pair(link) as (ours, theirs):
            serial = ModbusSerialServer(
                devices, framer=framer, identity=identity, port=theirs, ignore_missing_devices=True
            )
            serial.context = _OnlyItsUnits(serial.context)  # type: ignore[assignment, arg-type]
            await serial.listen()
            await asyncio.sleep(0)  # its transport opens the port in the loop's next turn
            try:
                yield Listening(line.framing, path=ours)
            finally:
                await serial.shutdown()  # type: ignore[no-untyped-call]
        return
    kind = ModbusUdpServer if line.framing == "udp" else ModbusTcpServer
    server = kind(
        devices,
        framer=framer,
        identity=identity,
        address=(bind, port),
        ignore_missing_devices=framer is not FramerType.SOCKET,
    )
    server.context = _OnlyItsUnits(server.context)  # type: ignore[assignment, arg-type]
    try:
        if not await server.listen():
            raise CannotSimulate(
                f"{bind}:{port} cannot be listened on: it is in use, or not an address of this machine; "
                "give another --port or --bind"
            )
        yield Listening(line.framing, host=bind, port=_port_of(server) or port)
    finally:
        await server.shutdown()  # type: ignore[no-untyped-call]


def _port_of(server: object) -> int:
    transport = getattr(server, "transport", None)
    sockets = getattr(transport, "sockets", None)
    if sockets:
        return int(sockets[0].getsockname()[1])
    name = transport.get_extra_info("sockname") if transport is not None else None
    return int(name[1]) if name else 0


@contextlib.asynccontextmanager
async def _pty_pair(link: Path | None) -> AsyncIterator[tuple[str, str]]:
    """Two serial ports joined by a wire; `link` is a name for the first."""
    loop = asyncio.get_running_loop()
    ends = [pty.openpty(), pty.openpty()]
    masters = [master for master, _ in ends]
    for master, slave in ends:
        tty.setraw(master)
        tty.setraw(slave)

    def carry(source: int, target: int) -> None:
        try:
            os.write(target, os.read(source, 4096))
        except OSError:
            loop.remove_reader(source)

    for source, target in (masters, masters[::-1]):
        os.set_blocking(source, False)
        loop.add_reader(source, carry, source, target)
    name = os.ttyname(ends[0][1])
    try:
        if link is not None:
            try:
                if link.is_symlink():
                    if link.exists() and not str(link.readlink()).startswith(_PTYS):
                        raise CannotSimulate(
                            f"--serial {link}: leads to {link.readlink()}, which is not a simulation's; give "
                            "another name"
                        )
                    link.unlink()
                link.symlink_to(name)
            except OSError as err:
                raise CannotSimulate(f"--serial {link}: cannot be made: {err.strerror}") from err
        yield str(link or name), os.ttyname(ends[1][1])
    finally:
        if link is not None and link.is_symlink() and str(link.readlink()) == name:
            link.unlink()
        for master, slave in ends:
            loop.remove_reader(master)
            os.close(master)
            os.close(slave)
