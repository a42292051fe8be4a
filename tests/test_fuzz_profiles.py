"""Profiles of any content: read, extended, merged and checked without an exception that is not told as an error.

`HEADGATE_FUZZ` sets how many are tried (the nightly run: millions).
"""

from __future__ import annotations

import copy
import os
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from config.load import ConfigFileError
from drivers import profiles
from drivers.contract import ConfigError

INPUTS = int(os.environ.get("HEADGATE_FUZZ", "500"))
OURS = sorted(profiles.OURS.glob("*.toml"))

ODD: list[Any] = [
    0, 1, -1, 65535, 65536, 2**31, 2**63 - 1, -(2**63), 0.0, -0.5, 1e308, float("nan"), float("inf"), True, False,
    "", "x", "voltage", "\u0000", "é" * 200, "f32", "i64", "str", "bool", "CDAB", "holding", "coil", "../../etc/passwd",
    "eastron-sdm120", [], [1], [[]], [0xFFFF, "x"], {}, {"a": {"b": 1}}, "(a+)+$", "*" * 60, "[!]", "9" * 400,
]  # fmt: skip
KEYS = [
    "name", "register", "type", "table", "order", "bit", "bits", "length", "scale", "offset", "unit", "encoding",
    "scale_register", "not_available", "one_of", "valid_min", "valid_max", "extends", "remove", "model", "driver",
    "mark", "equals", "between", "vendor", "options", "point", "profile", "detect", "host", "serial", "max_registers",
    "stranger", "",
]  # fmt: skip


def mutated(chance: random.Random, value: Any, depth: int = 0) -> Any:
    if (depth and chance.random() < 0.04) or depth > 6:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(value, dict):
        made = {
            key: mutated(chance, each, depth + 1) for key, each in value.items() if chance.random() > 0.02
        }
        if chance.random() < 0.1:
            made[chance.choice(KEYS)] = copy.deepcopy(chance.choice(ODD))
        return made
    if isinstance(value, list):
        made_list = [mutated(chance, each, depth + 1) for each in value if chance.random() > 0.02]
        if made_list and chance.random() < 0.05:
            made_list.append(copy.deepcopy(chance.choice(made_list)))
        return made_list
    if isinstance(value, int | float) and not isinstance(value, bool) and chance.random() < 0.1:
        return value + chance.choice([-1, 1, 0.5, 65535])
    return value


def written(value: Any) -> str:
    """TOML, inline below the first level; what TOML cannot say becomes a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return {"nan": "nan", "inf": "inf", "-inf": "-inf"}.get(repr(value), repr(value))
    if isinstance(value, int):
        return str(value) if -(2**63) <= value < 2**63 else '"big"'
    if isinstance(value, str):
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\' else c for c in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return "{" + ", ".join(f"{written(str(key))} = {written(each)}" for key, each in value.items()) + "}"


def tried(folder: Path, name: str) -> None:
    """Everything that is done with a profile; an error is told in one line that names the file."""
    try:
        profile = profiles.load(name)
        _, points = profiles.merge(profile, {"host": "192.0.2.1"}, [{"name": "voltage", "scale": 2.0}])
        assert len(points) >= 1
        profiles.check(profile)
        profiles.by_identification({0: "A" * 40, 1: "B"}, [profile])
        profiles.by_sunspec("Fronius", "Symo", [profile])
        for mark in profile.detect.mark:
            mark.fits(1)
            mark.fits("text")
    except ConfigError as err:
        text = str(err)
        assert text
        assert len(text) < 20_000
        assert str(folder) in text or name in text or str(profiles.OURS) in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(profiles.FOLDERS_ENV, str(tmp_path))
    return tmp_path


def test_a_mutated_profile_is_used_or_refused_and_nothing_else(folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    tables = [tomllib.loads(file.read_text()) for file in OURS]
    for i in range(INPUTS):
        table = mutated(chance, chance.choice(tables))
        text = "\n".join(f"{written(str(key))} = {written(value)}" for key, value in table.items())
        (folder / f"p{i % 5}.toml").write_text(text + "\n", encoding="utf-8")
        tried(folder, f"p{i % 5}")


def test_a_profile_of_mangled_text_is_used_or_refused_and_nothing_else(folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    files = [file.read_bytes() for file in OURS]
    for i in range(INPUTS // 2):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randrange(1, 40)]
                case _:
                    data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
            if not data:
                data = bytearray(b"#")
        (folder / f"q{i % 5}.toml").write_bytes(bytes(data))
        tried(folder, f"q{i % 5}")


def test_any_table_is_parsed_or_refused() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    tables = [tomllib.loads(file.read_text()) for file in OURS]
    refused = 0
    for _ in range(INPUTS * 4):
        try:
            profiles.parse(mutated(chance, chance.choice(tables)), file="x.toml")
        except ConfigFileError:
            refused += 1
    assert 0 < refused < INPUTS * 4
