"""`headgate scan ble` and what follows it, against a simulated BlueZ on a bus of its own."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.bluez import BTHOME_UUID, FakeBlueZ, PrivateBus, private_bus
from tests.fakes.technician import Technician

ROOM, HALL = "A4:C1:38:00:00:01", "A4:C1:38:00:00:02"


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


@pytest.fixture
async def sensors(bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBlueZ]:
    """A thermometer that tells 25.06 Cel, another whose data are encrypted, and one that says nothing we know."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    bluez = await FakeBlueZ().start()

    async def work() -> None:
        packet = 0
        while True:
            packet = (packet + 1) % 256
            said = bytes([0x40, 0x00, packet]) + bytes.fromhex("02CA09 03BF13")
            bluez.advertise(ROOM, rssi=-60, service_data={BTHOME_UUID: said})
            bluez.advertise(
                HALL, rssi=-80, service_data={BTHOME_UUID: bytes.fromhex("41 A47266C95F73 00112233 78237214")}
            )
            await asyncio.sleep(0.2)

    working = asyncio.create_task(work())
    yield bluez
    working.cancel()
    bluez.stop()
    await asyncio.sleep(0)


@pytest.fixture
def technician(tmp_path: Path) -> Technician:
    return Technician(tmp_path)


async def test_sensors_are_shown_with_what_they_say_and_added(
    sensors: FakeBlueZ, technician: Technician
) -> None:
    ran = await technician.types("scan", "ble", "--seconds", "3")
    assert ran.code == 0, ran
    assert "2 found" in ran.out
    assert "25.06 °C" in ran.out
    assert "needs its key" in ran.out
    number = next(line.split(".")[0] for line in ran.out.splitlines() if "temperature" in line)
    added = await technician.types("add", "room", "--found", number, "--json")
    values = {one["point"]: one["value"] for one in added.json["reading"]["readings"]}
    assert values["temperature"] == 25.06
    assert values["humidity"] == 50.55
    assert added.json["written"]


async def test_the_line_to_add_it_is_a_whole_one(sensors: FakeBlueZ, technician: Technician) -> None:
    ran = await technician.types("scan", "ble", "--seconds", "3", "--json")
    lines = {one["where"]: one["add"] for one in ran.json["found"]}
    words = shlex.split(lines[ROOM].replace("NAME", "room"))
    assert words[0] == "headgate"
    added = await technician.types(*words[1:])
    assert added.code == 0, added
    assert "25.06" in added.out


async def test_ctrl_c_shows_what_was_heard_so_far(sensors: FakeBlueZ, technician: Technician) -> None:
    process = await technician.starts("scan", "ble", "--seconds", "60", "--config", str(technician.config))
    async with asyncio.timeout(60):
        while not sensors.discovering:  # noqa: ASYNC110 - it is on the other side of a bus
            await asyncio.sleep(0.05)
        then = sensors.offered
        while sensors.offered < then + 20:  # noqa: ASYNC110 - each is sent ten times
            await asyncio.sleep(0.05)
    ran = await technician.interrupts(process)
    assert ran.code == 130, ran
    assert "stopped after" in ran.out
    assert "25.06 °C" in ran.out


async def test_nobody_in_reach_is_exit_1(
    bus: PrivateBus, technician: Technician, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    bluez = await FakeBlueZ().start()
    ran = await technician.types("scan", "ble", "--seconds", "1")
    bluez.stop()
    await asyncio.sleep(0)
    assert ran.code == 1, ran
    assert "nothing found" in ran.out


@pytest.mark.parametrize("as_json", [False, True])
async def test_no_bluetooth_is_exit_1_with_the_remedy(
    technician: Technician, monkeypatch: pytest.MonkeyPatch, *, as_json: bool
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={technician.folder}/nosuch")
    ran = await technician.types("scan", "ble", "--seconds", "1", *(["--json"] if as_json else []))
    assert ran.code == 1, ran
    assert "systemctl status dbus" in ran.err
    assert not as_json or "systemctl status dbus" in ran.json["error"]
