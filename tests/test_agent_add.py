"""`headgate add`, and the file it edits: tried first, only lines added, valid or untouched whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
import tomllib
from pathlib import Path

import pytest

from agent import config_edit
from agent.commands_add import option_of, point_of
from agent.configuration import check
from agent.technician import Cannot
from tests.fakes.technician import Technician, heard
from tests.fakes.unknown_meter import OnPty, plain

SAMPLES = Path(__file__).resolve().parents[1] / "config" / "samples"
METER = {
    "name": "meter", "driver": "modbus", "period_ms": 1000, "options": {"host": "192.0.2.10", "unit": 7},
    "point": [{"name": "u", "register": 0, "scale": 0.1, "not_available": [32767]}, {"name": "i", "register": 2}],
}  # fmt: skip
POINT = "u,register=0,type=u16,scale=0.1,unit=V"


@pytest.fixture
def technician(tmp_path: Path) -> Technician:
    return Technician(tmp_path)


def line_of(port: OnPty, unit: int = 7) -> tuple[str, ...]:
    return "--port", str(port.link), "--unit", str(unit)


# --- the text ---

TEXTS = {
    "the sample": (SAMPLES / "agent.toml").read_text(),
    "the first device's sample": (SAMPLES / "first-device.toml").read_text(),
    "no device": '[gateway]\ntenant = "a" # one\nname = "b"\n\n# the end\n',
    "no newline at the end": '[gateway]\ntenant = "a"\nname = "b" # last',
    "Windows' line ends": "[gateway]\r\ntenant = 'a'\r\nname = 'b'\r\n# c\r\n[[device]]\r\nname = 'q'\r\n",
    "devices apart": "[[device]]\nname='a'\n[uplink]\nkind='none'\n[[device]]\nname='b' # t\n  # end\n[zeta]\nx=1 # z",
    "comments after the last device": "[[device]]\nname = 'a'\n  [device.options] # o\n  x = 1\n# after\n\n# far\n",
    "nothing": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_only_lines_are_added_and_the_device_is_there(text: str) -> None:
    new = config_edit.with_device(text, METER)
    assert tomllib.loads(new)["device"][-1] == METER
    old_lines, new_lines = text.splitlines(), iter(new.splitlines())
    assert all(line in new_lines for line in old_lines), "an old line is changed, lost or moved"
    before = tomllib.loads(text)
    assert {**tomllib.loads(new), "device": before.get("device", [])} == {"device": [], **before}


def test_line_ends_stay_what_they_are() -> None:
    new = config_edit.with_device(TEXTS["Windows' line ends"], METER)
    assert new.count("\n") == new.count("\r\n")


def test_adding_again_and_again_keeps_all() -> None:
    text = TEXTS["the sample"]
    for i in range(5):
        text = config_edit.with_device(text, {**METER, "name": f"meter {i}"})
    assert config_edit.names(text)[-5:] == [f"meter {i}" for i in range(5)]
    assert "# labels on all its readings" in text.lower()


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("device = []\n", ""),
        (
            "a = 1\ndevice=[ ] # none yet\n\n[uplink]\nkind = 'none'\n",
            "a = 1\n# none yet\n\n[uplink]\nkind = 'none'\n",
        ),
        ("device = [\n]\nb = 2\n", "b = 2\n"),
        ("device = []\r\n[gateway]\r\n", "[gateway]\r\n"),
    ],
)
def test_an_empty_list_of_devices_gives_way_to_the_first(text: str, rest: str) -> None:
    new = config_edit.with_device(text, METER)
    assert new.startswith(rest)
    assert tomllib.loads(new)["device"] == [METER]
    assert {**tomllib.loads(new), "device": []} == {"device": [], **tomllib.loads(rest)}


def test_a_comment_above_the_next_table_stays_there_and_one_of_the_device_with_it() -> None:
    old = "[[device]]\nname = 'a'\n# register = 5\n\n# How it sends.\n# Twice.\n[uplink]\nkind = 'none'\n"
    new = config_edit.with_device(old, METER)
    assert new.startswith("[[device]]\nname = 'a'\n# register = 5\n\n[[device]]\nname = \"meter\"\n")
    assert new.endswith("\n\n# How it sends.\n# Twice.\n[uplink]\nkind = 'none'\n")


HOSTILE = [
    'a"b',
    "a'b",
    "a\nb",
    "a\\b",
    "ü°C",
    "\x00",
    "\x1b[31m",
    '"""',
    "]]\n[[device]]\nname='x'",
    "\u2028",
    "\r\n",
    "#",
    "",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_no_word_writes_anything_but_itself(word: str) -> None:
    device = {
        **METER,
        "name": word,
        "options": {"host": word},
        "point": [{"name": word, "unit": word, "register": 1}],
    }
    text = TEXTS["the sample"]
    assert tomllib.loads(config_edit.with_device(text, device)) == {
        **tomllib.loads(text), "device": [*tomllib.loads(text)["device"], device],
    }  # fmt: skip


async def test_bytes_that_are_no_text_are_refused_and_the_file_untouched(technician: Technician) -> None:
    before = technician.config.read_bytes()
    for words in (("m\udcff", "u"), ("meter", "u\udcff"), ("meter", "u,unit=\udcb0C")):
        ran = await technician.types(
            "add", words[0], "--host", "127.0.0.1:1", "--point", f"{words[1]},register=0"
        )
        assert ran.code == 2, ran
    assert technician.config.read_bytes() == before


def test_a_list_in_one_line_is_refused_with_the_lines_to_add_by_hand() -> None:
    with pytest.raises(config_edit.EditError, match=r"(?s)by hand.*\[\[device\]\]"):
        config_edit.with_device("device = [{ name = 'a' }]\n", METER)


# --- the file ---


def test_mode_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "agent.toml"
    old = '[gateway]\ntenant = "a"\nname = "b"\n[uplink]\nkind = "none"\n'
    real.write_text(old)
    real.chmod(0o640)
    link.symlink_to(real)
    config_edit.save(link, old, old + "# more\n")
    assert link.is_symlink()
    assert real.read_text().endswith("# more\n")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_text_that_would_not_be_valid_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    old = '[gateway]\ntenant = "a"\nname = "b"\n[uplink]\nkind = "none"\n'
    file.write_text(old)
    with pytest.raises(config_edit.EditError, match="left as it is"):
        config_edit.save(file, old, old + "[gatway]\n")
    assert file.read_text() == old
    assert list(tmp_path.iterdir()) == [file]


def test_what_somebody_else_wrote_meanwhile_stands(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    old = '[gateway]\ntenant = "a"\nname = "b"\n[uplink]\nkind = "none"\n'
    file.write_text(old + "# his\n")
    with pytest.raises(config_edit.EditError, match="somebody else"):
        config_edit.save(file, old, old + "# ours\n")
    assert file.read_text() == old + "# his\n"


# --- what is typed ---


def test_a_point_is_typed_as_words_numbers_and_lists() -> None:
    assert point_of("u, register=0x10,scale=0.1,unit=V,not_available=[0x7FFF, 0x8000],writable=true") == {
        "name": "u", "register": 16, "scale": 0.1, "unit": "V", "not_available": [32767, 32768], "writable": True,
    }  # fmt: skip
    assert point_of("name=u,register=1,unit=1") == {"name": "u", "register": 1, "unit": "1"}
    assert option_of("unit=7") == ("unit", 7)
    assert option_of("host=192.0.2.1") == ("host", "192.0.2.1")


@pytest.mark.parametrize("text", ["", "u,register", "register=1", "u,a=1,a=2", "u,v"])
def test_a_point_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Cannot, match=r"--point"):
        point_of(text)


# --- the command ---


async def test_a_device_is_tried_written_and_read(technician: Technician) -> None:
    port = OnPty({7: plain({0: 2305})}, technician.folder / "port")
    before = technician.config.read_text()
    ran = await technician.types("add", "meter", *line_of(port), "--point", POINT)
    port.close()
    assert ran.code == 0, ran
    assert "230.5" in ran.out
    assert technician.config.read_text().startswith(before)
    assert not check(technician.config).errors
    (device,) = tomllib.loads(technician.config.read_text())["device"]
    assert device["options"]["serial"] == str(port.link)
    assert device["point"][0] == {"name": "u", "register": 0, "type": "u16", "scale": 0.1, "unit": "V"}


async def test_a_dry_run_shows_the_lines_and_writes_none(technician: Technician) -> None:
    port = OnPty({7: plain({0: 2305})}, technician.folder / "port")
    before = technician.config.read_bytes()
    ran = await technician.types("add", "meter", *line_of(port), "--point", POINT, "--dry-run", plain=False)
    port.close()
    assert ran.code == 0, ran
    assert '+name = "meter"' in ran.out
    assert technician.config.read_bytes() == before


async def test_a_device_that_does_not_answer_is_not_written_unless_forced(technician: Technician) -> None:
    port = OnPty({8: plain({0: 1})}, technician.folder / "port")
    before = technician.config.read_bytes()
    refused = await technician.types("add", "meter", *line_of(port), "--point", POINT)
    wrong = await technician.types("add", "meter", *line_of(port, 8), "--point", "u,register=9")
    untouched = technician.config.read_bytes()
    forced = await technician.types("add", "meter", *line_of(port), "--point", POINT, "--force")
    port.close()
    assert (refused.code, wrong.code, forced.code) == (1, 1, 0), (refused, wrong, forced)
    assert untouched == before
    assert "warning" in forced.err
    assert not check(technician.config).errors


async def test_a_name_that_is_taken_is_refused_before_anything_is_asked(technician: Technician) -> None:
    port = OnPty({7: plain({0: 2305})}, technician.folder / "port")
    await technician.types("add", "meter", *line_of(port), "--point", POINT)
    asked, before = port.requests, technician.config.read_bytes()
    ran = await technician.types("add", "meter", *line_of(port), "--point", POINT)
    port.close()
    assert ran.code == 2, ran
    assert "'meter' already" in ran.err
    assert port.requests == asked
    assert technician.config.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--profile"),
        (("--host", "127.0.0.1:1"), "--point"),
        (("--host", "127.0.0.1:1", "--point", "u,registr=0"), "register"),
        (("--host", "127.0.0.1:1", "--point", "u,register=70000"), "65535"),
        (("--host", "127.0.0.1:1", "--profile", "no-such-model"), "no-such-model"),
        (("--host", "127.0.0.1:1", "--option", "unit"), "KEY=VALUE"),
        (("--found", "4"), "scan"),
    ],
)
async def test_what_cannot_be_meant_is_refused_with_exit_2_and_the_file_untouched(
    technician: Technician, words: tuple[str, ...], told: str
) -> None:
    before = technician.config.read_bytes()
    ran = await technician.types("add", "meter", *words)
    assert ran.code == 2, ran
    assert told in ran.err
    assert technician.config.read_bytes() == before


async def test_a_file_that_is_bad_already_is_told_and_left_alone(technician: Technician) -> None:
    technician.config.write_text("[gateway]\ntenant = 'a'\nname = 'b'\nnmae = 1\n")
    ran = await technician.types("add", "meter", "--host", "127.0.0.1:1", "--point", POINT)
    assert ran.code == 2, ran
    assert "nmae" in ran.err
    missing = await technician.types(
        "add",
        "meter",
        "--host",
        "127.0.0.1:1",
        "--point",
        POINT,
        "--config",
        str(technician.folder / "none.toml"),
    )
    assert missing.code == 2
    assert "no such file" in missing.err


async def test_a_running_agent_takes_it_up_and_its_first_value_is_shown(technician: Technician) -> None:
    port = OnPty({7: plain({0: 2305, 1: 500}), 8: plain({0: 411})}, technician.folder / "port")
    await technician.types("add", "one", *line_of(port), "--point", POINT)
    agent = await technician.starts("run", "--config", str(technician.config))
    try:
        await heard(agent, "first scan")
        ran = await technician.types(
            "add", "two", *line_of(port, 8), "--point", "i,register=0,scale=0.1", "--json"
        )
    finally:
        agent.terminate()
        await agent.communicate()
        port.close()
    assert ran.code == 0, ran
    assert ran.json["running"]
    assert [one["value"] for one in ran.json["values"]["readings"]] == [41.1]


async def test_killed_at_any_moment_the_file_is_the_old_or_the_new_one(technician: Technician) -> None:
    seed = 11
    rng = random.Random(seed)
    port = OnPty({7: plain({0: 2305})}, technician.folder / "port")
    old = technician.config.read_bytes()
    ended = 0
    for _ in range(12):
        process = await technician.starts(
            "add", "meter", *line_of(port), "--point", POINT, "--config", str(technician.config)
        )
        await asyncio.sleep(rng.uniform(0.2, 1.2))
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        await process.communicate()
        now = technician.config.read_bytes()
        assert now == old or b'name = "meter"' in now, f"seed {seed}"
        assert not check(technician.config).errors, f"seed {seed}"
        ended += now != old
        technician.config.write_bytes(old)
    port.close()
