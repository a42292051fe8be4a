"""`headgate scan serial`: what speaks on a port, who holds it, and nothing sent unless asked for."""

from __future__ import annotations

import asyncio
import os
import tty
from pathlib import Path

import pytest

from tests.fakes.serial_instrument import SerialInstrument
from tests.fakes.technician import Technician


@pytest.fixture
def technician(tmp_path: Path) -> Technician:
    return Technician(tmp_path)


async def speak(instrument: SerialInstrument, line: bytes) -> None:
    while True:
        instrument.send(line)
        await asyncio.sleep(0.1)


async def test_a_free_running_instrument_is_recognised(technician: Technician) -> None:
    instrument = SerialInstrument(technician.folder / "scale")
    speaking = asyncio.create_task(speak(instrument, b"ST,GS,+00012.3 kg\r\n"))
    ran = await technician.types("scan", "serial", "--port", instrument.port, "--seconds", "2", "--json")
    speaking.cancel()
    instrument.unplug()
    assert ran.code == 0, ran
    (found,) = ran.json["found"]
    assert found["driver"] == "serial_line"
    assert found["options"]["port"] == instrument.port
    assert found["options"]["baud"] == 9600
    assert "kg" in found["readings"]["heard"]


async def test_a_silent_port_is_told_as_silent_and_nothing_is_sent_to_it(technician: Technician) -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    ran = await technician.types("scan", "serial", "--port", os.ttyname(theirs), "--seconds", "0.5")
    with pytest.raises(BlockingIOError):
        os.read(ours, 1)
    os.close(ours)
    os.close(theirs)
    assert ran.code == 0, ran
    assert "nothing was heard" in ran.out


async def test_a_meter_that_must_be_asked_is_found_when_asked(technician: Technician) -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)

    def answer() -> None:
        if b"/?!" in os.read(ours, 100):
            os.write(ours, b"/ELS5\\@V11.50000000\r\n")

    asyncio.get_running_loop().add_reader(ours, answer)
    ran = await technician.types(
        "scan", "serial", "--port", os.ttyname(theirs), "--seconds", "0.5", "--ask", "--json"
    )
    asyncio.get_running_loop().remove_reader(ours)
    os.close(ours)
    os.close(theirs)
    assert ran.code == 0, ran
    assert ran.json["found"][0]["driver"] == "iec62056"


async def test_a_port_that_is_not_there_is_told_in_words(technician: Technician) -> None:
    ran = await technician.types("scan", "serial", "--port", "/dev/ttyNOWHERE", "--seconds", "0.5")
    assert "no such port" in ran.err
    assert ran.code == 1
