"""Profiles: where they are looked for, how they extend one another, how a device uses one, and who is to blame."""

from __future__ import annotations

import json
import logging
import os
import re
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.configuration import check
from drivers import profiles, registry
from drivers.contract import ConfigError
from drivers.profiles import Mark

Write = Callable[[str, str], Path]

METER = """
    [profile]
    model = "M1"
    maker = "Acme"
    kind = "energy meter"
    source = "Acme M1 manual, revision 3, page 12"
    driver = "modbus"

    [options]
    baud = 2400
    unit = 7

    [[point]]
    name = "voltage"
    unit = "V"
    register = 0
    type = "f32"
    not_available = [0.0]

    [[point]]
    name = "power"
    unit = "W"
    register = 10
    type = "i32"
"""

CHILD = """
    [profile]
    model = "M2"
    source = "Acme M2 manual"
    extends = "m1"
    remove = ["power"]

    [options]
    baud = 9600

    [[point]]
    name = "voltage"
    scale = 0.1

    [[point]]
    name = "frequency"
    register = 20
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "mine"
    found.mkdir()
    monkeypatch.setenv(profiles.FOLDERS_ENV, str(found))
    profiles._say_hidden.cache_clear()
    return found


@pytest.fixture
def write(folder: Path) -> Write:
    def writing(name: str, text: str) -> Path:
        file = folder / f"{name}.toml"
        file.write_text(textwrap.dedent(text))
        return file

    return writing


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        profiles.load(name)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- finding


def test_profiles_of_all_folders_are_there_and_the_operators_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for each, model in ((one, "first"), (two, "second")):
        each.mkdir()
        (each / "m1.toml").write_text(textwrap.dedent(METER).replace('"M1"', f'"{model}"'))
    (two / "only_here.toml").write_text(textwrap.dedent(METER))
    monkeypatch.setenv(profiles.FOLDERS_ENV, f"{one}:{tmp_path}/none:{two}")
    assert profiles.folders() == (one, tmp_path / "none", two, profiles.OPERATORS, profiles.OURS)
    assert {"m1", "only_here", "eastron-sdm120"} <= set(profiles.names())
    assert profiles.load("m1").model == "first"


def test_an_operators_profile_of_our_name_wins_and_that_is_said_once(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    mine = write("eastron-sdm120", METER)
    with caplog.at_level(logging.WARNING):
        found = profiles.load("eastron-sdm120")
        profiles.load("eastron-sdm120")
    assert (found.model, found.file) == ("M1", str(mine))
    assert found.hides == str(profiles.OURS / "eastron-sdm120.toml")
    assert [record.getMessage() for record in caplog.records] == [
        f"profile {mine} is used instead of {found.hides}, which has the same name"
    ]


def test_an_unknown_name_is_told_with_the_nearest(write: Write) -> None:
    write("m1", METER)
    assert "unknown profile 'eastron-sdm12'; did you mean 'eastron-sdm120'?" in refused("eastron-sdm12")


@pytest.mark.parametrize("name", ["../m1", "/etc/passwd", "", ".hidden", "a/b", "m1\n", "x" * 300])
def test_a_name_never_leads_out_of_the_folders(write: Write, name: str) -> None:
    write("m1", METER)
    assert "unknown profile" in refused(name)


def test_a_changed_file_is_read_anew(write: Write) -> None:
    file = write("m1", METER)
    assert profiles.load("m1").model == "M1"
    write("m1", METER.replace('"M1"', '"M1b"'))
    os.utime(file, ns=(1, 1))
    assert profiles.load("m1").model == "M1b"


# ------------------------------------------------------------------------------------------- extending


def test_a_profile_extends_another_key_by_key_and_points_by_name(write: Write) -> None:
    write("m1", METER)
    write("m2", CHILD)
    found = profiles.load("m2")
    assert (found.model, found.maker, found.kind, found.driver) == ("M2", "Acme", "energy meter", "modbus")
    assert found.source == "Acme M2 manual"
    assert found.extends == ("m1",)
    assert found.options == {"baud": 9600, "unit": 7}
    assert found.points == (
        {"name": "voltage", "unit": "V", "register": 0, "type": "f32", "not_available": [0.0], "scale": 0.1},
        {"name": "frequency", "register": 20},
    )
    profiles.check(found)


def test_an_operators_profile_may_extend_ours_of_the_same_name(write: Write) -> None:
    write(
        "eastron-sdm120",
        """
        [profile]
        model = "SDM120 behind a converter"
        source = "ours"
        extends = "eastron-sdm120"
        remove = ["current"]
        """,
    )
    found = profiles.load("eastron-sdm120")
    assert found.model == "SDM120 behind a converter"
    assert len(found.points) == len(profiles.load_file(profiles.OURS / "eastron-sdm120.toml").points) - 1


def test_a_circle_is_refused_with_its_way(write: Write) -> None:
    for name, extends in (("a", "b"), ("b", "c"), ("c", "a")):
        write(name, f'[profile]\nmodel = "x"\nsource = "y"\nextends = "{extends}"\n')
    said = refused("a")
    assert "goes round in a circle: a -> b -> c -> a" in said
    assert "c.toml:4: profile.extends" in said


def test_a_profile_that_extends_itself_is_refused(write: Write) -> None:
    write("a", '[profile]\nmodel = "x"\nsource = "y"\nextends = "a"\n')
    assert "a profile cannot extend itself" in refused("a")


def test_a_chain_too_long_to_read_is_refused(write: Write) -> None:
    write("p0", METER)
    for i in range(1, 12):
        write(f"p{i}", f'[profile]\nmodel = "x"\nsource = "y"\nextends = "p{i - 1}"\n')
    assert profiles.load("p8").extends[-1] == "p0"
    assert "profiles deep" in refused("p11")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (METER.replace("driver", "diver"), "m.toml:7: profile.diver: unknown key; did you mean 'driver'?"),
        (METER.replace('driver = "modbus"', ""), "profile.driver: is required and missing"),
        (METER.replace('source = "Acme M1 manual, revision 3, page 12"', ""), "profile.source: is required"),
        (METER.replace('name = "power"', 'name = "voltage"'), "m.toml:21: point[1].name: 'voltage' is the name of"),
        (METER.replace('name = "power"', ""), "point[1].name: is required and missing"),
        (METER.replace('name = "power"', "name = 3"), "point[1].name: is no name: 3"),
        (METER + "[points]\n", "m.toml:25: points: unknown key; did you mean 'point'?"),
        (CHILD.replace('["power"]', '["powr"]'), "m1 has no point 'powr'; did you mean 'power'?"),
        (CHILD.replace('"m1"', '"m11"'), "m.toml:5: profile.extends: unknown profile 'm11'; did you mean 'm1'?"),
        ("[profile\n", "m.toml:1: not valid TOML"),
        (METER.replace("[options]", "remove = ['power']\n    [options]"), "and it extends none"),
        (METER + "[[detect.mark]]\nregister = 1\n", "exactly one of equals, one_of and between"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_with_file_line_key_and_remedy(
    write: Write, text: str, said: str
) -> None:
    write("m1", METER)
    write("m", text)
    assert said in refused("m")


# ------------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("register = 10", "register = 65535", "point 'power': register: 65535"),
        ("register = 10", "register = 70000", "register"),
        ("register = 10", "register = 1", "voltage"),  # the float takes 0 and 1
        ("unit = 7", "unit = 7\n    max_registers = 1", "max_registers"),
        ('type = "i32"', 'type = "i33"', "'i33' is not one of the valid words"),
        ('type = "i32"', 'typ = "i32"', "unknown key 'typ'; did you mean 'type'?"),
    ],
)
def test_a_point_that_cannot_work_is_blamed_on_its_line_of_the_profile(
    write: Write, old: str, new: str, said: str
) -> None:
    file = write("m1", METER.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        profiles.check(profiles.load("m1"))
    assert said in str(caught.value)
    assert re.match(rf"{file}:\d+: ", str(caught.value))


def test_an_option_is_blamed_on_the_file_of_the_chain_that_sets_it(write: Write, tmp_path: Path) -> None:
    parent = write("m1", METER.replace("unit = 7", "unit = 700"))
    write("m2", CHILD)
    with pytest.raises(ConfigError) as caught:
        profiles.check(profiles.load("m2"))
    assert str(caught.value).startswith(f"{parent}:11: options: unit: ")
    config = tmp_path / "agent.toml"
    config.write_text(
        '[gateway]\ntenant = "t"\nname = "g"\n[uplink]\nkind = "none"\n'
        '[[device]]\nname = "roof"\nprofile = "m2"\noptions = { host = "192.0.2.1" }\n'
    )
    (error,) = check(config).errors
    assert error.path == "device[0].profile"
    assert str(error).endswith(f"in {parent}:11")


def test_a_profile_whose_driver_needs_what_only_the_owner_knows_is_checked_all_the_same(write: Write) -> None:
    text = METER.replace('"modbus"', '"ble"').split("[options]")[0]
    file = write("m1", text + '\n    [[point]]\n    name = "x"\n    strange = 1\n')
    with pytest.raises(ConfigError) as caught:
        profiles.check(profiles.load("m1"))
    assert str(caught.value).startswith(f"{file}:")
    assert "strange" in str(caught.value)


def test_config_check_names_the_profiles_file_and_line_for_a_bad_inherited_point(
    write: Write, tmp_path: Path
) -> None:
    parent = write("m1", METER.replace("register = 0", "register = 65535"))
    write("m2", CHILD.replace("scale = 0.1", ""))
    config = tmp_path / "agent.toml"
    config.write_text(
        '[gateway]\ntenant = "t"\nname = "g"\n[uplink]\nkind = "none"\n'
        '[[device]]\nname = "roof"\nprofile = "m2"\noptions = { host = "192.0.2.1" }\n'
    )
    (error,) = check(config).errors
    assert str(error).startswith(f"{config}:8: device[0].profile: device 'roof' point 'voltage': register")
    # The child spoke of the point last, so it is the first place to look at.
    assert f"{parent.parent / 'm2.toml'}:" in str(error)


def test_config_check_blames_the_devices_own_table_where_that_says_it(write: Write, tmp_path: Path) -> None:
    write("m1", METER)
    config = tmp_path / "agent.toml"
    config.write_text(
        '[gateway]\ntenant = "t"\nname = "g"\n[uplink]\nkind = "none"\n'
        '[[device]]\nname = "roof"\nprofile = "m1"\noptions = { host = "192.0.2.1" }\n'
        '[[device.point]]\nname = "power"\nregister = 65535\n'
    )
    (error,) = check(config).errors
    assert error.line is not None
    assert error.line >= 10
    assert "in " + str(config) not in str(error)
    assert "power" in str(error)


# ------------------------------------------------------------------------------------------- using


def test_a_devices_own_table_wins_and_adds(write: Write) -> None:
    write("m1", METER)
    options, points = profiles.merge(
        profiles.load("m1"),
        {"host": "192.0.2.1", "unit": 3},
        [{"name": "power", "scale": 10.0}, {"name": "extra", "register": 99}],
    )
    assert options == {"baud": 2400, "unit": 3, "host": "192.0.2.1"}
    assert [point["name"] for point in points] == ["voltage", "power", "extra"]
    assert points[1] == {"name": "power", "unit": "W", "register": 10, "type": "i32", "scale": 10.0}


def test_only_chooses_from_the_profiles_points(write: Write) -> None:
    write("m1", METER)
    profile = profiles.load("m1")
    _, points = profiles.merge(profile, {}, [{"name": "extra", "register": 1}], only=["power"])
    assert [point["name"] for point in points] == ["power", "extra"]
    _, points = profiles.merge(profile, {}, [{"name": "voltage", "scale": 2.0}], only=[])
    assert [point["name"] for point in points] == ["voltage"]
    with pytest.raises(ConfigError, match="profile m1 has no point 'powr'; did you mean 'power'"):
        profiles.merge(profile, {}, [], only=["powr"])


def test_merging_changes_neither_the_profile_nor_the_device(write: Write) -> None:
    write("m1", METER)
    before = profiles.load("m1")
    options, points = profiles.merge(before, {}, [])
    options["baud"] = 1
    points[0]["name"] = "changed"
    assert profiles.load("m1") == before
    assert before.points[0]["name"] == "voltage"


# ------------------------------------------------------------------------------------------- recognising


def test_a_device_is_recognised_by_what_it_says_of_itself() -> None:
    (found,) = profiles.by_identification({0: "Schneider Electric", 1: "iEM3155 v1"})
    assert (found.profile, found.likelihood) == ("schneider-iem3155", 0.95)
    assert profiles.by_identification({0: "Nobody", 1: "iEM3155"}) == []
    assert [likely.profile for likely in profiles.by_sunspec("FRONIUS ", "Symo")] == ["fronius-symo"]
    assert profiles.by_sunspec("", "") == []


def test_a_mark_fits_by_value_words_or_range_and_never_without_a_value() -> None:
    assert Mark(register=1, equals=60).fits(60)
    assert not Mark(register=1, equals=60).fits(None)
    assert Mark(register=1, one_of=(1, 2)).fits(2)
    assert Mark(register=1, between=(45.0, 65.0)).fits(50.0)
    assert not Mark(register=1, between=(45.0, 65.0)).fits(0.0)
    assert not Mark(register=1, between=(45.0, 65.0)).fits(float("nan"))
    assert Mark(register=1, type="str", length=30, equals="SUN2000*").fits("SUN2000-6KTL")
    assert not Mark(register=1, type="str", length=30, equals="SUN2000*").fits("Symo")
    assert {profile.name for profile in profiles.marked()} >= {"eastron-sdm120", "huawei-sun2000"}


# ------------------------------------------------------------------------------------------- the command


def test_the_command_lists_every_profile_in_eighty_columns(folder: Path) -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["profiles"])
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert len(lines) == 1 + len(profiles.names())
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_the_command_shows_one_with_source_and_points(folder: Path) -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["profiles", "omron-e5cc"])
    assert said.exit_code == 0, said.output
    assert "H175" in said.output
    assert "process_value" in said.output
    assert "Of a broken sensor" in said.output, "what its file says of the map, a technician has to know"
    assert max(map(len, said.output.splitlines())) <= 80
    whole = json.loads(CliRunner().invoke(main, ["profiles", "omron-e5cc", "--json"]).output)
    assert whole["points"][0] == {
        "name": "process_value", "unit": "Cel", "register": 0x2000, "encoding": "i16", "decimals_register": 0x2410,
        "valid_min": -1999.0, "valid_max": 9999.0,
    }  # fmt: skip
    assert whole["notes"].startswith("Seen: the vendor's communications manual H175")


BAD_RULES = [
    ("valid_max = nan", "valid_max is nan", 14),
    ("scale = 0.0", "scale is 0", 14),
    ("one_of = [nan]", "one_of has a number", 14),
    ("valid_min = 5.0\nvalid_max = 1.0", "no u16 value is between valid_min", 14),
]


@pytest.mark.parametrize(("rule", "text", "line"), BAD_RULES)
def test_a_rule_that_no_value_can_pass_is_told_at_its_line_wherever_it_is_looked_at(
    folder: Path, tmp_path: Path, rule: str, text: str, line: int
) -> None:
    file = folder / "m1.toml"
    file.write_text(
        '[profile]\nmodel = "M"\nmaker = "A"\nkind = "k"\nsource = "s"\ndriver = "modbus"\n\n'
        f'[options]\nbaud = 9600\n\n[[point]]\nname = "v"\nregister = 1\n{rule}\n'
    )
    config = tmp_path / "agent.toml"
    config.write_text(
        '[gateway]\ntenant = "t"\nname = "g"\n[uplink]\nkind = "none"\n'
        '[[device]]\nname = "d"\nprofile = "m1"\noptions = { host = "192.0.2.1" }\n'
    )
    run = CliRunner()
    for words in (
        ["profiles", "--check", str(file)],
        ["profiles", "m1"],
        ["profiles"],
        ["config", "check", str(config)],
    ):
        said = run.invoke(main, words)
        assert said.exit_code != 0, said.output
        assert text in said.output
        assert f"{file}:{line}" in said.output, words
        assert "Traceback" not in said.output


@pytest.mark.parametrize(
    ("replaced", "by", "line"),
    [
        ('driver = "modbus"', 'driver = "modbsu"', 6),
        ("baud = 9600", "forbidden = { holding = [[5, 1]] }", 9),
        ("baud = 9600", 'unit = 0\nserial = "/dev/ttyS0"', 9),
        ('name = "v"', "name = 5", 12),
        ("register = 1", "register = 65536", 13),
    ],
)
def test_what_is_wrong_in_a_profile_is_told_with_its_line(
    folder: Path, replaced: str, by: str, line: int
) -> None:
    good = (
        '[profile]\nmodel = "M"\nmaker = "A"\nkind = "k"\nsource = "s"\ndriver = "modbus"\n\n'
        '[options]\nbaud = 9600\n\n[[point]]\nname = "v"\nregister = 1\n'
    )
    file = folder / "m1.toml"
    file.write_text(good.replace(replaced, by))
    said = CliRunner().invoke(main, ["profiles", "--check", str(file)])
    assert said.exit_code == 1
    assert f"{file}:{line}" in said.output


@pytest.mark.parametrize("options", ['framing = "ascii"', 'framing = "rtu"', 'serial = "/dev/ttyS0"'])
def test_a_profile_of_a_device_that_is_always_on_a_serial_line_is_accepted_and_can_be_simulated(
    folder: Path, options: str
) -> None:
    file = folder / "m1.toml"
    file.write_text(
        '[profile]\nmodel = "M"\nmaker = "A"\nkind = "k"\nsource = "s"\ndriver = "modbus"\n\n'
        f'[options]\n{options}\n\n[[point]]\nname = "v"\nregister = 1\n'
    )
    for words in (["profiles", "--check", str(file)], ["simulate", "m1", "--port", "0", "--for", "0"]):
        said = CliRunner().invoke(main, words)
        assert said.exit_code == 0, said.output


def test_the_command_shows_the_notes_of_a_profile_and_of_what_it_extends() -> None:
    said = " ".join(CliRunner().invoke(main, ["profiles", "carlo-gavazzi-em24"]).output.split())
    assert "EM24 E1" in said
    assert "seen by its title page" in said


def test_the_command_tells_an_unknown_name_a_bad_profile_and_one_that_hides_ours(
    write: Write, folder: Path
) -> None:
    assert CliRunner().invoke(main, ["profiles", "nothing"]).exit_code == 2
    bad = write("m1", METER.replace("register = 10", "register = 65535"))
    write("tuf-2000", METER)
    listed = CliRunner().invoke(main, ["profiles"])
    assert listed.exit_code == 1
    assert f"{bad}:" in listed.output
    assert "is used instead of" in listed.output
    told = json.loads(CliRunner().invoke(main, ["profiles", "--json"]).stdout)
    assert len(told["errors"]) == 1
    assert {"name": "tuf-2000", "hides": str(profiles.OURS / "tuf-2000.toml")}.items() <= next(
        one for one in told["profiles"] if one["name"] == "tuf-2000"
    ).items()


def test_the_command_checks_a_file_wherever_it_lies(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "new.toml"
    file.write_text(textwrap.dedent(METER))
    said = CliRunner().invoke(main, ["profiles", "--check", str(file)])
    assert said.exit_code == 0, said.output
    assert "OK: Acme M1, 2 points" in said.output
    assert 'to use it as profile = "new"' in said.output
    file.write_text(textwrap.dedent(METER).replace("register = 10", "register = 65535"))
    said = CliRunner().invoke(main, ["profiles", "--check", str(file)])
    assert said.exit_code == 1
    assert f"{file}:" in said.output
    file.write_text(textwrap.dedent(METER).replace('unit = "W"', "valid_min = 5.0\nvalid_max = 1.0"))
    said = CliRunner().invoke(main, ["profiles", "--check", str(file), "--json"])
    assert said.exit_code == 1
    assert "power" in json.loads(said.stdout)["error"]


# ------------------------------------------------------------------------------------------- the page


def test_the_pages_profile_and_its_child_are_accepted_as_they_stand(write: Write) -> None:
    page = (Path(__file__).parents[1] / "docs" / "profiles.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    described = [block for block in blocks if "[profile]" in block]
    assert len(described) == 2
    write("acme-m1", described[0])
    profiles.check(profiles.load("acme-m1"))
    write("acme-m1", described[0] + '\n[[point]]\nname = "power"\nregister = 9\n')
    write("acme-m2", described[1])
    profiles.check(profiles.load("acme-m2"))
    devices = [block for block in blocks if "[[device]]" in block]
    for block in devices:
        (device,) = tomllib.loads(block)["device"]
        profile = profiles.load(device["profile"])
        options, points = profiles.merge(
            profile, device["options"], device.get("point", []), device.get("only")
        )
        registry.build(device["name"], profile.driver, options, points)


def test_the_page_speaks_of_every_command_and_option_it_names() -> None:
    page = (Path(__file__).parents[1] / "docs" / "profiles.md").read_text()
    for command in ("profiles", "simulate"):
        helped = CliRunner().invoke(main, [command, "--help"]).output
        for option in re.findall(rf"headgate {command} [^\n`]*?(--[a-z-]+)", page):
            assert option in helped
