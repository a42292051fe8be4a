"""A Modbus RTU line whose unit answers late at times, in virtual time: the shipped line (`drivers/modbus_line.py`) on a
modelled serial port. RTU replies carry no transaction id, so a late one looks like the answer to the next request."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time

from drivers import modbus_line
from drivers.contract import DeviceUnreachable
from drivers.modbus_line import Failure, Request, SerialPort, line_of
from tests.fakes.serial_line_model import ModelUnit, SerialLineModel
from tests.torture.sim_loop import SimLoop, replaced
from tests.torture.sim_oracle import Verdict

_COUNT = 4  #: registers of every request: all replies have one form
_TIMEOUT_S, _LATEST_S = 0.1, 0.4


def run_line(seed: int, hours: float = 0.5) -> Verdict:
    """Two users read blocks of registers in turn; each register holds its own address."""
    began_s = time.perf_counter()
    rng = random.Random(f"{seed}:line")
    unit = ModelUnit(holding=list(range(1_000)))
    model = SerialLineModel({7: unit}, baud=19_200, seed=seed)
    address = SerialPort("/dev/simulated", 19_200, "N", 1)
    violations: dict[str, str] = {}
    reads = late = failed = 0

    async def user(name: str, first: int) -> None:
        nonlocal reads, late, failed
        loop = asyncio.get_running_loop()
        line = line_of(address, name)
        await line.open(3.0)
        while loop.time() < hours * 3_600:
            at = first + _COUNT * rng.randrange(100)
            pdu = struct.pack(">BHH", 3, at, _COUNT)
            is_late = rng.random() < 0.05
            late += is_late
            unit.turnaround_s = (
                rng.uniform(_TIMEOUT_S, _LATEST_S * 0.95) if is_late else rng.uniform(0.002, 0.06)
            )
            wanted = Request(
                7, pdu, bytes((3, 2 * _COUNT)), 2 + 2 * _COUNT, timeout_s=_TIMEOUT_S, latest_s=_LATEST_S
            )
            reads += 1
            try:
                replies = await line.exchange([wanted])
            except DeviceUnreachable:
                failed += 1
                await asyncio.sleep(0.05)
                continue
            for reply in replies.replies:
                if isinstance(reply, Failure):
                    failed += 1
                elif (got := struct.unpack(f">{_COUNT}H", reply[-2 * _COUNT :])) != tuple(
                    range(at, at + _COUNT)
                ):
                    violations.setdefault(
                        "value_belongs_to_its_register", f"registers {at}.. were read as those of {got[0]}"
                    )
            await asyncio.sleep(rng.uniform(0.0, 0.02))
        line.release(name)

    async def both() -> None:
        await asyncio.gather(user("one", 0), user("two", 500))

    loop = SimLoop()
    asyncio.set_event_loop(loop)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with replaced((modbus_line, "open_serial", model.open)):
            loop.run_until_complete(both())
    finally:
        logging.disable(level)
        loop.close()
        asyncio.set_event_loop(None)
    took_s = time.perf_counter() - began_s
    return Verdict(
        seed=seed, violations=violations, trace=f"{reads}-{late}-{failed}-{loop.events}",
        figures={
            "simulated_s": hours * 3_600, "took_s": round(took_s, 2), "events": loop.events,
            "events_per_s": round(loop.events / took_s), "reads": reads, "late_replies": late, "failed": failed,
        },
    )  # fmt: skip
