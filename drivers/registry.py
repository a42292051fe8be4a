"""Drivers by name, and devices from their tables.

A driver is a class behind an entry point of the group `headgate.drivers`; ours register exactly as a stranger's do.
Rules: looking up imports nothing, loading imports only the driver asked for, and a table that cannot work is refused
with the device, the point, the key, what was found and the nearest valid word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias, TypeVar

import msgspec

from config.load import ConfigFileError, convert, nearest
from drivers.contract import ConfigError, Driver, Point, PushDriver

GROUP = "headgate.drivers"

AnyDriver: TypeAlias = Driver[Any, Any] | PushDriver[Any, Any]
"""Pull or push; `isinstance` tells which."""

_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class TableError(ConfigError):
    """A device's table is wrong. `path` is the key path from that table on: `options.unit`, `point[2].register`."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self.path = path


def driver_types() -> dict[str, EntryPoint]:
    """Every installed driver by its name, not imported. Raises `ConfigError` if two packages claim one name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigError(
                f"two installed packages provide a driver {entry.name!r} ({other.value} and {entry.value}): "
                "uninstall one of them"
            )
    return found


def load(name: str) -> type[AnyDriver]:
    """The driver's class. Raises `ConfigError`."""
    known = driver_types()
    if name not in known:
        raise ConfigError(f"unknown driver {name!r}{nearest(name, known)}")
    entry = known[name]
    try:
        loaded = entry.load()
    except (ImportError, AttributeError) as err:
        raise ConfigError(
            f"driver {name!r} ({entry.value}) cannot be loaded: {err}; "
            "install what it needs (ours: pip install 'headgate[agent]')"
        ) from err
    except (Exception, SystemExit) as err:  # a stranger's module may do anything; its device alone suffers
        raise ConfigError(
            f"driver {name!r} ({entry.value}) fails while it is loaded: {type(err).__name__}: {err}; "
            "tell its author, or uninstall it"
        ) from err
    if not (isinstance(loaded, type) and issubclass(loaded, Driver | PushDriver)):
        raise ConfigError(
            f"driver {name!r} ({entry.value}) is not a Driver or PushDriver of drivers.contract"
        )
    for attribute, base in (("options_type", msgspec.Struct), ("point_type", Point)):
        declared = getattr(loaded, attribute, None)
        if not (isinstance(declared, type) and issubclass(declared, base)):
            raise ConfigError(f"driver {name!r} ({entry.value}) does not declare its {attribute}")
    return loaded


def build(
    device: str, driver: str, options: Mapping[str, object], points: Sequence[Mapping[str, object]]
) -> AnyDriver:
    """The device of one `[[device]]` table; no IO. Raises `TableError`."""
    where = f"device {device!r}"
    try:
        kind = load(driver)
    except ConfigError as err:
        raise TableError(f"{where}: {err}", "driver") from err
    checked = _converted(options, kind.options_type, f"{where} options", "options")
    found: list[Point] = []
    seen: dict[str, int] = {}
    for index, table in enumerate(points):
        label = f"{table['name']!r}" if "name" in table else f"number {index + 1}"
        point = _converted(table, kind.point_type, f"{where} point {label}", f"point[{index}]")
        if point.name in seen:
            raise TableError(
                f"{where} point {point.name!r}: this name is taken by point number {seen[point.name] + 1}; "
                "a point's name is its identity and must be its own",
                f"point[{index}].name",
            )
        seen[point.name] = index
        found.append(point)
    try:
        return kind(device, checked, found)
    except TableError:
        raise
    except ConfigError as err:
        # The driver names the place as we do ("point 'flow': …", "options: …"); what is missing is the device.
        text = str(err)
        named = [i for i, point in enumerate(found) if text.startswith(f"point {point.name!r}")]
        between = " " if named or text.startswith("options") else ": "
        option = re.match(r"options(?:\.|: )(\w+)[.:]", text)
        path = f"options.{option[1]}" if option else "options"
        raise TableError(f"{where}{between}{text}", f"point[{named[0]}]" if named else path) from err
    except Exception as err:  # a stranger's code: told at the check, where the other devices go on
        raise TableError(
            f"{where}: driver {driver!r} cannot be made: {type(err).__name__}: {err}; tell its author",
            "driver",
        ) from err


def _converted(table: Mapping[str, object], to: type[_StructT], where: str, path: str) -> _StructT:
    try:
        return convert(table, to)
    except ConfigFileError as err:
        if err.text.startswith("unknown key"):
            what = f"unknown key {err.path!r}{err.text.removeprefix('unknown key')}"
        else:
            what = ": ".join(filter(None, (err.path, err.text)))
        formerly: Mapping[str, str] = getattr(to, "formerly", {})
        now = formerly.get(err.path) or formerly.get(f"{err.path} = {table.get(err.path)}")
        if now:
            what = f"{re.split('; did you mean| .valid:', what)[0]}; it is now {now}"
        raise TableError(f"{where}: {what}", f"{path}.{err.path}".rstrip(".")) from err
