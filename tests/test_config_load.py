"""The loader: one whole value or one error with its place, whatever the file holds."""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config.agent import Agent
from config.cloud import Cloud
from config.load import (
    MAX_CONFIG_BYTES,
    ConfigFileError,
    convert,
    line_of,
    load,
    nearest,
    parse_toml,
    read_toml,
)


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0
    colour: Colour | None = None
    token: str | int = ""
    labels: dict[str, str] = {}


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["one", "two"] = "one"
    inner: list[Inner] = []
    pair: tuple[int, str] | None = None


def error_of(text: str, to: type[msgspec.Struct]) -> ConfigFileError | None:
    try:
        convert(parse_toml(text, file="f.toml"), to, file="f.toml", text=text)
    except ConfigFileError as err:
        return err
    return None


def refused(table: dict[str, object], text: str = "") -> ConfigFileError:
    with pytest.raises(ConfigFileError) as caught:
        convert(table, Outer, file="x.toml", text=text)
    return caught.value


def test_an_error_names_the_path_and_what_was_found() -> None:
    error = refused({"inner": [{}, {"count": 11}]})
    assert error.path == "inner[1].count"
    assert str(error) == "x.toml: inner[1].count: Expected a whole number <= 10, found 11"


@pytest.mark.parametrize(
    ("table", "path"), [({"kind": "tow"}, "kind"), ({"inner": [{"colour": "bleu"}]}, "inner[0].colour")]
)
def test_a_wrong_word_gets_the_nearest_and_all_valid_ones(table: dict[str, object], path: str) -> None:
    error = refused(table)
    assert error.path == path
    assert "did you mean" in error.text
    assert "(valid: " in error.text


def test_a_value_in_a_free_table_is_named_by_its_key() -> None:
    assert refused({"inner": [{"labels": {"a": "x", "b": 5}}]}).path == "inner[0].labels.b"


def test_a_tuple_is_followed_by_position() -> None:
    assert refused({"pair": [1, 2]}).path == "pair[1]"


def test_what_may_be_a_secret_is_not_repeated() -> None:
    assert "hunter2" not in str(refused({"inner": [{"token": ["hunter2"]}]}))
    assert "hunter2" not in str(refused({"inner": [{"count": "hunter2"}]}))


def test_a_table_of_a_driver_is_named_from_where_it_stands() -> None:
    with pytest.raises(ConfigFileError) as caught:
        convert({"count": -1}, Inner, file="x.toml", at="device[3].options")
    assert caught.value.path == "device[3].options.count"


def test_the_line_of_a_key_is_told() -> None:
    text = (
        "[gateway]\n\n[[device]]\nname = 1\n[[device]]\nname = 2\n[device.options]\nport = 3\n"
        "[[device.point]]\na=1\n[[device.point]]\na = 2\n"
    )
    assert line_of(text, "device[0].name") == 4
    assert line_of(text, "device[1].name") == 6
    assert line_of(text, "device[1].options.port") == 8
    assert line_of(text, "device[1].point[1].a") == 12
    assert line_of(text, "") is None
    assert line_of("", "a") is None
    assert line_of(text, "nowhere") is None


def test_the_line_of_a_key_in_an_inline_table_is_told() -> None:
    assert line_of('[a]\nx = 1\ntags = { line = 2, b = "c" }\n', "a.tags.b") == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"a = 1\nb = ", "b.toml:2"),
        (b"x = " + b"[" * 20_000, "not valid TOML"),
        (b"x = " + b"9" * 10_000, "not valid TOML"),
        (b"x" * (MAX_CONFIG_BYTES + 1), "larger than"),
        (b"a = 2020-13-45", "not valid TOML"),
    ],
    ids=["not-text", "cut-off", "deep", "long-number", "huge", "no-date"],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(
    tmp_path: Path, content: bytes, told: str
) -> None:
    file = tmp_path / "b.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigFileError) as caught:
        load(file, Agent)
    assert "b.toml" in str(caught.value)
    assert told in str(caught.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigFileError, match="cannot be read"):
            read_toml(path)


def test_where_no_word_is_valid_none_is_listed() -> None:
    assert nearest("meter", []) == "; there is none at all"


def test_no_nearest_word_is_invented() -> None:
    assert nearest("zzzz", ["mqtt", "https"]) == " (valid: https, mqtt)"


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=300), st.text(alphabet="[]{}=\"'.,#\n ab10-:TZ_", max_size=120)))
@example("a = 1979-05-27T07:32:00Z")
@example("gateway = 3")
@example('"" = 1')
@example('["]"]\na=1')
@example("device = [1]")
@example("[gateway]\ntenant = 1979-05-27")
def test_any_text_loads_or_gives_one_error_with_a_place(text: str) -> None:
    for to in (Agent, Cloud):
        error = error_of(text, to)
        if error is not None:
            assert str(error).startswith("f.toml")
            assert error.text
            assert error.line is not None or error.path or "TOML" in error.text


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    ["gateway", "uplink", "device", "name", "tags", "point", "kind", "a]b", "..."]
                ),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
def test_any_table_loads_or_gives_one_error(value: object) -> None:
    table = {"gateway": value, "device": value, "uplink": value}
    with contextlib.suppress(ConfigFileError):
        convert(table, Agent, file="f.toml")
