"""The shared adapter through every fault that is known of BlueZ, simulated on a private D-Bus.

Times are compressed by the module's constants. That none of it needs the process to be restarted is what each shows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from drivers import ble_radio
from drivers.ble import BleDriver, BleOptions, BlePoint
from drivers.ble_survey import survey
from drivers.contract import DeviceUnreachable, Found, Reason, Scan
from tests.fakes.bluez import BTHOME_UUID, FakeBlueZ, PrivateBus, private_bus

WAIT_S = 15  # a deadline, never a pause: the machine may be busy
A = "A4:C1:38:00:00:01"
B = "CB:B8:33:4C:88:4F"
PVVX = "0000181a-0000-1000-8000-00805f9b34fb"
SEALED = bytes.fromhex("41a47266c95f730011223378237214")  # 25.06 °C; https://bthome.io/encryption/
RUUVI = bytes.fromhex("0512FC5394C37C0004FFFC040CAC364200CDCBB8334C884F")  # 24.3 °C; docs.ruuvi.com


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


@pytest.fixture
def address(bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    return bus.address


@pytest.fixture
async def bluez(address: str) -> AsyncIterator[FakeBlueZ]:
    bluez = await FakeBlueZ().start()
    yield bluez
    bluez.stop()
    await asyncio.sleep(0)


@pytest.fixture
async def monitoring(address: str) -> AsyncIterator[FakeBlueZ]:
    """A bluetoothd that lets clients scan passively."""
    bluez = await FakeBlueZ(monitors=True).start()
    yield bluez
    bluez.stop()
    await asyncio.sleep(0)


def sensor(*objects: str, address: str = A, **options: object) -> BleDriver:
    import msgspec

    given = msgspec.convert({"address": address, "stale_after_s": 0.0, **options}, BleOptions)
    return BleDriver("room", given, [BlePoint(name=name, object=name) for name in objects])


@asynccontextmanager
async def listening(*drivers: BleDriver) -> AsyncIterator[AsyncIterator[Scan]]:
    await asyncio.gather(*(driver.connect() for driver in drivers))
    try:
        yield drivers[0].scans()
    finally:
        await asyncio.gather(*(driver.close() for driver in drivers))


async def following(scans: AsyncIterator[Scan]) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await anext(scans)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110 - what is awaited is on the other side of a bus
            await asyncio.sleep(0.002)


def send(bluez: FakeBlueZ, celsius: int, *, address: str = A, rssi: int = -60) -> bool:
    return bluez.advertise(address, rssi=rssi, service_data={BTHOME_UUID: bytes((0x40, 0x57, celsius))})


def count(bluez: FakeBlueZ, member: str) -> int:
    return [called for _, called in bluez.calls].count(member)


async def to_the_end(driver: BleDriver) -> None:
    async with asyncio.timeout(WAIT_S):
        async for _ in driver.scans():
            pass


async def reads_again(bluez: FakeBlueZ, driver: BleDriver) -> None:
    """What is sent is read, by the driver as a poller has it: connected again after every `DeviceUnreachable`."""
    celsius = 0

    async def read() -> Scan:
        while True:
            with suppress(DeviceUnreachable):
                async for scan in driver.scans():
                    if not scan.reasons:
                        return scan
            with suppress(DeviceUnreachable):
                await driver.connect()
            await asyncio.sleep(0.02)

    reading = asyncio.create_task(read())
    async with asyncio.timeout(WAIT_S):
        while not reading.done():
            celsius = (celsius + 1) % 100
            send(bluez, celsius)
            await asyncio.sleep(0.02)
    assert (await reading).values[0] is not None


# ------------------------------------------------------------------------------------------------------- InProgress


async def test_in_progress_is_tried_again_after_a_stop(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "START_PAUSE_S", 0.01)
    bluez.refusals["StartDiscovery"] = [("org.bluez.Error.InProgress", "Operation already in progress")] * 3
    driver = sensor("temperature")
    async with listening(driver):
        assert count(bluez, "StartDiscovery") == 4
        assert count(bluez, "StopDiscovery") == 3
        await reads_again(bluez, driver)


async def test_a_start_that_was_refused_and_done_all_the_same_is_stopped_and_started(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bluetoothd holds a session that we do not know of: every further start of this client is InProgress."""
    monkeypatch.setattr(ble_radio, "START_PAUSE_S", 0.01)
    bluez.done_but_refused["StartDiscovery"] = [
        ("org.bluez.Error.InProgress", "Operation already in progress")
    ]
    driver = sensor("temperature")
    async with listening(driver):
        await reads_again(bluez, driver)


async def test_in_progress_for_ever_is_busy_and_the_next_connect_has_a_fresh_connection(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "START_PAUSE_S", 0.01)
    bluez.refusals["StartDiscovery"] = [("org.bluez.Error.InProgress", "Operation already in progress")] * 100
    driver = sensor("temperature")
    with pytest.raises(DeviceUnreachable, match=r"scanning on hci0.*InProgress") as busy:
        await driver.connect()
    assert busy.value.reason is Reason.BUSY
    bluez.refusals.clear()
    async with listening(driver):
        await reads_again(bluez, driver)


async def test_a_start_that_is_answered_too_late_leaves_no_session_that_blocks_the_next(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "CALL_S", 0.3)
    bluez.hangs.add("StartDiscovery")
    driver = sensor("temperature")
    connecting = asyncio.create_task(driver.connect())
    await until(lambda: count(bluez, "StartDiscovery") == 1)
    bluez._sessions.add("nobody knows")  # it was done, and the answer got lost
    bluez.hangs.clear()
    with pytest.raises(DeviceUnreachable):
        await connecting
    bluez._sessions.clear()
    async with listening(driver):
        await reads_again(bluez, driver)


# --------------------------------------------------------------------------------------------------- deaf and gone


async def test_a_controller_gone_deaf_hears_again_after_the_scan_is_started_afresh(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "RESTART_AFTER_S", 0.3)
    driver = sensor("temperature")
    async with listening(driver):
        await reads_again(bluez, driver)
        bluez.deaf_until = "restart"
        await reads_again(bluez, driver)
        assert not bluez.deaf_until


async def test_a_controller_that_stays_deaf_is_switched_off_and_on(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("RESTART_AFTER_S", 0.4), ("RESET_AFTER_S", 0.2), ("POWER_PAUSE_S", 0.01)):
        monkeypatch.setattr(ble_radio, name, value)
    driver = sensor("temperature")
    async with listening(driver):
        await reads_again(bluez, driver)
        bluez.deaf_until = "power"
        await reads_again(bluez, driver)
    assert not bluez.deaf_until
    told = [record.message for record in caplog.records if "no data on hci0" in record.message]
    assert "scanning is started afresh" in told[0]
    assert "switched off and on" in told[1]


def test_the_recoveries_fit_into_three_minutes() -> None:
    """Deaf, restarted, still deaf, switched off and on, heard again: all within what is promised."""
    patience_s = ble_radio.RESTART_AFTER_S + ble_radio.RESET_AFTER_S
    assert patience_s + 2 * ble_radio.POWER_PAUSE_S + 3 * ble_radio.CALL_S + 2 * ble_radio.STOP_S <= 180


async def test_an_adapter_that_never_heard_anything_is_not_switched_off(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESTART_AFTER_S", "RESET_AFTER_S"):
        monkeypatch.setattr(ble_radio, name, 0.1)
    async with listening(sensor("temperature")):
        await until(lambda: count(bluez, "StartDiscovery") >= 4)
    assert count(bluez, "Set") == 0


async def test_a_change_of_signal_strength_without_data_is_no_sign_of_life(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "RESTART_AFTER_S", 0.3)
    async with listening(sensor("temperature")):
        async with asyncio.timeout(WAIT_S):
            while count(bluez, "StartDiscovery") < 2:
                bluez.advertise(A, rssi=-40)
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", ["pulled", "powered off", "bluetoothd", "D-Bus"])
async def test_whatever_ends_the_sensor_is_read_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with private_bus() as bus:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        bluez = await FakeBlueZ().start()
        driver = sensor("temperature")
        async with listening(driver) as scans:
            await reads_again(bluez, driver)
            for _ in range(2):
                match fault:
                    case "pulled":
                        bluez.unplug()
                    case "powered off":
                        bluez.power(on=False)
                    case "bluetoothd":
                        bluez.stop()
                    case _:
                        bus.stop()
                with pytest.raises(DeviceUnreachable):
                    await to_the_end(driver)
                with pytest.raises(DeviceUnreachable):
                    await driver.connect()
                match fault:
                    case "pulled":
                        bluez.plug()
                    case "powered off":
                        bluez.power(on=True)
                    case "bluetoothd":
                        await bluez.start()
                    case _:
                        bluez.stop()
                        bus.start()
                        await bluez.start()
                await reads_again(bluez, driver)
            del scans
        bluez.stop()


# ---------------------------------------------------------------------------------------------------- what is heard


async def test_data_that_bluez_repeats_of_another_advertisement_are_no_reading(bluez: FakeBlueZ) -> None:
    """A sender of two kinds: BlueZ signals both with each, and only one of them is new."""
    driver = sensor("temperature", "battery")
    async with listening(driver) as scans:
        send(bluez, 1)
        assert (await following(scans)).values == [200]
        pvvx = bytes.fromhex("010000 38c1a4 6c07 fa13 d60a 52 09 0f".replace(" ", ""))
        bluez.advertise(A, service_data={PVVX: pvvx})
        assert (await following(scans)).values == [3800, 0x52]
        send(bluez, 2)
        assert (await following(scans)).values == [400]
        assert len(driver._queue) == 0
    assert driver.counts.adverts == 3


async def test_a_ruuvitag_is_read_and_a_repeated_measurement_is_not_a_sign_of_life(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "rssi", address=B, format="ruuvi", stale_after_s=0.5)
    async with listening(driver) as scans:
        bluez.advertise(B, rssi=-70, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860, -70]
        got: list[Scan] = []
        reading = asyncio.create_task(following(scans))
        async with asyncio.timeout(WAIT_S):
            while not reading.done():
                bluez.advertise(B, company_data={0x0499: RUUVI})
                await asyncio.sleep(0.02)
        got.append(await reading)
        assert set(got[0].reasons.values()) == {Reason.STALE}
        bluez.advertise(B, company_data={0x0499: RUUVI[:16] + b"\x00\xce" + RUUVI[18:]})
        assert (await following(scans)).values == [4860, -60]
    assert driver.counts.adverts == 2
    assert driver.counts.repeats > 1


async def test_a_sentinel_keeps_its_number_and_is_bad(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "pressure", "voltage", address=B)
    async with listening(driver) as scans:
        bluez.advertise(B, company_data={0x0499: b"\x05\x80\x00" + RUUVI[3:]})
        scan = await following(scans)
    assert scan.values == [-32768, 100_044, 2977]
    assert scan.reasons == {0: Reason.SENTINEL}
    assert Reason.SENTINEL.has_value


async def test_a_format_that_is_named_is_the_only_one_that_is_read(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", address=B, format="ruuvi")
    async with listening(driver) as scans:
        send(bluez, 5, address=B)
        bluez.advertise(B, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860]
    assert driver.counts.foreign == 1


# ----------------------------------------------------------------------------------------------------------- passive


async def test_a_format_that_numbers_its_messages_is_scanned_for_passively(monitoring: FakeBlueZ) -> None:
    driver = sensor("temperature", address=B, format="ruuvi")
    async with listening(driver) as scans:
        await until(lambda: bool(monitoring.monitors))
        assert not monitoring.discovering
        # An eighth pattern in one monitor makes bluetoothd write beyond its memory.
        assert all(0 < len(one.patterns) <= 7 for one in monitoring.monitors)
        assert monitoring.advertise(B, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860]
        assert not monitoring.advertise(A, company_data={0xFFFF: b"anything else"})
    await until(lambda: not monitoring.monitors)


async def test_one_device_that_needs_more_makes_the_scan_active_for_all(monitoring: FakeBlueZ) -> None:
    ruuvi, other = sensor("temperature", address=B, format="ruuvi"), sensor("temperature")
    async with listening(ruuvi) as scans:
        await until(lambda: bool(monitoring.monitors))
        await other.connect()
        assert monitoring.discovering
        await until(lambda: not monitoring.monitors)
        monitoring.advertise(B, company_data={0x0499: RUUVI})
        send(monitoring, 3)
        assert (await following(scans)).values == [4860]
        assert (await following(other.scans())).values == [600]
        await other.close()


async def test_without_monitors_it_scans_actively_and_says_so_once(
    bluez: FakeBlueZ, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="drivers.ble_radio")
    one, two = sensor("temperature", address=B, format="ruuvi"), sensor("temperature", scan="passive")
    async with listening(one, two) as scans:
        assert bluez.discovering
        bluez.advertise(B, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860]
    assert len([record for record in caplog.records if "passive scanning" in record.message]) == 1


async def test_a_monitor_that_bluez_gives_back_makes_the_scan_active(
    monitoring: FakeBlueZ, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="drivers.ble_radio")
    monitoring.monitors_fail = True
    driver = sensor("temperature", address=B, format="ruuvi")
    async with listening(driver) as scans:
        await until(lambda: monitoring.discovering)
        monitoring.advertise(B, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860]
    registered = count(monitoring, "RegisterMonitor")
    async with listening(driver):
        assert monitoring.discovering
    assert registered == count(monitoring, "RegisterMonitor") == 1  # it is not tried again
    assert len([record for record in caplog.records if "passive scanning" in record.message]) == 1


async def test_a_passive_scan_that_hears_nothing_goes_on_as_an_active_one(
    monitoring: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "RESTART_AFTER_S", 0.3)
    driver = sensor("temperature", address=B, format="ruuvi")
    async with listening(driver) as scans:
        assert not monitoring.discovering
        await until(lambda: monitoring.discovering)
        monitoring.advertise(B, company_data={0x0499: RUUVI})
        assert (await following(scans)).values == [4860]


# ------------------------------------------------------------------------------------------------------------ survey


async def surveyed(
    bluez: FakeBlueZ, seconds: float, keys: dict[str, bytes] | None = None
) -> dict[str, Found]:
    latest: dict[str, Found] = {}

    async def run() -> None:
        async for found in survey(seconds, keys=keys):
            latest[found.address] = found

    task = asyncio.create_task(run())
    n = 0
    while not task.done():
        n += 1
        send(bluez, n % 100)
        bluez.advertise(B, company_data={0x0499: RUUVI}, name="Ruuvi 884F")
        bluez.advertise("54:48:E6:8F:80:A5", service_data={BTHOME_UUID: SEALED})
        bluez.advertise(
            "E2:53:30:00:00:01", company_data={0x004C: bytes.fromhex("1005441cbd08c5")}, name="Phone"
        )
        await asyncio.sleep(0.02)
    await task
    return latest


async def test_a_survey_tells_values_formats_and_the_table_that_reads_them(bluez: FakeBlueZ) -> None:
    found = await surveyed(bluez, 1.0)
    ruuvi = found[B]
    assert ruuvi.description.startswith("Ruuvi 884F; RuuviTag; temperature, humidity")
    assert ruuvi.readings["temperature"] == "24.3 °C"
    assert ruuvi.readings["pressure"] == "1000.44 hPa"
    assert ruuvi.readings["voltage"] == "2.977 V"
    assert ruuvi.options == {"address": B, "format": "ruuvi"}
    assert "needs its key" in found["54:48:E6:8F:80:A5"].description
    assert found["E2:53:30:00:00:01"].likelihood < 0.1
    points = [BlePoint(**point) for point in ruuvi.points]
    driver = sensor(*(point.object for point in points), address=B, format="ruuvi")
    async with listening(driver) as scans:
        bluez.advertise(B, company_data={0x0499: RUUVI})
        assert not (await following(scans)).reasons


async def test_a_survey_with_a_key_reads_what_is_encrypted(bluez: FakeBlueZ) -> None:
    # https://bthome.io/encryption/
    key = bytes.fromhex("231d39c1d7cc1ab1aee224cd096db932")
    found = await surveyed(bluez, 1.0, {"54:48:E6:8F:80:A5": key})
    assert found["54:48:E6:8F:80:A5"].readings["temperature"] == "25.06 °C"


async def test_a_survey_works_beside_a_running_agent_and_takes_nothing_from_it(
    bluez: FakeBlueZ, bus: PrivateBus
) -> None:
    """Another process, as `headgate scan ble` is: to BlueZ two clients, each with a scan of its own."""
    import sys
    from pathlib import Path

    script = (
        "import asyncio\nfrom drivers.ble_survey import survey\n"
        "async def main():\n    async for found in survey(2.0): print(found.address, found.readings, flush=True)\n"
        "asyncio.run(main())\n"
    )
    driver = sensor("temperature")
    async with listening(driver) as scans:
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent
        )
        assert other.stdout is not None
        told = asyncio.create_task(other.stdout.read())
        n = sent = 0
        async with asyncio.timeout(WAIT_S):
            while not told.done():
                n += 1
                sent += send(bluez, n % 100)
                assert (await following(scans)).values == [n % 100 * 200]
                await asyncio.sleep(0.01)
        await other.wait()
        assert A in (await told).decode()
        assert driver.counts.adverts == sent
        assert bluez.discovering


async def test_a_survey_that_is_left_early_ends_its_scan(bluez: FakeBlueZ) -> None:
    surveying = survey(60.0)
    first = asyncio.ensure_future(anext(surveying))
    async with asyncio.timeout(WAIT_S):
        while not first.done():
            send(bluez, 1)
            await asyncio.sleep(0.01)
    assert (await first).address == A
    await surveying.aclose()  # type: ignore[attr-defined]
    await until(lambda: not bluez.discovering)
