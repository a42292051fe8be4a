"""The agent's configuration: the samples teach what the schema says, and whatever is bad is named by its place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.agent import Agent, Buffer, Device, Fallback, Gateway, Metered, Uplink
from config.load import ConfigFileError, convert, load, parse_toml
from drivers.contract import Point

SAMPLES = Path(__file__).parents[1] / "config" / "samples"
TABLES: dict[str, type[msgspec.Struct]] = {
    "gateway": Gateway,
    "buffer": Buffer,
    "uplink": Uplink,
    "uplink.fallback": Fallback,
    "uplink.metered": Metered,
    "device": Device,
    "device.point": Point,
}
#: Keys whose default is "unset": the sample shows a value to give, and says in words what happens without.
UNSET = {
    "uplink": {"ca_file", "token_file", "token_env"},
    "uplink.fallback": {"ca_file", "token_file", "token_env"},
    "device": {"profile", "only", "phase_ms", "timeout_ms", "measurement", "tags"},
    "device.point": {"one_of", "priority"},
}
GOOD = """
[gateway]
tenant = "acme"
name = "plant-1"

[uplink]
kind = "none"

[[device]]
name = "boiler"
driver = "simulator"
tags = { line = "2" }

[[device.point]]
name = "t"
"""


def shown_keys(text: str) -> Iterator[tuple[str, str, str, bool]]:
    """(table, key, value as written, whether it is commented out) of every key that a sample shows."""
    table = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"\[\[?([a-z_.]+)\]\]?", line):
            table = found.group(1)
        elif found := re.fullmatch(r"(# )?([a-z_]+) = (.+)", line):
            yield table, found.group(2), found.group(3), bool(found.group(1))


def default_of(table: str, key: str) -> Any:
    field = next(f for f in msgspec.structs.fields(TABLES[table]) if f.encode_name == key)
    return list(field.default) if isinstance(field.default, tuple) else field.default


@pytest.mark.parametrize("name", ["agent.toml", "first-device.toml"])
def test_a_shipped_sample_loads(name: str) -> None:
    assert load(SAMPLES / name, Agent).device


def test_every_commented_key_of_the_sample_shows_its_true_default() -> None:
    checked = 0
    for table, key, written, commented in shown_keys((SAMPLES / "agent.toml").read_text()):
        if not commented or table not in TABLES:
            continue
        if key in UNSET.get(table, set()):
            assert default_of(table, key) in (None, {}, msgspec.NODEFAULT), key
            continue
        assert tomllib.loads(f"x = {written}")["x"] == default_of(table, key), f"{table}.{key}"
        checked += 1
    assert checked > 20


def test_the_sample_shows_every_key_there_is() -> None:
    shown = {(table, key) for table, key, _, _ in shown_keys((SAMPLES / "agent.toml").read_text())}
    for table, struct in TABLES.items():
        for field in msgspec.structs.fields(struct):
            if f"{table}.{field.encode_name}" in (*TABLES, "device.options"):
                continue
            assert (table, field.encode_name) in shown, f"{table}.{field.encode_name} is not in the sample"


def test_the_sample_with_every_default_uncommented_loads_too() -> None:
    text = re.sub(r"^# ([a-z_]+ = )", r"\1", (SAMPLES / "agent.toml").read_text(), flags=re.MULTILINE)
    assert convert(parse_toml(text), Agent).device[0].tags == {"line": "2"}


# --- bad ones ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('name = "plant-1"', 'name = "plant/1"'), ["a.toml:4", "gateway.name", "'plant/1'"]),
        (('kind = "none"', 'kind = "mqt"'), ["a.toml:7", "uplink.kind", "'mqt'", "did you mean 'mqtt'", "https"]),
        (("[uplink]", "[uplnk]"), ["a.toml:6", "uplnk", "did you mean 'uplink'"]),
        (('name = "plant-1"\n', ""), ["a.toml:2", "gateway.name", "missing"]),
        (('driver = "simulator"', 'driver = "simulator"\nperiod_ms = 5'), ["period_ms", "5 is too short", "20"]),
        (('driver = "simulator"', 'driver = "simulator"\nperiod_ms = "1s"'), ["device[0].period_ms", "whole number"]),
        (('driver = "simulator"', 'driver = "simulator"\nphase_ms = 1000'), ["phase_ms", "0 to 999"]),
        (('line = "2"', "line = 2"), ["device[0].tags.line", "a string", "found 2"]),
        (('kind = "none"', 'kind = "none"\nport = 70000'), ["a.toml:8", "uplink.port", "<= 65535", "70000"]),
        (('kind = "none"', 'kind = "none"\nbackoff_min_s = 90'), ["uplink.backoff_min_s", "more than backoff_max_s"]),
        (('kind = "none"', 'kind = "none"\nkeepalive_s = nan'), ["uplink.keepalive_s"]),
        (('kind = "none"', 'kind = "none"\nkeepalive_s = inf'), ["uplink.keepalive_s", "inf"]),
        (("[[device]]", "[device]"), ["device", "a list"]),
        (('tenant = "acme"', "tenant = "), ["a.toml:3", "not valid TOML"]),
        (('tenant = "acme"', 'tenant = "acme"\ntenant = "b"'), ["a.toml:4", "not valid TOML"]),
    ],
)  # fmt: skip
def test_a_bad_key_is_named_with_its_place_and_what_is_allowed(
    tmp_path: Path, change: tuple[str, str], told: list[str]
) -> None:
    file = tmp_path / "a.toml"
    assert change[0] in GOOD
    file.write_text(GOOD.replace(*change, 1))
    with pytest.raises(ConfigFileError) as caught:
        load(file, Agent)
    for part in told:
        assert part in str(caught.value), str(caught.value)


# Something that is wrong wherever it stands: a type that no key has, or a number that no key allows.
_WRONG = st.one_of(
    st.integers(min_value=2**62),
    st.integers(max_value=-1),
    st.just(float("nan")),
    st.just(float("inf")),
    st.just([[]]),
    st.just({"a": {"b": 1}}),
    st.just(""),
    st.just("\n"),
)
_KEYS = [
    (table, field.encode_name)
    for table, struct in TABLES.items()
    if table != "device.point"
    for field in msgspec.structs.fields(struct)
    if (table, field.encode_name) not in {("device", "options"), ("device", "point"), ("device", "tags")}
]


def _good() -> dict[str, Any]:
    return {
        "gateway": {"tenant": "a", "name": "b"},
        "buffer": {},
        "uplink": {"fallback": {}, "metered": {}},
        "device": [{"name": "d", "driver": "e"}],
    }


def _table(whole: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = whole
    for part in name.split("."):
        found = found["device"][0] if part == "device" else found[part]
    return found


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(where=st.sampled_from(_KEYS), wrong=_WRONG)
def test_any_wrong_value_of_any_key_names_that_key(where: tuple[str, str], wrong: Any) -> None:
    whole = _good()
    table, key = where
    _table(whole, table)[key] = wrong
    with pytest.raises(ConfigFileError) as caught:
        convert(whole, Agent, file="a.toml")
    at = f"device[0].{key}" if table == "device" else f"{table}.{key}"
    assert caught.value.path.startswith(at), str(caught.value)
    assert str(caught.value).startswith(f"a.toml: {at}")


@settings(max_examples=300, deadline=None)
@given(
    where=st.sampled_from(["gateway", "buffer", "uplink", "device"]),
    key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
)
def test_any_unknown_key_is_refused_and_the_valid_ones_are_told(where: str, key: str) -> None:
    names = [f.encode_name for f in msgspec.structs.fields(TABLES[where])]
    if key in names:
        return
    whole = _good()
    _table(whole, where)[key] = 1
    with pytest.raises(ConfigFileError) as caught:
        convert(whole, Agent)
    assert caught.value.path.endswith(key)
    assert "unknown key" in str(caught.value)
    assert all(name in str(caught.value) for name in names)
