"""TOML to typed structs, with errors a person can act on.

An error names the file, the line where it can be told, the key path, what was found, what is allowed and the nearest
valid word. Nothing is half-loaded: a file gives one whole value or one `ConfigFileError`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MAX_CONFIG_BYTES = 4 * 1024 * 1024  #: a configuration above this is a mistake, not a configuration


class ConfigFileError(ValueError):
    """A configuration that cannot be used. `path` is the key path ("device[2].point[0].register")."""

    def __init__(self, text: str, *, file: str = "", line: int | None = None, path: str = "") -> None:
        where = ":".join(str(part) for part in (file, line) if part)
        super().__init__(": ".join(part for part in (where, path, text) if part))
        self.file = file
        self.line = line
        self.path = path
        self.text = text


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """The table and the text of a TOML file. Raises `ConfigFileError`."""
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigFileError(f"larger than {MAX_CONFIG_BYTES} bytes", file=str(file))
        text = file.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigFileError(f"cannot be read: {err.strerror}", file=str(file)) from err
    except UnicodeDecodeError as err:
        raise ConfigFileError(f"is not UTF-8 text (byte {err.start})", file=str(file)) from err
    return parse_toml(text, file=str(file)), text


def parse_toml(text: str, *, file: str = "") -> dict[str, Any]:
    """Raises `ConfigFileError` with the line of a syntax error."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as err:
        found = re.search(r"at line (\d+)", str(err))
        raise ConfigFileError(
            f"not valid TOML: {err}", file=file, line=int(found.group(1)) if found else None
        ) from err


def convert(table: Mapping[str, Any], to: type[T], *, file: str = "", text: str = "", at: str = "") -> T:
    """A table as a typed struct. `at` is the key path of the table itself. Raises `ConfigFileError`."""
    try:
        return msgspec.convert(table, to, strict=True)
    except msgspec.ValidationError as err:
        message, path = _split(str(err))
        hint = _unknown_key(message, path, to)
        if hint:
            key, message = hint
            path = f"{path}.{key}" if path else key
        full = ".".join(part for part in (at, path) if part)
        raise ConfigFileError(message, file=file, line=line_of(text, full), path=full) from err


def load(file: Path, to: type[T]) -> T:
    """The whole file as `to`. Raises `ConfigFileError`."""
    table, text = read_toml(file)
    return convert(table, to, file=str(file), text=text)


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'? (valid: …)`, or only the valid words."""
    valid = sorted(words)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (valid: {', '.join(valid)})"


def _split(message: str) -> tuple[str, str]:
    """msgspec's "text - at `$.a[0].b`" as text and key path."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    return (found.group(1), found.group(2).lstrip(".")) if found else (message, "")


def _unknown_key(message: str, path: str, to: Any) -> tuple[str, str] | None:
    found = re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL)
    if not found:
        return None
    struct_type = _struct_at(to, path)
    names = [f.encode_name for f in msgspec.structs.fields(struct_type)] if struct_type else []
    return found.group(1), f"unknown key{nearest(found.group(1), names)}"


def _struct_at(to: Any, path: str) -> Any:
    """The struct type that a key path leads to, walking fields, tuples, lists and optionals."""
    info = msgspec.inspect.type_info(to)
    for part in (p for p in re.split(r"\.|\[[^\]]*\]", path) if p and p != "..."):
        info = _inner(info)
        field = next((f for f in getattr(info, "fields", ()) if f.encode_name == part), None)
        if field is None:
            return None
        info = field.type
    info = _inner(info)
    return info.cls if isinstance(info, msgspec.inspect.StructType) else None


def _inner(info: Any) -> Any:
    while True:
        if isinstance(info, msgspec.inspect.UnionType):
            info = next((t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)), info.types[0])
        elif hasattr(info, "item_type") and isinstance(info.item_type, msgspec.inspect.Type):
            info = info.item_type
        else:
            return info


def line_of(text: str, path: str) -> int | None:
    """The line of a key path in a TOML text, best effort: the n-th `[[table]]`, then the key below it."""
    if not text or not path:
        return None
    steps: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        steps.append(name or int(index))
    lines = text.splitlines()
    at = 0
    prefix: list[str] = []
    found: int | None = None
    for position, step in enumerate(steps):
        if isinstance(step, int):
            continue
        index = steps[position + 1] if position + 1 < len(steps) else None
        prefix.append(step)
        header = re.escape(".".join(prefix))
        tables = [i for i in range(at, len(lines)) if re.match(rf"\s*\[\[?\s*{header}\s*\]\]?", lines[i])]
        wanted = index if isinstance(index, int) else 0
        if wanted < len(tables):
            at = tables[wanted]
            found = at + 1
            continue
        for i in range(at, len(lines)):
            if re.match(rf"\s*\"?{re.escape(step)}\"?\s*[=.]", lines[i]) or re.search(
                rf"[{{,]\s*\"?{re.escape(step)}\"?\s*=", lines[i]
            ):
                return i + 1
    return found
