"""SunSpec devices: found by their marker, laid out by walking their models.

Rules:

1. A device tells what it has: "SunS" at a base address, then models one behind the other, each with its id and length,
   to 0xFFFF (SunSpec Device Information Model Specification V1.1, 6). What it does not have is never asked for.
2. `walk` does no IO: it says what to read and is told what stood there, so a scan drives it over whatever line it has.
3. A model that is not known is passed over by its length, and said. A device that breaks off, goes round, or claims a
   length beyond the registers there are, gives what came before, and why it ended.
4. A number with a scale factor becomes a point with `scale_register`; a point whose scale factor says "not implemented"
   is left out, for it can have no value. What stands for "not implemented" in each type (same specification, 4.2)
   becomes the point's `not_available`. For an accumulator that is 0, "not accumulated": of a 0 nobody can tell
   whether it counts, so it is shown, and is SENTINEL until the first pulse.

The definitions are those that the SunSpec Alliance publishes (github.com/sunspec/models), as the package `pysunspec2`
(Apache-2.0, the Alliance's own) brings them; nothing of its code is run.
"""

from __future__ import annotations

import importlib.util
import struct
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from drivers import codec, profiles
from drivers.contract import ConfigError, Found, Reason, Value, ValueType, engineering

Words: TypeAlias = Sequence[int]
Table: TypeAlias = dict[str, Any]

BASES: Final = (40000, 50000, 0)  #: where a device may begin (specification, 6.1), the likeliest first
MARKER: Final = (0x5375, 0x6E53)  #: "SunS"
END: Final = 0xFFFF
COMMON: Final = 1
MAX_MODELS: Final = 256  #: more is a device that goes round in circles
READS: Final = (
    120,
    60,
    30,
)  #: registers a request: where so many are refused, fewer are tried (125 are allowed)
_ADDRESSES: Final = 0x10000
_HEAD: Final = 2  #: a model's id and length
_WORD: Final = 2

#: Models that measure or tell what a device is: laid out unless others are named. The rest are settings (curves, trips,
#: schedules, networks), hundreds of points that no one wants by surprise.
MEASURING: Final = frozenset(
    {COMMON, *range(101, 104), *range(111, 114), *range(120, 125), 160, *range(201, 205), *range(211, 215)}
    | {*range(302, 309), *range(401, 405), 501, 502, 601, 701, 702, 713, 714, *range(801, 810)}
)


# ------------------------------------------------------------------------------------------- the definitions


class _Point(msgspec.Struct, frozen=True):
    name: str
    type: str
    size: int
    sf: str | int | None = None
    units: str = ""
    label: str = ""


class _Group(msgspec.Struct, frozen=True):
    name: str
    points: tuple[_Point, ...] = ()
    groups: tuple[_Group, ...] = ()
    count: int | str = 1  #: 0: as often as the model's length holds; a name: the point that says how often
    label: str = ""


class Definition(msgspec.Struct, frozen=True):
    """A published model."""

    id: int
    group: _Group


@lru_cache(maxsize=128)
def definition(model: int) -> Definition | None:
    """The published model of this id, or None. Raises `ConfigError` where the definitions are not installed."""
    found = importlib.util.find_spec("sunspec2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the SunSpec model definitions are not installed: pip install 'headgate[agent]'")
    file = Path(found.submodule_search_locations[0]) / "models" / "json" / f"model_{int(model)}.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=Definition)
    except FileNotFoundError:
        return None


class _Kind(msgspec.Struct, frozen=True):
    """A SunSpec type: ours, what its registers hold, and what stands for "not implemented"."""

    type: ValueType
    not_available: int | None


_KINDS: Final[Mapping[str, _Kind]] = {
    "int16": _Kind(ValueType.I16, -0x8000),
    "uint16": _Kind(ValueType.U16, 0xFFFF),
    "count": _Kind(ValueType.U16, 0xFFFF),
    "acc16": _Kind(ValueType.U16, 0),
    "enum16": _Kind(ValueType.U16, 0xFFFF),
    "bitfield16": _Kind(ValueType.U16, 0xFFFF),
    "int32": _Kind(ValueType.I32, -0x8000_0000),
    "uint32": _Kind(ValueType.U32, 0xFFFF_FFFF),
    "acc32": _Kind(ValueType.U32, 0),
    "enum32": _Kind(ValueType.U32, 0xFFFF_FFFF),
    "bitfield32": _Kind(ValueType.U32, 0xFFFF_FFFF),
    "ipaddr": _Kind(ValueType.U32, 0),
    "int64": _Kind(ValueType.I64, -0x8000_0000_0000_0000),
    "uint64": _Kind(ValueType.U64, 0xFFFF_FFFF_FFFF_FFFF),
    "acc64": _Kind(ValueType.U64, 0),
    "bitfield64": _Kind(ValueType.U64, 0xFFFF_FFFF_FFFF_FFFF),
    "float32": _Kind(ValueType.F32, None),  # not-a-number, which the decoder tells by itself
    "float64": _Kind(ValueType.F64, None),
    "string": _Kind(ValueType.STR, None),
}
_NO_READING: Final = ("pad", "sunssf")
_SF_NOT_AVAILABLE: Final = 0x8000
_UNITS: Final[Mapping[str, str]] = {
    "C": "Cel", "Pct": "%", "Secs": "s", "Sec": "s", "mSecs": "ms", "Var": "var", "Varh": "varh", "AH": "Ah",
    "WH": "Wh", "Degrees": "deg", "PF": "", "cos()": "", "W/m^2": "W/m2", "ohms": "Ohm", "Tms": "s", "SF": "",
    "HPa": "hPa", "mps": "m/s", "meters": "m", "text": "",
}  # fmt: skip


# ------------------------------------------------------------------------------------------- the walk


class Ask(msgspec.Struct, frozen=True):
    """Please read these holding registers."""

    register: int
    count: int


class Model(msgspec.Struct, frozen=True):
    """A model as the device has it. `words` are all its registers, id and length included, where they were read."""

    id: int
    register: int
    length: int  #: as the device tells it: without id and length
    known: bool
    words: tuple[int, ...] = ()


class Device(msgspec.Struct, frozen=True):
    """What a walk found."""

    base: int
    models: tuple[Model, ...]
    ended: str = ""  #: why the walk ended before the end marker; empty where it did not

    def text(self, point: str) -> str:
        """A text of the common model: Mn, Md, Opt, Vr, SN."""
        for model in self.models:
            if model.id == COMMON and model.words:
                for place in _places(model):
                    if place.point.name == point and place.point.type == "string":
                        return _string(model.words[place.offset : place.offset + place.point.size])
        return ""

    @property
    def maker(self) -> str:
        return self.text("Mn")

    @property
    def model(self) -> str:
        return self.text("Md")


Walk: TypeAlias = Generator[Ask, Words | None, Device | None]
"""Yields what to read; is sent the words, or None where the device refused. Returns None where no marker stands."""


def walk(bases: Sequence[int] = BASES) -> Walk:
    """The device at the first base where the marker stands."""
    for base in bases:
        if base + _HEAD > _ADDRESSES:
            continue
        if _sound((yield Ask(base, _HEAD)), _HEAD) == MARKER:
            return (yield from _walk_models(base))
    return None


def _walk_models(base: int) -> Generator[Ask, Words | None, Device]:
    models: list[Model] = []
    at = base + len(MARKER)

    def ended(why: str) -> Device:
        return Device(base, tuple(models), why)

    while len(models) < MAX_MODELS:
        if at + _HEAD > _ADDRESSES:
            return ended(f"register {at}: no end marker before the last register")
        head = _sound((yield Ask(at, _HEAD)), _HEAD)
        if head is None:
            # An end marker without a length behind it, at the very end of what the device has.
            if _sound((yield Ask(at, 1)), 1) == (END,):
                return ended("")
            return ended(f"register {at}: refused, where a model or the end marker should be")
        number, length = head
        if number == END:
            return ended("")
        if number == 0 or length == 0:
            return ended(f"register {at}: model {number} of length {length} is none")
        if at + _HEAD + length > _ADDRESSES:
            return ended(f"register {at}: model {number} of length {length} goes beyond the last register")
        known = definition(number)
        words: tuple[int, ...] = ()
        if known is not None:
            words = yield from _read_model(known, at, number, length)
        models.append(Model(number, at, length, known is not None, words))
        at += _HEAD + length
    return ended(f"more than {MAX_MODELS} models")


def _read_model(
    known: Definition, at: int, number: int, length: int
) -> Generator[Ask, Words | None, tuple[int, ...]]:
    """All its registers, in requests that split no value. Nothing where one of them is refused, however few it asks
    for."""
    total = _HEAD + length
    words: list[int] = []
    sizes = list(READS)
    counted = _is_counted(known.group)
    places: list[_Place] = []  # in the order of their offsets
    fixed = sum(point.size for point in known.group.points)
    while len(words) < total:
        begin = len(words)
        end = min(total, begin + sizes[0])
        if not words and counted and fixed < end:
            end = fixed  # how often its groups repeat is known first
        elif end < total:
            # What is known of the layout so far (counts may stand in what was read) tells where a value ends.
            if not places or begin <= fixed:
                so_far = Model(number, at, length, known=True, words=(*words, *[0] * (total - begin)))
                places = _places(so_far, known)
            last = bisect_left(places, end, key=_offset) - 1
            if (
                last >= 0
                and begin < places[last].offset
                and end < places[last].offset + places[last].point.size
            ):
                end = places[last].offset
        part = _sound((yield Ask(at + begin, end - begin)), end - begin)
        if part is not None:
            words += part
            continue
        while sizes and sizes[0] >= end - begin:
            del sizes[0]
        if not sizes:
            return ()
    return tuple(words)


def _is_counted(group: _Group) -> bool:
    """Does a point say how often a group of it repeats? (In all published models such a point is before all groups.)"""
    return any(isinstance(inner.count, str) or _is_counted(inner) for inner in group.groups)


def _sound(words: Words | None, count: int) -> tuple[int, ...] | None:
    """What was answered, if it is what was asked for."""
    if words is None or len(words) != count:
        return None
    return tuple(int(word) & 0xFFFF for word in words)


async def discover(
    ask: Callable[[int, int], Awaitable[Words | None]], bases: Sequence[int] = BASES
) -> Device | None:
    """The walk over a line: `ask(register, count)` reads holding registers, None where the device refuses."""
    steps = walk(bases)
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(await ask(wanted.register, wanted.count))
    except StopIteration as end:
        device = end.value
        return device if isinstance(device, Device) else None


# ------------------------------------------------------------------------------------------- the layout


class _Place(msgspec.Struct, frozen=True):
    """A point in a model: `offset` from the model's id on, `scope` the repeated groups that it stands in."""

    point: _Point
    offset: int
    scope: tuple[str, ...]
    scale_at: int | None


def _offset(place: _Place) -> int:
    return place.offset


def _places(model: Model, known: Definition | None = None) -> list[_Place]:
    """Every point of a model, as far as its length reaches. A group that repeats goes by what its count point says
    (in `words`), or by the length."""
    known = known or definition(model.id)
    if known is None:
        return []
    found: list[_Place] = []
    total = _HEAD + model.length

    def lay(group: _Group, at: int, scope: tuple[str, ...], outer: Mapping[str, int]) -> int:
        names = dict(outer)
        first = len(found)
        for point in group.points:
            if at + point.size > total:
                _scale(found, first, names)
                return total
            names[point.name] = at
            found.append(_Place(point, at, scope, None))
            at += point.size
        _scale(found, first, names)
        for inner in group.groups:
            times = _times(inner, at, total, names, model.words)
            for turn in range(times):
                if at >= total:
                    break
                named = (*scope, f"{inner.name}{turn + 1}") if inner.count != 1 else (*scope, inner.name)
                at = lay(inner, at, named, names)
        return at

    lay(known.group, 0, (), {})
    return found


def _scale(found: list[_Place], first: int, names: Mapping[str, int]) -> None:
    """Where the scale factor of each point of a group (from `first` on) stands: the nearest of its name, outwards."""
    for i in range(first, len(found)):
        place = found[i]
        if isinstance(place.point.sf, str):
            found[i] = msgspec.structs.replace(place, scale_at=names.get(place.point.sf))


def _times(group: _Group, at: int, total: int, names: Mapping[str, int], words: Words) -> int:
    if isinstance(group.count, int):
        if group.count:
            return group.count
        size = _size(group)
        return (total - at) // size if size else 0
    where = names.get(group.count)
    if where is None or where >= len(words) or words[where] == END:
        return 0
    return min(words[where], total)  # it cannot repeat more often than there are registers


def _size(group: _Group) -> int:
    return sum(point.size for point in group.points) + sum(_size(inner) for inner in group.groups)


class Layout(msgspec.Struct, frozen=True):
    """The points of a device, ready for the `modbus` driver, and what was left out with the reason."""

    points: tuple[Table, ...]
    left_out: tuple[str, ...]


def layout(device: Device, models: Collection[int] = MEASURING) -> Layout:
    """Point tables for the models named. A name is `m<model>_<point>`, `m160_module2_DCW`; the second model of an id is
    `m203b_…`."""
    points: list[Table] = []
    left_out: list[str] = []
    seen: dict[int, int] = {}
    for model in device.models:
        nth = seen[model.id] = seen.get(model.id, 0) + 1
        label = f"model {model.id}{f' (number {nth})' if nth > 1 else ''}"
        if not model.known:
            left_out.append(f"{label} at {model.register}: not a published model ({model.length} registers)")
            continue
        if model.id not in models:
            left_out.append(f"{label} at {model.register}: settings, not measurements")
            continue
        if not model.words:
            left_out.append(f"{label} at {model.register}: refused when it was read")
            continue
        prefix = f"m{model.id}{_nth(nth)}_"
        absent: list[str] = []
        for place in _places(model):
            if place.offset < _HEAD or place.point.type in _NO_READING:
                continue
            name = prefix + "_".join((*place.scope, place.point.name)).replace("-", "_")
            table = _table(model, place, name)
            if table is None:
                absent.append(name)
            else:
                points.append(table)
        if absent:
            left_out.append(f"{label}: the device does not implement {', '.join(absent)}")
    return Layout(tuple(points), tuple(left_out))


def _nth(nth: int) -> str:
    return "" if nth == 1 else chr(ord("a") + nth - 1) if nth <= 26 else f"_{nth}_"


def _table(model: Model, place: _Place, name: str) -> Table | None:
    """The point's table, or None where the device has no such value."""
    point = place.point
    kind = _KINDS.get(point.type)
    if kind is None:  # an IPv6 or hardware address: no number, and no text
        return None
    table: Table = {"name": name, "register": model.register + place.offset}
    if unit := _UNITS.get(point.units.strip(), point.units.strip()):
        table["unit"] = unit
    if kind.type is ValueType.STR:
        return table | {"type": "str", "length": _WORD * point.size}
    if isinstance(point.sf, str):
        if place.scale_at is None or place.scale_at >= len(model.words):
            return None
        exponent = _signed(model.words[place.scale_at])
        if not codec.LEAST_EXPONENT <= exponent <= codec.GREATEST_EXPONENT:
            return None  # 0x8000: not implemented; anything else is none that the specification allows
        table |= {
            "type": "f64",
            "encoding": str(kind.type),
            "scale_register": model.register + place.scale_at,
        }
    else:
        table["type"] = str(kind.type)
        if point.sf:
            table["scale"] = float(f"1e{point.sf}")
    if kind.not_available is not None:
        table["not_available"] = [kind.not_available]
    return table


def _signed(word: int) -> int:
    return word - 0x10000 if word & 0x8000 else word


def _string(words: Words) -> str:
    data = struct.pack(f">{len(words)}H", *words)
    return _shown_text(data.split(b"\0", 1)[0].decode("ascii", "replace").strip())


def _shown_text(text: str) -> str:
    """What a device says of itself goes to a terminal, and must not steer it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


# ------------------------------------------------------------------------------------------- what a scan shows


def found(
    device: Device, address: str, options: Mapping[str, Value], models: Collection[int] = MEASURING
) -> Found:
    """The device as a scan reports it: its points, a profile where one fits, and what it says now. `options` are those
    that reach it (host or serial, unit, …)."""
    laid = layout(device, models)
    kinds = [f"{model.id}{'' if model.known else '?'}" for model in device.models if model.id != COMMON]
    fitting = profiles.by_sunspec(device.maker, device.model)
    name = " ".join(filter(None, (device.maker, device.model))) or "unnamed"
    return Found(
        driver="modbus",
        address=address,
        description=f"{name}: SunSpec models {', '.join(kinds) or 'none'}",
        options=dict(options),
        profile=fitting[0].profile if fitting else None,
        points=laid.points,
        readings=dict(_shown(device, laid)),
        likelihood=1.0,
    )


def _shown(device: Device, laid: Layout) -> Iterator[tuple[str, str]]:
    """What the walk itself has read, decoded as the driver will."""
    held: dict[int, int] = {}
    for model in device.models:
        held.update(enumerate(model.words, model.register))
    for table in laid.points:
        field = codec.Field(
            at=0,
            type=ValueType(table["type"]),
            encoding=codec.Encoding(table["encoding"]) if "encoding" in table else None,
            length=table.get("length", 0),
            scale_at=0 if "scale_register" in table else None,
            not_available=tuple(table.get("not_available", ())),
        )
        at, count = int(table["register"]), field.registers
        words = [held[register] for register in range(at, at + count)]
        if "scale_register" in table:
            words.append(held[table["scale_register"]])
            field = msgspec.structs.replace(field, scale_at=_WORD * count)
        values, reasons = codec.RegisterDecoder([field]).decode(struct.pack(f">{len(words)}H", *words))
        value = values[0]
        if value is None or (reasons or {}).get(0, Reason.GOOD) is not Reason.GOOD:
            continue
        if not isinstance(value, str) and value in table.get("not_available", ()) and "encoding" not in table:
            continue
        if value == "":
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = engineering(value, table.get("scale", 1.0), 0.0)
        text = f"{value:.10g}" if isinstance(value, float) else _shown_text(str(value))
        yield table["name"], f"{text} {table.get('unit', '')}".rstrip()
