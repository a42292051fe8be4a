"""The simulated plant: real protocols, and counters of its own that no part of Headgate writes.

Every answer or message carries a counter `n` that grows by one each time, so that an auditor can tell which of them
ended up where. What was offered to a listening gateway is appended to a log, one line `stream n readings boot_ns`.

A Modbus TCP server and a Modbus RTU server (pymodbus) fill their registers when they are read; a free-running
instrument writes text lines on a pty while somebody has it open; Bluetooth thermometers advertise BTHome v2 while
somebody scans, through the simulated BlueZ on the bus that DBUS_SYSTEM_BUS_ADDRESS names.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import signal
import struct
import sys
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

from pymodbus import FramerType
from pymodbus.pdu import ModbusPDU
from pymodbus.pdu.register_message import ReadHoldingRegistersResponse
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

BOILER_REGISTERS = 40  #: counter (u32), then 38 measured u16
METER_REGISTERS = 10  #: counter (u32), then 4 f32
LINE_HZ = 10.0
ADVERT_HZ = 1.0
THERMOMETERS = ("A4:C1:38:00:00:01", "A4:C1:38:00:00:02", "A4:C1:38:00:00:03")


class Log:
    """What was offered. One short write per line, so a line is there or is not."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def offered(self, stream: str, n: int, readings: int) -> None:
        at = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(self._fd, f"{stream} {n} {readings} {at}\n".encode())


def waves(seed: float) -> Iterator[float]:
    """A plausible slow signal between 0 and 1."""
    while True:
        t = time.monotonic()
        yield 0.5 + 0.3 * math.sin(t / 7 + seed) + 0.15 * math.sin(t / 1.7 + 2 * seed)


def boiler_registers(n: int) -> list[int]:
    values = [int(200 + 600 * next(waves(k))) for k in range(BOILER_REGISTERS - 2)]
    return [n >> 16, n & 0xFFFF, *values]


def meter_registers(n: int) -> list[int]:
    registers = [n >> 16, n & 0xFFFF]
    for k in range((METER_REGISTERS - 2) // 2):
        high, low = struct.unpack(">HH", struct.pack(">f", 230.0 + 5 * next(waves(k))))
        registers += [high, low]
    return registers


def answering(
    stream: str, log: Log, registers: Callable[[int], list[int]], points: int
) -> Callable[[bool, ModbusPDU], ModbusPDU]:
    """Fills each answer on its way out and counts it."""
    count = 0

    def trace(sending: bool, pdu: ModbusPDU) -> ModbusPDU:
        nonlocal count
        if sending and isinstance(pdu, ReadHoldingRegistersResponse) and len(pdu.registers) > 1:
            count += 1
            pdu.registers = registers(count)[: len(pdu.registers)]
            log.offered(stream, count, points)
        return pdu

    return trace


def _device(registers: int) -> SimDevice:
    return SimDevice(
        id=1, simdata=[SimData(address=0, count=registers, values=0, datatype=DataType.REGISTERS)]
    )


class PtyCable:
    """Two pty ends joined like a null-modem cable: what is written at one slave is read at the other."""

    def __init__(self) -> None:
        self._masters = []
        self.ends = []
        self._keep = []
        for _ in range(2):
            master, slave = os.openpty()
            tty.setraw(slave)
            os.set_blocking(master, False)
            self._masters.append(master)
            self._keep.append(slave)  # held open, so a master never reads EIO between two owners
            self.ends.append(os.ttyname(slave))
        loop = asyncio.get_running_loop()
        for source, target in (self._masters, self._masters[::-1]):
            loop.add_reader(source, self._pump, source, target)

    @staticmethod
    def _pump(source: int, target: int) -> None:
        try:
            os.write(target, os.read(source, 4096))
        except OSError:
            return


async def instrument(log: Log, master: int) -> None:
    """A free-running instrument: `n;flow;level` ten times a second, while somebody has the port open."""
    poll = select.poll()
    poll.register(master, 0)
    n = 0
    flow, level = waves(0.3), waves(1.9)
    while True:
        await asyncio.sleep(1 / LINE_HZ)
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            continue
        n += 1
        line = f"{n};{12 + 4 * next(flow):.2f};{1.5 + next(level):.3f}\r\n".encode()
        try:
            if os.write(master, line) == len(line):
                log.offered("scale", n, 3)
        except BlockingIOError:
            n -= 1


def advert(packet: int, n: int, celsius: float, percent: float, battery: int) -> bytes:
    """BTHome v2 service data (bthome.io/format): device information 0x40, then objects in order of their ids."""
    return (
        b"\x40"
        + struct.pack("<BB", 0x00, packet & 0xFF)
        + struct.pack("<BB", 0x01, battery)
        + struct.pack("<Bh", 0x02, round(celsius * 100))
        + struct.pack("<BH", 0x03, round(percent * 100))
        + struct.pack("<BI", 0x3E, n)
    )


ADVERT_POINTS = 4  #: battery, temperature, humidity, count


async def thermometers(log: Log) -> None:
    from tests.fakes.bluez import FakeBlueZ

    bluez = await FakeBlueZ().start()
    n = 0
    while True:
        await asyncio.sleep(1 / ADVERT_HZ)
        if not bluez.discovering:
            continue
        n += 1
        for k, address in enumerate(THERMOMETERS):
            data = advert(n, n, 19 + 4 * next(waves(k)), 40 + 20 * next(waves(k + 5)), 90 - k)
            bluez.advertise(
                address, rssi=-60 - k, service_data={"0000fcd2-0000-1000-8000-00805f9b34fb": data}
            )
            log.offered(f"thermometer-{k + 1}", n, ADVERT_POINTS)


async def main(log_path: Path, ble: str) -> None:
    log = Log(log_path)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tcp = ModbusTcpServer(
        _device(BOILER_REGISTERS),
        address=("127.0.0.1", 0),
        trace_pdu=answering("boiler", log, boiler_registers, BOILER_REGISTERS - 1),
    )
    await tcp.serve_forever(background=True)
    assert isinstance(tcp.transport, asyncio.Server)
    port = tcp.transport.sockets[0].getsockname()[1]
    cable = PtyCable()
    rtu = ModbusSerialServer(
        _device(METER_REGISTERS),
        framer=FramerType.RTU,
        port=cable.ends[0],
        baudrate=115200,
        trace_pdu=answering("meter", log, meter_registers, 1 + (METER_REGISTERS - 2) // 2),
    )
    await rtu.serve_forever(background=True)
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    scale_port = os.ttyname(slave)
    os.close(slave)  # so that the master sees whether somebody has it open
    tasks = [asyncio.create_task(instrument(log, master), name="instrument")]
    if ble == "bluez":
        tasks.append(asyncio.create_task(thermometers(log), name="thermometers"))
    print(json.dumps({"boiler_port": port, "meter_tty": cable.ends[1], "scale_tty": scale_port}), flush=True)
    waiting = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done - {waiting}:
        task.result()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
