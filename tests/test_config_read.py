"""No key of a configuration is there for nothing: the program reads each of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import config.agent
import config.cloud

ROOT = Path(__file__).parents[1]
ROOMS = ("agent", "cloud", "drivers", "firmware", "sync")


def keys(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ != module.__name__ or name == "Conflict":  # which tells of a fault
            continue
        if issubclass(kind, msgspec.Struct):
            for key in kind.__struct_fields__:
                yield name, key


@pytest.fixture(scope="module")
def read() -> set[str]:
    """Every name that is taken from something, in every room but the configuration's own."""
    text = "".join(file.read_text() for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return set(re.findall(r"\.([a-z_]+)\b(?! *=[^=])", text)) | set(
        re.findall(r'getattr\(\w+, "(\w+)"', text)
    )


@pytest.mark.parametrize("module", [config.agent, config.cloud], ids=lambda m: m.__name__)
def test_every_key_is_read_by_the_program(module: ModuleType, read: set[str]) -> None:
    known = list(keys(module))
    assert len(known) > 30
    assert [f"{kind}.{key}" for kind, key in known if key not in read] == []


def test_a_key_that_nobody_reads_would_be_found(read: set[str]) -> None:
    assert "skew_alarm_s" in read
    assert "skew_alarm_minutes" not in read
