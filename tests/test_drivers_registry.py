"""Drivers by name: nothing imported that is not asked for, and errors that name the place and the remedy."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import msgspec
import pytest

from config.agent import Device
from config.load import convert
from drivers import registry
from drivers.contract import ConfigError, Driver, Point, PushDriver, Scan
from drivers.registry import TableError, build, driver_types, load

ROOT = Path(__file__).parent.parent
SAMPLES = sorted((ROOT / "drivers").glob("*.toml"))
HOST = {"host": "192.0.2.1"}


def test_our_drivers_are_found_by_entry_point() -> None:
    assert {"modbus", "serial_line", "ble", "simulator"} <= set(driver_types())


@pytest.mark.parametrize("name", ["modbus", "serial_line", "ble", "simulator"])
def test_each_of_our_drivers_loads_and_says_its_types(name: str) -> None:
    kind = load(name)
    assert issubclass(kind, Driver) != issubclass(kind, PushDriver)
    assert issubclass(kind.point_type, Point)
    assert issubclass(kind.options_type, msgspec.Struct)


def test_only_the_driver_asked_for_is_imported() -> None:
    script = (
        "import sys; from drivers.registry import build;"
        "build('d', 'modbus', {'host': 'h'}, [{'name': 'p', 'register': 0}]);"
        "print([m for m in ('bleak', 'dbus_fast', 'httpx', 'numpy', 'rich') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_a_lookup_imports_no_driver() -> None:
    script = (
        "import sys; from drivers.registry import driver_types; driver_types();"
        "print([m for m in sys.modules if m in ('drivers.modbus', 'drivers.ble', 'pymodbus', 'serial')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_an_unknown_driver_names_the_nearest_and_all_others() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown driver 'modbuss'; did you mean 'modbus'\? \(valid: .*simulator"
    ):
        load("modbuss")


@pytest.mark.parametrize(
    ("options", "points", "text", "path"),
    [
        (HOST, [{"name": "flow", "registerr": 1}], "point 'flow': unknown key 'registerr'; did you mean 'register'?",
         "point[0].registerr"),
        ({**HOST, "unti": 1}, [], "options: unknown key 'unti'; did you mean 'unit'?", "options.unti"),
        ({**HOST, "unit": 300}, [], "options: unit: Expected a whole number <= 255, found 300", "options.unit"),
        ({**HOST, "unit": "1"}, [], "options: unit: Expected a whole number, got a string", "options.unit"),
        (HOST, [{"name": "a", "register": 0}, {"name": "flow"}], "point 'flow': register: is required and missing",
         "point[1].register"),
        (HOST, [{"register": 0}], "point number 1: name: is required and missing", "point[0].name"),
        (HOST, [{"name": "flow", "register": 0, "type": "u17"}],
         "point 'flow': type: 'u17' is not one of the valid words; did you mean 'u16'?", "point[0].type"),
        (HOST, [{"name": "flow", "register": 0, "table": "holdin"}],
         "did you mean 'holding'? (valid: coil, discrete, holding, input)", "point[0].table"),
        ({**HOST, "framing": "tpc"}, [], "did you mean 'tcp'? (valid: ascii, ascii_over_tcp, rtu,", "options.framing"),
        (HOST, [{"name": "a", "register": 0}, {"name": "a", "register": 1}],
         "point 'a': this name is taken by point number 1", "point[1].name"),
        (HOST, [{"name": "a", "register": 0, "not_available": "x"}], "not_available: Expected a list, got a string",
         "point[0].not_available"),
        (HOST, [{"name": "a", "register": 0}, {"name": "b", "register": 1, "order": "XY"}],
         "order 'XY' is not valid (valid: ABCD, CDAB, BADC, DCBA", "point[1]"),
        ({}, [], "options: give either host", "options"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_the_place_and_the_remedy(
    options: dict[str, object], points: list[dict[str, object]], text: str, path: str
) -> None:
    with pytest.raises(TableError) as refused:
        build("boiler", "modbus", options, points)
    assert str(refused.value).startswith("device 'boiler' ")
    assert text in str(refused.value)
    assert refused.value.path == path


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_package:Thing", "cannot be loaded: No module named 'no_such_package'"),
        ("drivers.contract:NoSuchClass", "cannot be loaded"),
        ("drivers.contract:boot_ns", "is not a Driver or PushDriver"),
        ("drivers.contract:Point", "is not a Driver or PushDriver"),
        ("drivers.contract:Driver", "does not declare its options_type"),
    ],
)
def test_a_broken_package_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", value, group)])
    with pytest.raises(ConfigError, match=f"driver 'mine' .*{why}"):
        load("mine")


class _BuiltBadly(Driver[msgspec.Struct, Point]):
    options_type = msgspec.Struct
    point_type = Point

    async def connect(self) -> None: ...

    async def close(self) -> None: ...

    async def read(self, points: object) -> Scan:
        raise NotImplementedError

    def __init__(self, name: str, options: msgspec.Struct, points: object) -> None:
        raise KeyError("unit")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no library')", "no library"),
        ("import sys; sys.exit(3)", "SystemExit"),
    ],
)
def test_a_strangers_module_that_fails_while_it_is_loaded_is_an_error_of_its_device(
    source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other devices of the gateway are none the worse for it."""
    name = f"strange_{what.split(maxsplit=1)[0].lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("bad", f"{name}:Kind", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(TableError, match=rf"device 'x': driver 'bad' \({name}:Kind\).*{what}") as caught:
        build("x", "bad", {}, [{"name": "a"}])
    assert caught.value.path == "driver"


def test_a_strangers_driver_that_cannot_be_made_is_an_error_of_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = EntryPoint("bad", f"{__name__}:_BuiltBadly", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    monkeypatch.setattr(EntryPoint, "load", lambda self: _BuiltBadly)
    with pytest.raises(TableError, match="device 'x': driver 'bad' cannot be made: KeyError: 'unit'"):
        build("x", "bad", {}, [{"name": "a"}])


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [EntryPoint("mine", "a:A", registry.GROUP), EntryPoint("mine", "b:B", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: twice)
    with pytest.raises(ConfigError, match="two installed packages provide a driver 'mine'"):
        driver_types()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda file: file.stem)
def test_a_sample_loads_as_it_is(sample: Path) -> None:
    tables = tomllib.loads(sample.read_text())["device"]
    for table in tables:
        convert(table, Device)  # the keys that all devices have
        driver = build(table["name"], table["driver"], table.get("options", {}), table.get("point", []))
        assert table["driver"] == sample.stem
        assert driver.points


@pytest.mark.parametrize("name", ["modbus", "simulator"])
def test_a_sample_shows_each_option_and_its_default(name: str) -> None:
    """Each `# key = value` is a key of the driver with this default (where it is not a mere example)."""
    text = (ROOT / "drivers" / f"{name}.toml").read_text()
    kind = load(name)
    begin, end = text.index("[device.options]"), text.index("[[device.point]]")
    for part, struct_type, examples in (
        (
            text[begin:end],
            kind.options_type,
            {"serial", "framing", "forbidden", "data_bits", "timeout_ms", "latest_reply_ms"},
        ),
        (text[end:], kind.point_type, {"order", "type"} if name == "simulator" else {"order"}),
    ):
        shown = {}
        for line in part.splitlines():
            words = line.removeprefix("# ")
            if line.startswith("# ") and " = " in words:
                key, value = words.split(" = ", 1)
                shown[key] = tomllib.loads(f"x = {value}")["x"]
        fields = {field.name: field for field in msgspec.structs.fields(struct_type)}
        for key, value in shown.items():
            assert key in fields, f"{name}.toml shows {key}, which is no key"
            if key not in examples and fields[key].default is not None:  # unset by default: an example
                assert fields[key].default == value, f"{name}.toml shows {key} = {value}"
        if part.startswith("[device.options]"):
            assert set(fields) <= {*shown, *tomllib.loads(part)["device"]["options"]}, (
                "an option is not in the sample"
            )
