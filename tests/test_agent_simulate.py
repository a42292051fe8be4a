"""A simulated device, read by the real driver and by a running agent: what `--set` put there is what arrives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.simulate import Line, Simulated, Tables, raw_of, serve, wave_of, words_of
from drivers import profiles, registry
from drivers.contract import DeviceUnreachable, Reason, Scan, Value, engineering
from drivers.modbus import ModbusDriver, ModbusPoint
from drivers.modbus_plan import Table

BIN = Path(sys.executable).parent
DEADLINE_S = 30.0
OURS = sorted(file.stem for file in profiles.OURS.glob("*.toml"))


def told(scan: Scan) -> dict[str, Value | Reason]:
    seen: dict[str, Value | Reason] = {}
    for i, point in enumerate(scan.points):
        value, reason = scan.values[i], scan.reasons.get(i, Reason.GOOD)
        if value is None or reason is not Reason.GOOD:
            seen[point.name] = reason
        elif isinstance(value, bool | str):
            seen[point.name] = value
        else:
            seen[point.name] = engineering(value, point.scale, point.offset)
    return seen


async def read(
    options: dict[str, Value], points: Sequence[dict[str, object]] = (), profile: str | None = None
) -> Scan:
    own, tables = dict(options), list(points)
    if profile is not None:
        merged, tables = profiles.merge(profiles.load(profile), own, points)
        own = merged
    driver = registry.build("device", "modbus", own, tables)
    assert isinstance(driver, ModbusDriver)
    await driver.connect()
    try:
        return await driver.read(driver.points)
    finally:
        await driver.close()


def typed(*tables: dict[str, object]) -> tuple[ModbusPoint, ...]:
    driver = registry.build("device", "modbus", {"host": "192.0.2.1"}, list(tables))
    assert isinstance(driver, ModbusDriver)
    return tuple(driver.points)


def unheard(unit: int, table: Table, address: int, words: Sequence[int]) -> None:
    raise AssertionError("nobody writes here")


# ------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", OURS)
async def test_every_shipped_profile_can_be_simulated_and_reads_well_within_its_own_limits(name: str) -> None:
    profile = profiles.load(name)
    _, points = profiles.merge(profile, {}, [])
    device = Simulated(
        name=name,
        unit=1,
        points=typed(*points),
        order=str(profile.options.get("order", "ABCD")),
        detect=profile.detect,
    )
    tables = Tables()
    tables.add(device)
    async with serve(Line("tcp", {1: tables}), on_write=unheard) as at:
        scan = await read({**at.options(), "timeout_ms": 5000}, profile=name)
    assert scan.reasons == {}
    for point, value in zip(scan.points, scan.values, strict=True):
        assert value not in point.not_available, point.name
        if isinstance(value, int | float) and not isinstance(value, bool):
            shown = engineering(value, point.scale, point.offset)
            assert point.valid_min is None or shown >= point.valid_min, point.name
            assert point.valid_max is None or shown <= point.valid_max, point.name
            assert point.one_of is None or shown in point.one_of, point.name
    for mark in profile.detect.mark:
        found = await_mark(tables, mark.register, mark.table)
        assert found is not None, "a scan that looks for the model finds it"


def await_mark(tables: Tables, register: int, table: str) -> int | None:
    return tables.cells[Table(table)].get(register)


async def test_the_values_move() -> None:
    _, points = profiles.merge(profiles.load("eastron-sdm120"), {}, [])
    tables = Tables()
    tables.add(Simulated(name="m", unit=1, points=typed(*points)))
    async with serve(Line("tcp", {1: tables}), on_write=unheard) as at:
        first = told(await read(at.options(), profile="eastron-sdm120"))
        until_s = time.monotonic() + DEADLINE_S
        while told(await read(at.options(), profile="eastron-sdm120"))["power"] == first["power"]:
            assert time.monotonic() < until_s, "the power stands still"


def cells(point: dict[str, object], value: Value, order: str = "ABCD") -> str:
    """The registers of a value, in hex."""
    held = words_of(typed(point)[0], value, order)
    return b"".join(struct.pack(">H", held[at][0]) for at in sorted(held)).hex()


@pytest.mark.parametrize(
    ("keys", "value", "wire"),
    [
        ({"type": "u16"}, 258, "0102"),
        ({"type": "i16"}, -2, "fffe"),
        ({"type": "i32"}, -2, "fffffffe"),
        ({"type": "u32", "order": "CDAB"}, 0x01020304, "03040102"),
        ({"type": "f32"}, 1.5, "3fc00000"),
        ({"type": "f64"}, 1.5, "3ff8000000000000"),
        ({"type": "u8"}, 7, "0007"),
        ({"type": "str", "length": 4}, "Ab", "41620000"),
        ({"encoding": "bcd", "type": "u16"}, 1234, "1234"),
        ({"encoding": "date_bcd", "type": "i64"}, 1709210096, "240229123456"),
        ({"encoding": "date_registers", "type": "i64"}, 1709210096, "07e80002001d000c00220038"),
        ({"bit": 3}, True, "0008"),
        ({"bit": 4, "bits": 3, "type": "u8"}, 5, "0050"),
        ({"scale_register": 4, "encoding": "i16"}, 12.5, "04e2fffe"),
    ],
)  # fmt: skip
def test_registers_hold_a_value_as_the_point_says(keys: dict[str, object], value: Value, wire: str) -> None:
    point = {"name": "x", "register": 0, **keys}
    assert cells(point, value, str(keys.get("order", "ABCD"))) == wire


def test_no_moving_value_is_one_that_means_not_available() -> None:
    (point,) = typed({"name": "x", "register": 0, "type": "i16", "not_available": [50]})
    assert raw_of(point, 50.0) == 51


def test_a_wave_stays_within_what_limits_and_type_allow() -> None:
    (narrow,) = typed({"name": "x", "unit": "V", "register": 0, "valid_min": 10.0, "valid_max": 12.0})
    assert 10.0 <= wave_of(narrow).low <= wave_of(narrow).high <= 12.0
    (small,) = typed({"name": "x", "unit": "W", "register": 0, "type": "u8"})
    assert 0.0 <= wave_of(small).low <= wave_of(small).high <= 255.0
    (scaled,) = typed({"name": "x", "unit": "V", "register": 0, "scale": 0.001})
    assert wave_of(scaled).high <= 65.535


# ------------------------------------------------------------------------------------------- the lines


@pytest.mark.parametrize("framing", ["tcp", "udp", "rtu_over_tcp", "ascii_over_tcp", "rtu", "ascii"])
async def test_a_device_is_served_in_every_framing_and_only_at_its_addresses(framing: str) -> None:
    points = [
        {"name": "level", "register": 10, "type": "f32", "order": "CDAB"},
        {"name": "on", "table": "coil", "register": 3},
        {"name": "far", "register": 500},
    ]
    device = Simulated(name="tank", unit=5, points=typed(*points))
    tables = Tables()
    tables.add(device)
    tables.set("tank", device.points[0], 12.25, "ABCD")
    tables.set("tank", device.points[1], True, "ABCD")
    tables.set("tank", device.points[2], 7.0, "ABCD")
    async with serve(Line(framing, {5: tables}), on_write=unheard) as at:
        options = {**at.options(), "unit": 5}
        scan = await read(options, [*points, {"name": "nothing", "register": 300}])
        assert told(scan) == {"level": 12.25, "on": True, "far": 7.0, "nothing": Reason.REFUSED}
        expected = Reason.BEHIND_GATEWAY if framing in ("tcp", "udp") else Reason.TIMEOUT
        with pytest.raises(DeviceUnreachable) as other:
            await read({**at.options(), "unit": 6, "timeout_ms": 200}, points)
        assert other.value.reason is expected


async def test_what_a_master_writes_stays_and_is_told() -> None:
    points = [{"name": "setpoint", "register": 3, "type": "i32", "writable": True}]
    heard: list[tuple[int, Table, int, list[int]]] = []
    device = Simulated(name="oven", unit=1, points=typed(*points))
    tables = Tables()
    tables.add(device)
    async with serve(
        Line("tcp", {1: tables}), on_write=lambda *what: heard.append((*what[:3], list(what[3])))
    ) as at:
        driver = registry.build("oven", "modbus", at.options(), points)
        assert isinstance(driver, ModbusDriver)
        await driver.connect()
        try:
            await driver.write(driver.points[0], 70000)
            assert list((await driver.read(driver.points)).values) == [70000]
        finally:
            await driver.close()
    assert heard == [(1, Table.HOLDING, 3, [1, 4464])]


# ------------------------------------------------------------------------------------------- the command


@contextlib.contextmanager
def simulating(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """The command itself, ready."""
    process = subprocess.Popen(
        [str(BIN / "headgate"), "simulate", *map(str, words), "--json", "--for", str(2 * DEADLINE_S)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate(timeout=DEADLINE_S)[1])
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def first(ready: dict[str, object]) -> dict[str, dict[str, Value]]:
    serving = ready["serving"]
    assert isinstance(serving, list)
    found: dict[str, dict[str, Value]] = serving[0]
    return found


async def test_a_profile_is_served_and_shows_what_set_put_there_and_ctrl_c_ends_it_well() -> None:
    with simulating(
        "abb-b23", "--port", "0", "--unit", "9", "--set", "voltage_l1=231.7", "--set", "energy_import=1234.56"
    ) as (process, ready):
        scan = await read(first(ready)["options"], profile="abb-b23")
        seen = told(scan)
        assert seen["voltage_l1"] == pytest.approx(231.7)
        assert seen["energy_import"] == pytest.approx(1234.56)
        assert first(ready)["points"]["voltage_l1"] == "231.7 V"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


async def test_a_profile_is_served_on_a_pty_with_a_name_that_goes_with_it(tmp_path: Path) -> None:
    link = tmp_path / "meter"
    with simulating("eastron-sdm120", "--serial", link, "--set", "frequency=49.5") as (process, ready):
        assert link.is_symlink()
        seen = told(await read(first(ready)["options"], profile="eastron-sdm120"))
        assert seen["frequency"] == 49.5
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert not link.is_symlink()


PLANT = """\
    # A plant, and its words stay.
    [gateway]
    tenant = "t"
    name = "g"

    [uplink]
    kind = "none"

    [[device]]
    name = "meter"  # in the cellar
    profile = "eastron-sdm120"
    period_ms = 200
    options = { host = "192.0.2.9" }

    [[device]]
    name = "oven"
    profile = "omron-e5cc"
    period_ms = 200

    [device.options]
    serial = "/dev/ttyUSB7"
    unit = 4

    [[device]]
    name = "demo"
    driver = "simulator"

    [[device.point]]
    name = "x"
"""


def test_an_agent_runs_a_configuration_with_no_hardware_and_reads_what_set_put_there(tmp_path: Path) -> None:
    config, out = tmp_path / "plant.toml", tmp_path / "here.toml"
    config.write_text(textwrap.dedent(PLANT))
    with simulating(
        config,
        "--port",
        "0",
        "--config-out",
        out,
        "--set",
        "meter.voltage=229.5",
        "--set",
        "process_value=181",
    ) as (_, ready):
        assert "demo" in dict(ready["skipped"])  # type: ignore[call-overload]
        assert out.read_text().startswith("# A plant, and its words stay.")
        assert "# in the cellar" in out.read_text()
        agent = subprocess.Popen(
            [str(BIN / "headgate"), "run", "--config", str(out), "--state-dir", str(tmp_path / "state")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert shown(out, tmp_path, "meter", "voltage") == 229.5
            assert shown(out, tmp_path, "oven", "process_value") == 181
            assert agent.poll() is None
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(DEADLINE_S) == 0
        finally:
            agent.kill()
            agent.communicate()


def shown(config: Path, folder: Path, device: str, point: str) -> object:
    """What the running agent reads, by its own command."""
    until_s = time.monotonic() + DEADLINE_S
    while True:
        said = subprocess.run(
            [
                str(BIN / "headgate"),
                "read",
                device,
                "--config",
                str(config),
                "--state-dir",
                str(folder / "state"),
                "--json",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for reading in json.loads(said.stdout)["readings"]:
                if reading["point"] == point and reading["value"] is not None:
                    return reading["value"]
        if time.monotonic() > until_s:
            raise AssertionError(said.stdout + said.stderr)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["eastron-sdm12"], "unknown profile 'eastron-sdm12'; did you mean 'eastron-sdm120'?"),
        (["eastron-sdm120", "--set", "volt=1"], "no point 'volt'; did you mean 'voltage'?"),
        (["eastron-sdm120", "--set", "voltage"], "say POINT=VALUE"),
        (["eastron-sdm120", "--set", "voltage=high"], "'high' is not a number"),
        (["abb-b23", "--set", "voltage_l1=1e12"], "does not fit u32"),
        (["huawei-sun2000", "--set", "power=1.5"], "cannot hold 1.5; the nearest is 2"),
        (["omron-e5cc", "--set", "process_value=23.456"], "cannot hold 23.456; the nearest is 23.46"),
        (["abb-b23", "--port", "70000"], "'--port': 70000 is not in the range"),
        (["abb-b23", "--set", "voltage_l1=nan"], "--set voltage_l1"),
        (["eastron-sdm120", "--device", "x"], "are of a CONFIG"),
        (["eastron-sdm120", "--framing", "rtu"], "need --serial"),
        (["eastron-sdm120", "--serial", "--framing", "tcp"], "--serial needs one of them"),
        (["eastron-sdm120", "--bind", "203.0.113.77", "--for", "0"], "give another --port or --bind"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told_with_the_remedy(words: list[str], text: str) -> None:
    said = CliRunner().invoke(main, ["simulate", *words])
    assert said.exit_code == 2, said.output
    assert text in said.output
    assert "Traceback" not in said.output


async def test_a_value_that_means_not_available_can_be_set_too() -> None:
    with simulating("abb-b23", "--port", "0", "--set", "power=21474836.47") as (_, ready):
        scan = await read(first(ready)["options"], profile="abb-b23")
        values = {point.name: value for point, value in zip(scan.points, scan.values, strict=True)}
        assert values["power"] == 0x7FFFFFFF


def test_the_name_of_a_real_port_is_not_taken_from_it(tmp_path: Path) -> None:
    real, link = tmp_path / "ttyUSB0", tmp_path / "usb-FTDI"
    real.touch()
    link.symlink_to(real)
    said = CliRunner().invoke(main, ["simulate", "abb-b23", "--serial", str(link), "--for", "0"])
    assert said.exit_code == 2
    assert "not a simulation's; give another name" in said.output
    assert link.resolve() == real


def test_a_configuration_is_never_written_over_and_needs_as_many_ports_as_lines(tmp_path: Path) -> None:
    config = tmp_path / "plant.toml"
    config.write_text(textwrap.dedent(PLANT) + '[[device]]\nname = "b"\nprofile = "abb-b23"\n'
                      'options = { host = "192.0.2.8" }\n')  # fmt: skip
    before = config.read_text()
    same = tmp_path / "." / "plant.toml"
    said = CliRunner().invoke(
        main, ["simulate", str(config), "--config-out", str(same), "--port", "0", "--for", "0"]
    )
    assert (said.exit_code, config.read_text()) == (2, before)
    assert "that is the configuration itself" in said.output
    said = CliRunner().invoke(main, ["simulate", str(config), "--port", "65535", "--for", "0"])
    assert said.exit_code == 2
    assert "need as many ports" in said.output


def test_a_port_in_use_is_told_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = subprocess.run(
            [str(BIN / "headgate"), "simulate", "abb-b23", "--port", port, "--for", "0"],
            capture_output=True, text=True, check=False, timeout=DEADLINE_S,
        )  # fmt: skip
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1, said.stderr
    assert "it is in use" in said.stderr


_STRUCT = {
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "f32": "f",
    "f64": "d",
    "u8": "xB",
}


def by_hand(point: ModbusPoint, cells: dict[int, int], order: str) -> float:
    """What the registers say, by the rules of IEEE 754, two's complement and the order of words alone."""
    code = _STRUCT[str(point.encoding or point.type)]
    count = max(1, struct.calcsize(">" + code) // 2)
    words = [cells[point.register + i] for i in range(count)]
    if (point.order or order) == "CDAB":
        words.reverse()
    value = struct.unpack(">" + code, struct.pack(f">{count}H", *words))[0]
    if point.decimals_register is not None:
        value /= 10 ** cells[point.decimals_register]
    return float(value * point.scale + point.offset)


@pytest.mark.parametrize("name", OURS)
async def test_an_hour_of_every_shipped_profile_lies_within_its_limits_as_bytes_read_by_hand(
    name: str,
) -> None:
    profile = profiles.load(name)
    points = typed(*profiles.merge(profile, {}, [])[1])
    order = str(profile.options.get("order", "ABCD"))
    device = Simulated(name=name, unit=1, points=points, order=order, detect=profile.detect)
    now_ns = 0
    tables = Tables(clock_ns=lambda: now_ns)
    tables.add(device)
    for second in range(0, 3600, 7):
        now_ns = second * 1_000_000_000
        tables.changed()
        await tables.refresh()
        for point in points:
            if point.type in ("str", "bool") or point.bit is not None:
                continue
            shown = by_hand(point, tables.cells[point.table], order)
            assert point.valid_min is None or shown >= point.valid_min - 1e-9, (point.name, second, shown)
            assert point.valid_max is None or shown <= point.valid_max + 1e-9, (point.name, second, shown)
            assert point.one_of is None or shown in point.one_of, (point.name, second, shown)


def test_a_configuration_with_nothing_to_simulate_says_what_can_be(tmp_path: Path) -> None:
    config = tmp_path / "plant.toml"
    config.write_text(
        '[gateway]\ntenant = "t"\nname = "g"\n[uplink]\nkind = "none"\n'
        '[[device]]\nname = "demo"\ndriver = "simulator"\n[[device.point]]\nname = "x"\n'
    )
    said = CliRunner().invoke(main, ["simulate", str(config)])
    assert said.exit_code == 2
    assert (
        "nothing here can be simulated (demo: driver 'simulator': it needs no hardware anyway)" in said.output
    )


def test_a_bad_configuration_is_refused_as_config_check_would(tmp_path: Path) -> None:
    config = tmp_path / "plant.toml"
    config.write_text("[gateway]\n")
    said = CliRunner().invoke(main, ["simulate", str(config)])
    assert said.exit_code == 2
    assert "gateway.tenant: is required and missing" in said.output


def test_listening_beyond_this_machine_is_warned_of() -> None:
    said = CliRunner().invoke(
        main, ["simulate", "eastron-sdm120", "--bind", "0.0.0.0", "--port", "0", "--for", "0"]
    )
    assert said.exit_code == 0, said.output
    assert "warning: Modbus has no authentication" in said.output


def test_it_speaks_plainly_in_eighty_columns() -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(
        main, ["simulate", "huawei-sun2000", "--port", "0", "--for", "0"]
    )
    assert said.exit_code == 0, said.output
    assert max(map(len, said.output.splitlines())) <= 80
    assert "\x1b" not in said.output
    assert os.linesep in said.output


async def test_points_with_scale_registers_bcd_dates_and_bits_are_simulated_too() -> None:
    points: list[dict[str, object]] = [
        {"name": "power", "unit": "W", "register": 0, "encoding": "i16", "scale_register": 2},
        {"name": "energy", "unit": "Wh", "register": 4, "encoding": "u32", "scale_register": 2},
        {"name": "count", "register": 6, "type": "u32", "encoding": "bcd"},
        {"name": "signed", "register": 8, "type": "i16", "encoding": "sign_magnitude"},
        {"name": "wide", "register": 10, "type": "u32", "encoding": "mod10000"},
        {"name": "at", "register": 12, "encoding": "date_registers"},
        {"name": "at_bcd", "register": 20, "encoding": "date_bcd"},
        {"name": "at_cp56", "register": 24, "encoding": "cp56time2a"},
        {"name": "at_unix", "register": 28, "encoding": "epoch_32"},
        {"name": "ready", "register": 30, "bit": 2},
        {"name": "step", "register": 31, "bit": 4, "bits": 3, "type": "u8", "overlap": True},
        {"name": "low", "register": 31, "bit": 0, "overlap": True},
    ]
    device = Simulated(name="d", unit=1, points=typed(*points))
    tables = Tables()
    tables.add(device)
    tables.set("d", device.points[0], -123.45, "ABCD")
    tables.set("d", device.points[2], 123456.0, "ABCD")
    tables.set("d", device.points[3], -77.0, "ABCD")
    tables.set("d", device.points[4], 12345678.0, "ABCD")
    tables.set("d", device.points[10], 5.0, "ABCD")
    tables.set("d", device.points[11], True, "ABCD")
    now_s = time.time()
    async with serve(Line("tcp", {1: tables}), on_write=unheard) as at:
        scan = await read(at.options(), points)
    assert scan.reasons == {}
    seen = told(scan)
    assert seen["power"] == pytest.approx(-123.45)
    assert (seen["count"], seen["signed"], seen["wide"]) == (123456, -77, 12345678)
    assert (seen["step"], seen["low"]) == (5, True)
    for name in ("at", "at_bcd", "at_cp56", "at_unix"):
        instant = seen[name]
        assert isinstance(instant, int | float)
        assert abs(instant - now_s) < DEADLINE_S, name
