"""From a document's bytes to the raw values of its points. Pure; nothing here asks anybody for anything.

Rules:
1. A document that is not of its format gives `FRAMING` on every point; a place that is not there gives `MISSING`, and
   what stands there but does not read as the point's type `DECODE`. Never 0, never a neighbour's value.
2. Work is bounded by the document's size, which the caller bounds: patterns run in linear time (`drivers.patterns`), a
   tree that is nested too deep is not of its format.
3. HTML needs lxml and cssselect (the extra `scrape`); they are loaded with the first selector.
"""

from __future__ import annotations

import csv
import email.utils
import io
import json
import zoneinfo
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from drivers.contract import ConfigError, Point, Reason, Value, ValueType
from drivers.fields import BLANK, fit, parse
from drivers.patterns import Pattern, compile_pattern

Result: TypeAlias = Value | Reason
DEEPEST: Final = 200  #: levels of a JSON document; instruments need five
#: `:nth-child` counts the elements before, for each of them: a page with more under one parent could take minutes.
MOST_CHILDREN: Final = 2_000
MOST_ELEMENTS: Final = 50_000


class HttpPoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A point, and where it stands in the document; explained in http_poll.toml."""

    pointer: str | None = None  #: JSON: RFC 6901
    selector: str = ""  #: HTML: CSS
    attribute: str = ""  #: HTML: of the selected element, instead of its text
    nth: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1  #: HTML: of the elements selected
    column: str | int | None = None  #: CSV: a name of the header, or a number counted from 1
    row: Literal["first", "last"] = "last"  #: CSV: of those that match
    where_column: str | int | None = None
    where_equals: str = ""
    pattern: str = ""  #: text; elsewhere within what was found there


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """How documents are written, beside their format."""

    format: Literal["json", "html", "csv", "text"]
    encoding: str = ""
    decimal: Literal[".", ","] = "."
    delimiter: str = ","
    header: bool = True
    skip_lines: int = 0
    comment: str = ""


Locate: TypeAlias = Callable[[Any], Result | None]


class Extractor:
    """The points of one device, compiled. Raises `ConfigError` for what can never be found."""

    def __init__(self, form: Form, points: Sequence[HttpPoint]) -> None:
        self.form = form
        self.points = tuple(points)
        if form.encoding:
            try:
                "".encode(form.encoding)
            except LookupError:
                raise ConfigError(
                    f'options.encoding: {form.encoding!r} is not known; for example "utf-8" or "latin-1"'
                ) from None
        self._patterns: dict[str, Pattern] = {}
        self._pointers: dict[str, tuple[str, ...]] = {}
        self._selectors: dict[str, Callable[[Any], list[Any]]] = {}
        for point in self.points:
            self._compile(point)

    def _compile(self, point: HttpPoint) -> None:
        where = f"point {point.name!r}"
        kind = self.form.format
        given = {
            "pointer": point.pointer is not None,
            "selector": bool(point.selector),
            "attribute": bool(point.attribute),
            "nth": point.nth != 1,
            "column": point.column is not None,
            "where_column": point.where_column is not None,
            "where_equals": bool(point.where_equals),
        }
        own = {
            "json": {"pointer"},
            "html": {"selector", "attribute", "nth"},
            "csv": {"column", "where_column", "where_equals"},
            "text": set[str](),
        }
        for key in (key for key, there in given.items() if there and key not in own[kind]):
            raise ConfigError(f"{where}: {key} does not belong to format = {kind!r}")
        needs = {"json": "pointer", "html": "selector", "csv": "column"}.get(kind)
        if needs is not None and not given[needs]:
            raise ConfigError(f"{where}: says not where it stands; give it {needs}")
        if kind == "text" and not point.pattern:
            raise ConfigError(f"{where}: says not where it stands; give it pattern")
        if point.pattern:
            pattern = compile_pattern(point.pattern, f"{where}: pattern")
            if not pattern.groups:
                raise ConfigError(f"{where}: pattern {point.pattern!r} has no group; put the value in (…)")
            self._patterns[point.name] = pattern
        if point.pointer is not None:
            self._pointers[point.name] = pointer_steps(point.pointer, where)
        if point.selector:
            self._selectors[point.name] = _selector(point.selector, where)
        for key, column in (("column", point.column), ("where_column", point.where_column)):
            if isinstance(column, int) and not 1 <= column <= 10_000:
                raise ConfigError(f"{where}: {key} is {column}; columns are counted from 1")
            if isinstance(column, str) and kind == "csv" and not self.form.header:
                raise ConfigError(f"{where}: {key} {column!r} is a name, and header = false; give its number")
        if bool(point.where_equals) and point.where_column is None:
            raise ConfigError(f"{where}: where_equals needs where_column")

    def extract(self, body: bytes, charset: str = "") -> list[Result]:
        """A result for each point. `charset` is what the server said. Never raises for any bytes."""
        try:
            match self.form.format:
                case "json":
                    return self._from_json(body)
                case "html":
                    return self._from_html(body, charset)
                case "csv":
                    return self._from_csv(self._text(body, charset))
                case "text":
                    text = self._text(body, charset)
                    return [self._read(text, point) for point in self.points]
        except (ValueError, RecursionError, LookupError, csv.Error):  # UnicodeDecodeError is a ValueError
            return [Reason.FRAMING] * len(self.points)

    def _text(self, body: bytes, charset: str) -> str:
        return body.decode(self.form.encoding or charset or "utf-8").removeprefix("\ufeff")

    def _read(self, text: str, point: HttpPoint) -> Result:
        pattern = self._patterns.get(point.name)
        if pattern is not None:
            found = pattern.search(text)
            part = None if found is None else found["value" if "value" in pattern.names else 1]
            if part is None:
                return Reason.MISSING
            text = part
        text = text.strip(BLANK + "\u00a0\u202f")  # a no-break space parts a number from its unit
        if not text:
            return Reason.MISSING
        return parse(text.replace("\u2212", "-"), point.type, decimal=self.form.decimal)

    # --- JSON ---

    def _from_json(self, body: bytes) -> list[Result]:
        text = body.decode("utf-8-sig")  # RFC 8259 8.1
        if _deepest(text) > DEEPEST:
            raise ValueError("nested too deep")
        tree = json.loads(text)
        results: list[Result] = []
        for point in self.points:
            found, value = at(tree, self._pointers[point.name])
            results.append(self._of_json(value, point) if found else Reason.MISSING)
        return results

    def _of_json(self, value: object, point: HttpPoint) -> Result:
        if value is None:
            return Reason.MISSING
        if isinstance(value, str):
            return self._read(value, point) if value or point.type is not ValueType.STR else value
        if isinstance(value, dict | list) or point.name in self._patterns:
            return Reason.DECODE
        if isinstance(value, bool):
            if point.type is ValueType.BOOL:
                return value
            return json.dumps(value) if point.type is ValueType.STR else Reason.DECODE
        if isinstance(value, int | float):
            return json.dumps(value) if point.type is ValueType.STR else fit(value, point.type)
        return Reason.DECODE

    # --- HTML ---

    def _from_html(self, body: bytes, charset: str) -> list[Result]:
        import lxml.etree
        import lxml.html

        parser = lxml.html.HTMLParser(encoding=self.form.encoding or charset or None)
        try:
            tree = lxml.html.document_fromstring(body, parser=parser)
            for number, element in enumerate(tree.iter()):
                if number >= MOST_ELEMENTS or len(element) > MOST_CHILDREN:
                    raise ValueError("too large a page")
            results: list[Result] = []
            for point in self.points:
                chosen = self._selectors[point.name](tree)
                if len(chosen) < point.nth:
                    results.append(Reason.MISSING)
                    continue
                element = chosen[point.nth - 1]
                text = element.get(point.attribute) if point.attribute else element.text_content()
                results.append(Reason.MISSING if text is None else self._read(str(text), point))
        except lxml.etree.LxmlError as err:
            raise ValueError(str(err)) from err
        return results

    # --- CSV ---

    def _from_csv(self, text: str) -> list[Result]:
        lines = io.StringIO(text, newline="")
        for _ in range(self.form.skip_lines):
            lines.readline()
        rows = [
            row
            for row in csv.reader(lines, delimiter=self.form.delimiter, strict=True)
            if row and not (self.form.comment and row[0].startswith(self.form.comment))
        ]
        names: dict[str, int] = {}
        if self.form.header:
            if not rows:
                raise ValueError("no header")
            for i, name in enumerate(rows.pop(0)):
                name = name.strip(BLANK)
                names[name] = -1 if name in names else i  # a name that stands twice names nothing
        return [self._of_rows(rows, names, point) for point in self.points]

    def _of_rows(self, rows: list[list[str]], names: dict[str, int], point: HttpPoint) -> Result:
        column = names.get(point.column, -1) if isinstance(point.column, str) else (point.column or 0) - 1
        by = point.where_column
        key = None if by is None else names.get(by, -1) if isinstance(by, str) else by - 1
        if column < 0 or (key is not None and key < 0):
            return Reason.MISSING
        for row in rows if point.row == "first" else reversed(rows):
            if key is None or (key < len(row) and row[key].strip(BLANK) == point.where_equals):
                return self._read(row[column], point) if column < len(row) else Reason.MISSING
        return Reason.MISSING


# ------------------------------------------------------------------------------------- JSON pointer


def pointer_steps(pointer: str, where: str) -> tuple[str, ...]:
    """RFC 6901, section 3. Raises `ConfigError`."""
    if not pointer:
        return ()
    if not pointer.startswith("/"):
        raise ConfigError(f"{where}: pointer {pointer!r} begins with no /; as in /data/0/temperature")
    for i, char in enumerate(pointer):
        if char == "~" and pointer[i + 1 : i + 2] not in ("0", "1"):
            raise ConfigError(f"{where}: pointer {pointer!r}: ~ is written ~0, and / within a name ~1")
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer[1:].split("/"))


def at(tree: object, steps: Sequence[str]) -> tuple[bool, object]:
    """Whether there is something, and what (RFC 6901, section 4)."""
    here = tree
    for step in steps:
        if isinstance(here, dict):
            if step not in here:
                return False, None
            here = here[step]
        elif isinstance(here, list):
            # Digits without a leading zero; "-" is the place after the last.
            number = step.isascii() and step.isdigit() and (step == "0" or step[0] != "0") and len(step) < 10
            if not number or int(step) >= len(here):
                return False, None
            here = here[int(step)]
        else:
            return False, None
    return True, here


def _deepest(text: str) -> int:
    """An upper bound of a document's levels, cheap where there are few brackets at all."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    level = deepest = 0
    within = escaped = False
    for char in text:
        if within:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                within = False
        elif char == '"':
            within = True
        elif char in "[{":
            level += 1
            deepest = max(deepest, level)
        elif char in "]}":
            level -= 1
    return deepest


def _selector(text: str, where: str) -> Callable[[Any], list[Any]]:
    try:
        import cssselect
        import lxml.etree
    except ImportError as err:
        raise ConfigError(
            f"{where}: selector needs lxml and cssselect: pip install 'headgate[scrape]'"
        ) from err
    try:
        path = cssselect.HTMLTranslator().css_to_xpath(text)
        compiled = lxml.etree.XPath(path)
    except (cssselect.SelectorError, lxml.etree.XPathError) as err:
        raise ConfigError(f"{where}: selector {text!r} is not valid CSS: {err}") from err

    def select(tree: Any) -> list[Any]:
        found = compiled(tree)
        return found if isinstance(found, list) else []

    return select


# --------------------------------------------------------------------------------- a document's time


class TimeFormat(msgspec.Struct, frozen=True):
    """How a document writes its own time. `text` is iso, http, epoch_s, epoch_ms or a strptime format."""

    text: str
    zone: zoneinfo.ZoneInfo


def time_format(text: str, zone: str) -> TimeFormat:
    """Raises `ConfigError`."""
    try:
        found = zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f'options.time_zone: {zone!r} is not known; for example "UTC" or "Europe/Berlin"'
        ) from None
    if text not in ("iso", "http", "epoch_s", "epoch_ms") and "%" not in text:
        raise ConfigError(
            f'options.time_format: {text!r} is not iso, http, epoch_s, epoch_ms or a form like "%d.%m.%Y %H:%M"'
        )
    return TimeFormat(text, found)


def read_time(told: Value, how: TimeFormat) -> float | None:
    """A document's own time as seconds since 1970; `None` where it does not read."""
    try:
        if how.text in ("epoch_s", "epoch_ms"):
            seconds = float(told) / (1000 if how.text == "epoch_ms" else 1)
            return seconds if 0 < seconds < 253_402_300_800 else None  # the year 10,000
        text = str(told)
        if how.text == "iso":
            found = datetime.fromisoformat(text)
        elif how.text == "http":
            found = email.utils.parsedate_to_datetime(text)
        else:
            found = datetime.strptime(text, how.text)  # noqa: DTZ007 - the zone follows
        return (found if found.tzinfo is not None else found.replace(tzinfo=how.zone)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def http_time(text: str) -> float | None:
    """A date of a header (RFC 9110, 5.6.7)."""
    return read_time(text, TimeFormat("http", zoneinfo.ZoneInfo("UTC"))) if text else None


def retry_after_s(text: str, now: datetime | None = None) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    at_s = http_time(text)
    if at_s is None:
        return None
    return max(0.0, at_s - (now or datetime.now(UTC)).timestamp())
