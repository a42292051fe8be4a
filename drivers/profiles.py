"""Device models, described once: a profile is one TOML file with the options and points of a model.

Rules: a profile names its source; what a device's own table says wins over its profile, key by key (a point of the
same name is merged, a new one is added); a profile may extend another in the same way. No IO but reading the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

Table: TypeAlias = dict[str, Any]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One device model."""

    name: str  #: of its file, without .toml
    model: str
    maker: str
    kind: str  #: "energy meter", "inverter", …
    source: str  #: the document that the register map comes from: title, revision, address
    driver: str
    options: Table
    points: tuple[Table, ...]


def folders() -> tuple[Path, ...]:
    """Where profiles are looked for, the operator's own before ours."""
    raise NotImplementedError


def names() -> list[str]:
    """Every profile there is."""
    raise NotImplementedError


def load(name: str) -> Profile:
    """The profile with what it extends merged in. Raises `ConfigError` (file, key, nearest name)."""
    raise NotImplementedError


def merge(
    profile: Profile,
    options: Mapping[str, object],
    points: Sequence[Mapping[str, object]],
    only: Sequence[str] | None = None,
) -> tuple[Table, list[Table]]:
    """The options and points of a device that follows a profile. Raises `ConfigError`."""
    raise NotImplementedError
