"""Each shipped profile, read by the real driver from a real Modbus server that serves bytes written by hand.

The expected values are the vendor's own examples (said so beside them), or follow from the encoding that the vendor's
document states: IEEE 754, two's complement, high or low word first, the resolution of the register. Our encoder and
decoder have no part in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import pytest

from drivers import profiles, registry
from drivers.contract import Reason, engineering
from drivers.modbus import ModbusDriver, ModbusPoint
from tests.fakes.modbus_peer import Unit, crc16, tcp_peer

Expected = float | str | bool | Reason


class Case(msgspec.Struct, frozen=True):
    """What stands in the device: (table, first address) -> its bytes in hex, and what a person must see."""

    registers: Mapping[tuple[str, int], str]
    expected: Mapping[str, Expected]
    coils: Mapping[int, bool] = {}


H, I = "holding", "input"  # noqa: E741 - the two tables, as a map's reader knows them

CASES: Final[dict[str, Case]] = {
    # Eastron's own example of a reply, in all its manuals: 01 04 04 43 66 33 34 1B 38 is 230.2 V.
    "eastron-sdm120": Case(
        {(I, 0x00): "43663334", (I, 0x06): "3FC00000", (I, 0x0C): "43A60000", (I, 0x1E): "BF000000",
         (I, 0x46): "42480000", (I, 0x48): "449A5000", (I, 0x156): "44A00000"},
        {"voltage": 230.2, "current": 1.5, "power": 332.0, "power_factor": -0.5, "frequency": 50.0,
         "energy_import": 1234.5, "energy_total": 1280.0},
    ),
    "eastron-sdm630": Case(
        {(I, 0x00): "43663334", (I, 0x02): "43670000", (I, 0x04): "4365CCCD", (I, 0x34): "C47A0000",
         (I, 0x3E): "BF800000", (I, 0x46): "42480000", (I, 0x4A): "449A5000", (I, 0x16A): "3F000000"},
        {"voltage_l1": 230.2, "voltage_l2": 231.0, "voltage_l3": 229.8, "power": -1000.0, "power_factor": -1.0,
         "frequency": 50.0, "energy_export": 1234.5, "energy_total_l3": 0.5},
    ),
    # Float32, and whole Wh as 64-bit numbers (DOCA0005EN); the manual's 3028 is address 3027.
    "schneider-iem3155": Case(
        {(H, 2999): "41200000", (H, 3027): "43663334", (H, 3059): "BFC00000", (H, 3109): "42480000",
         (H, 3203): "000000000012D687", (H, 3525): "0000000100000000"},
        {"current_l1": 10.0, "voltage_l1": 230.2, "power": -1.5, "frequency": 50.0, "energy_import": 1234567.0,
         "energy_import_l3": 4294967296.0},
    ),
    "schneider-iem3255": Case(
        {(H, 2999): "43FA0000", (H, 3059): "43960000", (H, 3203): "00000000000003E8"},
        {"current_l1": 500.0, "power": 300.0, "energy_import": 1000.0},
    ),
    # Resolutions of ABB's mapping table: 0.01 kWh (four registers), 0.1 V, 0.01 A, 0.01 W signed, 0.01 Hz, 0.001.
    "abb-b23": Case(
        {(H, 0x5000): "000000000001E240", (H, 0x5004): "FFFFFFFFFFFFFFFF", (H, 0x5B00): "000008FE",
         (H, 0x5B02): "FFFFFFFF", (H, 0x5B0C): "0000007B", (H, 0x5B14): "FFFFFF9C", (H, 0x5B16): "7FFFFFFF",
         (H, 0x5B2C): "1388", (H, 0x5B3A): "FC18", (H, 0x5B3B): "7FFF"},
        {"energy_import": 1234.56, "voltage_l1": 230.2, "current_l1": 1.23, "power": -1.0, "frequency": 50.0,
         "power_factor": -1.0},
    ),
    # Two words, the low one first, in tenths (volts, watts, kWh) and thousandths (amperes).
    "carlo-gavazzi-em340": Case(
        {(I, 0x00): "08FE0000", (I, 0x0C): "86A00001", (I, 0x28): "FF9CFFFF", (I, 0x31): "FC18", (I, 0x33): "01F4",
         (I, 0x34): "E2400001"},
        {"voltage_l1": 230.2, "current_l1": 100.0, "power": -10.0, "power_factor": -1.0, "frequency": 50.0,
         "energy_import": 12345.6},
    ),
    "carlo-gavazzi-em24": Case(
        {(I, 0x02): "08FE0000", (I, 0x35): "03E8", (I, 0x37): "01F3", (I, 0x42): "E2400001", (I, 0x5C): "00010000"},
        {"voltage_l2": 230.2, "power_factor": 1.0, "frequency": 49.9, "energy_import": 12345.6, "energy_export": 0.1},
    ),
    # Float and double, high word first; an offset of the table is the address.
    "siemens-pac3200": Case(
        {(H, 1): "43660000", (H, 13): "40200000", (H, 65): "C2C80000", (H, 69): "3F400000",
         (H, 801): "40934A0000000000", (H, 809): "3FE0000000000000"},
        {"voltage_l1": 230.0, "current_l1": 2.5, "power": -100.0, "power_factor": 0.75,
         "energy_import_tariff_1": 1234.5, "energy_export_tariff_1": 0.5},
    ),
    # The reply of the manual's 2.3: 220.0 V, 1.000 A, 220.0 W, 0 Wh, 50.0 Hz, 1.00, no alarm.
    "peacefair-pzem-016": Case(
        {(I, 0): "0898 03E80000 08980000 00000000 01F4 0064 0000"},
        {"voltage": 220.0, "current": 1.0, "power": 220.0, "energy": 0.0, "frequency": 50.0, "power_factor": 1.0,
         "over_power_alarm": 0.0},
    ),
    "orno-we-514": Case(
        {(H, 0x130): "1388", (H, 0x131): "59EC", (H, 0x139): "000004D2", (H, 0x140): "0000011C", (H, 0x158): "03E7",
         (H, 0xA000): "0001E240"},
        {"frequency": 50.0, "voltage": 230.2, "current": 1.234, "power": 284.0, "power_factor": 0.999,
         "energy_total": 1234.56},
    ),
    # Gains of the interface definitions: 10 (V, °C), 100 (A of a string, Hz, kWh), 1000 (A of a phase, power factor).
    "huawei-sun2000": Case(
        {(H, 30000): "53554E323030302D364B544C2D4D31" + "00" * 15, (H, 30073): "00001770", (H, 32016): "1964",
         (H, 32017): "FFFF", (H, 32064): "00000052", (H, 32066): "091E", (H, 32072): "000004D2",
         (H, 32080): "FFFFFFFE", (H, 32085): "1388", (H, 32087): "FFCE", (H, 32106): "0001E240"},
        {"model": "SUN2000-6KTL-M1", "rated_power": 6000.0, "pv1_voltage": 650.0, "pv1_current": -0.01,
         "input_power": 82.0, "voltage_l1_l2": 233.4, "current_l1": 1.234, "power": -2.0, "frequency": 50.0,
         "temperature": -5.0, "energy_total": 1234.56},
    ),
    "growatt-tl": Case(
        {(I, 0): "0001", (I, 1): "00015F90", (I, 3): "0DAC", (I, 4): "0032", (I, 35): "000186A0", (I, 37): "1388",
         (I, 38): "08FE", (I, 55): "0001E240"},
        {"status": 1.0, "input_power": 9000.0, "pv1_voltage": 350.0, "pv1_current": 5.0, "power": 10000.0,
         "frequency": 50.0, "voltage_l1": 230.2, "energy_total": 12345.6},
    ),
    # SunSpec: float32, NaN is "not implemented".
    "fronius-symo": Case(
        {(H, 40071): "41200000", (H, 40075): "7FC00000", (H, 40091): "459C4000", (H, 40093): "42480000",
         (H, 40101): "4B189680", (H, 40117): "0004"},
        {"current": 10.0, "current_l2": Reason.NAN, "power": 5000.0, "frequency": 50.0, "energy": 1e7, "state": 4.0},
    ),
    # Parameter n as a float at 8000 hex + 2 n: PV (1), set point (2), output (4).
    "eurotherm-3200": Case(
        {(H, 0x8002): "41BC0000", (H, 0x8004): "C1200000", (H, 0x8008): "42C80000", (H, 15): "0001", (H, 23): "0002",
         (H, 75): "0020"},
        {"process_value": 23.5, "sensor_break": True, "process_value_out_of_range": False,
         "target_setpoint": -10.0, "working_output": 100.0, "active_setpoint": 1.0, "timer_status": 2.0},
    ),
    # H175 itself gives H'FFFFFFCE as -5.0 and H'0000041A as 105.0 (MV), H'00000226 as 55.0 (heater current), and
    # H'FFFFF831 to H'0000270F as -1999 to 9999; in two-byte mode "the rightmost 16 bits are read". 105.0 is 1050.
    "omron-e5cc": Case(
        {(H, 0x2000): "041A", (H, 0x2001): "0040", (H, 0x2002): "F831", (H, 0x2003): "0226", (H, 0x2004): "FFCE",
         (H, 0x2005): "041A", (H, 0x2103): "270F", (H, 0x2410): "0001"},
        {"process_value": 105.0, "input_error": True, "internal_setpoint": -199.9, "heater_current_1": 55.0,
         "output_heating": -5.0, "output_cooling": 105.0, "setpoint": 999.9},
    ),
    # MG.02.A4.02's own example: PNU 342 is read at 0x0D5B as 00 00 00 03. And coil 44 is "running".
    "danfoss-fc51": Case(
        {(H, 0x0D5B): "00000003", (H, 16009): "0000BB8A", (H, 16019): "FF9C", (H, 16129): "01F4", (H, 16139): "00D2"},
        {"ramp_time_down": 0.03, "reference": 48.01, "reference_percent": -10.0, "frequency": 50.0,
         "motor_current": 2.1, "running": True, "tripped": False},
        coils={43: True},
    ),
    # LONG and REAL4, "lower byte first": REG0001-0002 at address 0; 123456 is 0001 E240.
    "tuf-2000": Case(
        {(H, 0): "00003FC0", (H, 4): "0000BF00", (H, 8): "E2400001", (H, 10): "00003F40", (H, 12): "FFFFFFFF",
         (H, 71): "0000", (H, 91): "0358", (H, 92): "0384"},
        {"flow_rate": 1.5, "velocity": -0.5, "positive_total": 123456.0, "positive_fraction": 0.75,
         "negative_total": -1.0, "error_bits": 0.0, "signal_quality": 88.0, "signal_upstream": 900.0},
    ),
}  # fmt: skip

NOT_AVAILABLE: Final[dict[str, tuple[str, ...]]] = {
    "abb-b23": ("energy_export", "voltage_l2", "power_l1", "power_factor_l1")
}

OURS = sorted(file.stem for file in profiles.OURS.glob("*.toml"))


def built(name: str, **options: object) -> ModbusDriver:
    profile = profiles.load(name)
    own = {"host": "127.0.0.1", **options}
    merged, points = profiles.merge(profile, own, [])
    driver = registry.build("device", profile.driver, merged, points)
    assert isinstance(driver, ModbusDriver)
    return driver


def served(case: Case) -> Unit:
    tables: dict[str, list[int]] = {}
    for table in (H, I):
        end = max(
            (
                at + len(bytes.fromhex(text)) // 2
                for (where, at), text in case.registers.items()
                if where == table
            ),
            default=1,
        )
        # Whatever else the profile reads is there, and zero.
        tables[table] = [0] * max(end, 0xB000)
    for (table, at), text in case.registers.items():
        data = bytes.fromhex(text)
        words = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
        tables[table][at : at + len(words)] = words
    coils = [case.coils.get(at, False) for at in range(64)]
    return Unit(holding=tables[H], input=tables[I], coils=coils)


@pytest.mark.parametrize("name", OURS)
async def test_a_shipped_profile_reads_the_values_that_its_document_says(name: str) -> None:
    case = CASES[name]
    async with tcp_peer({1: served(case)}) as peer:
        driver = built(name, port=peer.port, timeout_ms=5000)
        await driver.connect()
        try:
            scan = await driver.read(driver.points)
        finally:
            await driver.close()
    seen: dict[str, Expected] = {}
    for i, point in enumerate(scan.points):
        value, reason = scan.values[i], scan.reasons.get(i, Reason.GOOD)
        if value is None:
            seen[point.name] = reason
        elif isinstance(value, bool | str):
            seen[point.name] = value
        else:
            seen[point.name] = engineering(value, point.scale, point.offset)
    for point_name, expected in case.expected.items():
        wanted = pytest.approx(expected, rel=1e-7) if isinstance(expected, float) else expected
        assert seen[point_name] == wanted, point_name


@pytest.mark.parametrize("name", OURS)
def test_a_shipped_profile_has_an_expected_value_for_every_type_table_and_order_it_uses(name: str) -> None:
    driver = built(name)

    def way(point: ModbusPoint) -> tuple[str, str, str]:
        width = 1 if point.type in ("u8", "i8", "u16", "i16", "bool", "str") else 2
        return point.table, point.type, (point.order or driver.options.order) if width == 2 else ""

    used = {way(point) for point in driver.points}
    tested = {way(point) for point in driver.points if point.name in CASES[name].expected}
    assert used == tested


@pytest.mark.parametrize(("decimals", "value"), [(0, 1050.0), (1, 105.0), (2, 10.5), (3, 1.05)])
async def test_an_e5cc_shows_its_temperature_with_as_many_decimals_as_it_is_set_to(
    decimals: int, value: float
) -> None:
    case = Case({(H, 0x2000): "041A", (H, 0x2410): f"{decimals:04X}"}, {})
    async with tcp_peer({1: served(case)}) as peer:
        driver = built("omron-e5cc", port=peer.port, timeout_ms=5000)
        await driver.connect()
        try:
            scan = await driver.read(driver.points)
        finally:
            await driver.close()
    assert (scan.points[0].name, scan.values[0]) == ("process_value", value)


@pytest.mark.parametrize("name", sorted(NOT_AVAILABLE))
async def test_what_the_device_calls_not_available_is_that_raw_value_of_the_profile(name: str) -> None:
    async with tcp_peer({1: served(CASES[name])}) as peer:
        driver = built(name, port=peer.port)
        await driver.connect()
        try:
            scan = await driver.read(driver.points)
        finally:
            await driver.close()
    raw = {point.name: (scan.values[i], point.not_available) for i, point in enumerate(scan.points)}
    for point_name in NOT_AVAILABLE[name]:
        value, sentinels = raw[point_name]
        assert value in sentinels, point_name


@pytest.mark.parametrize("name", OURS)
def test_a_shipped_profile_names_its_source_and_would_be_accepted(name: str) -> None:
    profile = profiles.load_file(profiles.OURS / f"{name}.toml")
    profiles.check(profile)
    assert len(profile.source) > 40
    assert profile.kind in {
        "energy meter",
        "inverter",
        "temperature controller",
        "variable speed drive",
        "flow meter",
    }
    text = (profiles.OURS / f"{name}.toml").read_text()
    assert text.startswith("# "), "says what of the source was seen"


def test_the_kinds_that_were_promised_are_there() -> None:
    kinds = [profiles.load(name).kind for name in OURS]
    assert len(OURS) >= 14
    assert {
        "energy meter",
        "inverter",
        "temperature controller",
        "variable speed drive",
        "flow meter",
    } == set(kinds)


def test_eastrons_example_is_one_its_check_holds() -> None:
    assert crc16(bytes.fromhex("01040443663334")) == bytes.fromhex("1B38")
