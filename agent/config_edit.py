"""A device written into a configuration that a person wrote.

Rules:

1. Only lines are added: every line that was there stays, with its comments, in its order. What would change one is
   refused; an empty `device = []` alone gives way. A comment above the table that follows stays above it.
2. What is written has been judged first, whole, as `headgate config check` does; a file with errors is not written.
3. The file is the old one or the new one, whatever happens in between (written aside, synced, renamed); it keeps its
   mode and its owner. If somebody else changed it meanwhile, his change stands and ours is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array

from agent.configuration import check
from agent.state import sync_folder
from config.load import MAX_CONFIG_BYTES, ConfigFileError, parse_toml

Table: TypeAlias = Mapping[str, Any]

_FIRST: Final = ("name", "driver", "profile", "only", "period_ms", "timeout_ms", "measurement", "tags")


class EditError(Exception):
    """The configuration was not changed; the text says why and what to do."""


def read(path: Path) -> str:
    """The file as it stands, line endings and all. Raises `EditError`."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise EditError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise EditError(
            f"{path}: there is no such file; name yours with --config, or begin one (config/samples/first-device.toml "
            "shows how)"
        ) from None
    except OSError as err:
        raise EditError(f"{path}: {err.strerror}; run this as the user who owns it") from err
    except UnicodeDecodeError as err:
        raise EditError(f"{path}: is not UTF-8 text (byte {err.start})") from err
    try:
        parse_toml(text, file=str(path))
    except ConfigFileError as err:
        raise EditError(str(err)) from err
    return text


def names(text: str) -> list[str]:
    """The devices that the text has already."""
    devices = parse_toml(text).get("device", [])
    return [str(device.get("name")) for device in devices if isinstance(device, dict)]


def with_device(text: str, device: Table) -> str:
    """The text with one device more, after the last. Raises `EditError`."""
    old = parse_toml(text)
    wanted = {**old, "device": [*old.get("device", []), dict(device)]}
    if old.get("device") == []:
        text = _EMPTY_LIST.sub(lambda line: line["comment"] or "", text, count=1)
    for write in (_after_the_last, _by_tomlkit, _at_the_end):
        try:
            new = write(text, device)
            new.encode()  # a name typed in bytes that are no text has no place in a file
            fits = parse_toml(new) == wanted and _only_adds(text, new)
        except (TOMLKitError, ConfigFileError, ValueError, TypeError):
            continue
        if fits:
            return new
    raise EditError(
        "the devices of this file are written in a way that cannot be added to without changing it (a list in one "
        "line?); write them as [[device]] tables, or add this one by hand:\n\n" + rendered(device)
    )


def rendered(device: Table) -> str:
    """The device as TOML, for a file or a person."""
    document = tomlkit.document()
    devices = tomlkit.aot()
    devices.append(_table(device))
    document.add("device", devices)
    return tomlkit.dumps(document).strip() + "\n"


def difference(old: str, new: str, name: str) -> str:
    """What changes, as a unified diff."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), fromfile=name, tofile=f"{name} (new)", lineterm=""
    )
    return "\n".join(lines)


def save(path: Path, old: str, new: str) -> None:
    """Put the new text in the place of the old. Raises `EditError`; the file is then as it was."""
    real = Path(os.path.realpath(path))  # of a link, what it leads to is replaced, not the link
    aside = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    try:
        before = real.stat()
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            data = memoryview(new.encode())
            while data:
                data = data[os.write(descriptor, data) :]
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o7777)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        errors = problems(aside, shown_as=path)
        if errors:
            raise EditError(
                "the configuration would not be valid, so it was left as it is:\n  " + "\n  ".join(errors)
            )
        if real.read_bytes() != old.encode():
            raise EditError(f"{path}: somebody else has just changed it; look at it and try again")
        aside.rename(real)
        sync_folder(real.parent)
    except OSError as err:
        raise EditError(
            f"{path}: {err.strerror}; run this as the user who owns it; nothing was changed"
        ) from err
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def problems(file: Path, *, shown_as: Path) -> list[str]:
    """What `headgate config check` finds wrong with it."""
    return [str(error).replace(str(file), str(shown_as)) for error in check(file).errors]


# ------------------------------------------------------------------------------------------ writing


_EMPTY_LIST: Final = re.compile(
    r"^[ \t]*device[ \t]*=[ \t]*\[\s*\][ \t]*(?:(?P<comment>#[^\n]*(?:\n|\Z))|\r?\n|\Z)", re.MULTILINE
)
_HEADER: Final = re.compile(r"\s*\[\[?\s*[\"']?(?P<first>[^\s.\"'\]]+)")


def _after_the_last(text: str, device: Table) -> str:
    """Between the last device and the table that follows it, above what is said about that table."""
    lines = text.splitlines(keepends=True)
    headers = [(i, found["first"]) for i, line in enumerate(lines) if (found := _HEADER.match(line))]
    devices = [i for i, first in headers if first == "device"]
    following = next((i for i, _ in headers if devices and i > devices[-1]), None)
    if following is None:
        return _at_the_end(text, device)
    at = following
    while lines[at - 1].lstrip().startswith("#"):
        at -= 1
    if lines[at - 1].strip():
        at = following  # a comment that goes on from the device's own lines is the device's
    return _at_the_end("".join(lines[:at]), device) + _ends(text) + "".join(lines[at:])


def _by_tomlkit(text: str, device: Table) -> str:
    document = tomlkit.parse(text)
    if "device" not in document:
        return _at_the_end(text, device)
    devices = document["device"]
    if isinstance(devices, Array):
        row = tomlkit.inline_table()
        row.update(_ordered(device))
        devices.append(row)
        return tomlkit.dumps(document)
    if not isinstance(devices, AoT):
        raise ValueError("not an array of tables")
    last = devices[-1]
    new = _table(device)
    # An empty line between devices: tomlkit keeps it as the last thing of the one before.
    if not last.as_string().endswith("\n\n"):
        last.add(tomlkit.nl())
    devices.append(new)
    told = tomlkit.dumps(document)
    return told.replace("\r\n", "\n").replace("\n", "\r\n") if _ends(text) == "\r\n" else told


def _at_the_end(text: str, device: Table) -> str:
    end = _ends(text)
    head = text if not text or text.endswith("\n") else text + end
    gap = end if head.strip() and not head.endswith(end * 2) else ""
    return head + gap + rendered(device).replace("\n", end)


def _ends(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _table(device: Table) -> tomlkit.items.Table:
    table = tomlkit.table()
    ordered = _ordered(device)
    options, points = ordered.pop("options", None), ordered.pop("point", None)
    for key, value in ordered.items():
        table.add(key, _inline(value))
    if options:
        inner = tomlkit.table()
        for key, value in options.items():
            inner.add(key, _inline(value))
        table.add("options", inner)
    if points:
        rows = tomlkit.aot()
        for point in points:
            row = tomlkit.table()
            for key, value in point.items():
                row.add(key, _inline(value))
            rows.append(row)
        table.add("point", rows)
    return table


def _ordered(device: Table) -> dict[str, Any]:
    known = {key: device[key] for key in _FIRST if key in device}
    return known | {key: value for key, value in device.items() if key not in known}


def _inline(value: object) -> Any:
    if isinstance(value, Mapping):
        row = tomlkit.inline_table()
        row.update(value)
        return row
    return tomlkit.item(list(value) if isinstance(value, tuple) else value)


def _only_adds(old: str, new: str) -> bool:
    """Every old line is in the new text, in order."""
    lines: Sequence[str] = old.splitlines()
    rest = iter(new.splitlines())
    return all(any(line == candidate for candidate in rest) for line in lines)
