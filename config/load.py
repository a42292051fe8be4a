"""TOML to typed structs, with errors a person can act on.

An error names the file, the line where it can be told, the key path, what was found, what is allowed and the nearest
valid word. Nothing is half-loaded: a file gives one whole value or one `ConfigFileError`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
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
    except (ValueError, RecursionError) as err:  # also a number of more digits than Python reads
        found = re.search(r"at line (\d+)", str(err))
        at_end = text.count("\n") + 1 if "end of document" in str(err) else None
        raise ConfigFileError(
            f"not valid TOML: {err}", file=file, line=int(found.group(1)) if found else at_end
        ) from err


def convert(table: Mapping[str, Any], to: type[T], *, file: str = "", text: str = "", at: str = "") -> T:
    """A table as a typed struct. `at` is the key path of the table itself. Raises `ConfigFileError`."""
    try:
        return msgspec.convert(table, to, strict=True)
    except msgspec.ValidationError as err:
        message, path = _explained(str(err), table, to)
        full = ".".join(part for part in (at, path) if part)
        raise ConfigFileError(message, file=file, line=line_of(text, full), path=full) from err


def load(file: Path, to: type[T]) -> T:
    """The whole file as `to`. Raises `ConfigFileError`."""
    table, text = read_toml(file)
    return convert(table, to, file=str(file), text=text)


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'? (valid: …)`, or only the valid words."""
    valid = sorted(words)
    if not valid:
        return "; there is none at all"
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (valid: {', '.join(valid)})"


_SECRET = re.compile(r"token|password|secret|key|credential", re.IGNORECASE)


def _explained(message: str, table: Any, to: Any) -> tuple[str, str]:
    """msgspec's message as a text for a person and the key path it is about."""
    text, path = _split(message)
    path, info, found = _follow(path, table, to)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        fields = [f.encode_name for f in getattr(info, "fields", ())]
        return f"unknown key{nearest(unknown.group(1), fields)}", _join(path, unknown.group(1))
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text, re.DOTALL):
        return "is required and missing", _join(path, missing.group(1))
    named = re.match(r"(\w+): (.*)", text, re.DOTALL)  # from a struct's own `__post_init__`
    if named and any(f.encode_name == named.group(1) for f in getattr(info, "fields", ())):
        return named.group(2), _join(path, named.group(1))
    text = re.sub(r"`([a-z |]+)`", _plain, text)
    words = _words(info)
    if words and isinstance(found, str):
        return f"{found!r} is not one of the valid words{nearest(found, words)}", path
    # Text in the place of something else may be a secret, as may anything below a key that is named like one.
    if _SECRET.search(path) or (isinstance(found, str) and "got a string" in text):
        return text, path
    return f"{text}, found {_shown(found)}", path


_WORDS = {
    "str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false", "object": "a table",
    "array": "a list", "null": "",
}  # fmt: skip


def _plain(types: re.Match[str]) -> str:
    """msgspec's `int | null` in words."""
    words = [_WORDS.get(word, word) for word in types.group(1).split(" | ")]
    return " or ".join(dict.fromkeys(word for word in words if word))


def _split(message: str) -> tuple[str, str]:
    """msgspec's "text - at `$.a[0].b`" as text and key path."""
    found = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", message, re.DOTALL)
    return (found.group(1), found.group(2).lstrip(".")) if found else (message, "")


def _join(path: str, key: str) -> str:
    key = key or '""'
    return f"{path}.{key}" if path else key


def _shown(found: Any) -> str:
    """What was found, short enough for a line."""
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(info: Any) -> list[str]:
    """The words that a type allows, where it allows only words."""
    if isinstance(info, msgspec.inspect.UnionType):
        return next((words for member in info.types if (words := _words(member))), [])
    if isinstance(info, msgspec.inspect.LiteralType):
        return [value for value in info.values if isinstance(value, str)]
    if isinstance(info, msgspec.inspect.EnumType):
        return [member.value for member in info.cls if isinstance(member.value, str)]
    return []


def _follow(path: str, table: Any, to: Any) -> tuple[str, Any, Any]:
    """The path with each `[...]` resolved to the key it stands for, the type it leads to, and what is there."""
    info: Any = msgspec.inspect.type_info(to)
    here: Any = table
    told = ""
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        info = _inner_struct(info)
        if name:
            field = next((f for f in getattr(info, "fields", ()) if f.encode_name == name), None)
            info = field.type if field is not None else None
            here = here.get(name) if isinstance(here, Mapping) else None
            told = _join(told, name)
        elif index == "...":  # some value of a table with free keys: find which
            info = getattr(info, "value_type", None)
            key = _misfit(here, info)
            here = here.get(key) if isinstance(here, Mapping) else None
            told = _join(told, str(key))
        else:
            kinds = getattr(info, "item_types", None)
            info = kinds[int(index)] if kinds else getattr(info, "item_type", None)
            here = here[int(index)] if isinstance(here, Sequence) and int(index) < len(here) else None
            told = f"{told}[{index}]"
    words = _words(info)
    return told, info if words else _inner_struct(info), here


def _misfit(found: Any, info: Any) -> str:
    """The first key whose value is not of the type."""
    wants_text = isinstance(info, msgspec.inspect.StrType)
    for key, value in found.items() if isinstance(found, Mapping) else ():
        if not wants_text or not isinstance(value, str):
            return str(key)
    return "..."


def _inner_struct(info: Any) -> Any:
    """Of an optional, the type that is not None."""
    if isinstance(info, msgspec.inspect.UnionType):
        return next((t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)), info.types[0])
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
        for i in range(at, _table_end(lines, at)):
            if re.match(rf"\s*\"?{re.escape(step)}\"?\s*[=.]", lines[i]) or re.search(
                rf"[{{,]\s*\"?{re.escape(step)}\"?\s*=", lines[i]
            ):
                return i + 1
    return found


_HEADER = re.compile(r"\s*\[\[?[^\[\],]+\]\]?\s*(#.*)?")


def _table_end(lines: Sequence[str], at: int) -> int:
    """Where the table that line `at` opens (or is in) ends: at the next table's header."""
    start = at + 1 if _HEADER.fullmatch(lines[at]) else at
    return next((i for i in range(start, len(lines)) if _HEADER.fullmatch(lines[i])), len(lines))
