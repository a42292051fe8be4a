"""Device models, described once: a profile is one TOML file with the options and points of a model.

Rules:

1. A profile names its source: the document that its register map comes from.
2. What a device's own table says wins over its profile, key by key: a point of the same name is merged, a new one is
   added. A profile may extend another in the same way, and remove points of it; never itself, by whatever way round.
3. The operator's folders come before ours. A name that stands in several is taken from the first, and that is said.
4. A profile that cannot work is refused with its file, line and key, and the remedy.

No IO but reading the files.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from config.load import ConfigFileError, convert, line_of, nearest, read_toml
from drivers import registry
from drivers.contract import ConfigError, Value
from drivers.registry import TableError

Table: TypeAlias = dict[str, Any]

OURS: Final = Path(__file__).resolve().parent / "models"
OPERATORS: Final = Path("/etc/headgate/profiles")
FOLDERS_ENV: Final = "HEADGATE_PROFILES"  #: more folders of the operator's, parted by colons; they come first
MAX_EXTENDS: Final = 8  #: a longer chain is a mistake, and nobody could read it

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NOBODY: Final[Table] = {"host": "192.0.2.1"}  #: RFC 5737
_log = logging.getLogger(__name__)

Text: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]+\Z")
]


class ProfileError(ConfigError):
    """A profile cannot be used, or there is none of that name. The text names file, line and key."""


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A register that tells the model: what stands there, or between what bounds (raw, in its type)."""

    register: Annotated[int, Meta(ge=0, le=65535)]
    table: str = "holding"
    type: str = "u16"
    order: str | None = None
    length: int | None = None
    equals: int | float | str | None = None
    one_of: tuple[int | float | str, ...] = ()
    between: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if sum((self.equals is not None, bool(self.one_of), self.between is not None)) != 1:
            raise ValueError("equals: a mark says exactly one of equals, one_of and between")
        if self.between is not None and not self.between[0] <= self.between[1]:
            raise ValueError("between: gives the least value first, then the greatest")

    def point(self) -> Table:
        """The point that reads it. Marks of several models may lie across one another."""
        table: Table = {"name": f"{self.table} {self.register}", "register": self.register, "overlap": True}
        table |= {"table": self.table, "type": self.type}
        return table | {
            key: found for key in ("order", "length") if (found := getattr(self, key)) is not None
        }

    def fits(self, raw: Value | None) -> bool:
        """Is this the model's? A register that could not be read is not."""
        if raw is None:
            return False
        if self.between is not None:
            return isinstance(raw, int | float) and self.between[0] <= raw <= self.between[1]
        wanted = self.one_of or (self.equals,)
        if isinstance(raw, str):
            return any(isinstance(one, str) and _alike(one, raw) for one in wanted)
        return raw in wanted


class Detect(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a scan recognises the model. Texts are patterns (`*`, `?`), upper and lower case alike; everything that is
    given has to fit."""

    vendor: Text | None = None  #: device identification (Modbus function 43/14), object 0
    product: Text | None = None  #: objects 1, 4 or 5: product code, product name, model name
    sunspec_maker: Text | None = None  #: SunSpec common model: manufacturer
    sunspec_model: Text | None = None
    mark: tuple[Mark, ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Where a point stands: its file, and its number there."""

    file: str
    index: int


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
    file: str = ""
    extends: tuple[str, ...] = ()  #: what it extends, the nearest first
    files: tuple[str, ...] = ()  #: its own, then those of what it extends
    detect: Detect = Detect()
    places: tuple[Place, ...] = ()  #: of each point: the file that spoke of it last
    hides: str | None = None  #: the file of the same name that this one is taken instead of


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Text
    source: Text
    maker: Text | None = None
    kind: Text | None = None
    driver: Text | None = None
    extends: Text | None = None
    remove: tuple[Text, ...] = ()


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file, as it stands."""

    profile: _Head
    detect: Detect = Detect()
    options: Table = {}
    point: tuple[Table, ...] = ()


# ------------------------------------------------------------------------------------------- where they are


def folders() -> tuple[Path, ...]:
    """Where profiles are looked for, the operator's own before ours."""
    named = [Path(folder) for folder in os.environ.get(FOLDERS_ENV, "").split(":") if folder]
    return tuple(dict.fromkeys([*named, OPERATORS, OURS]))


def names() -> list[str]:
    """Every profile there is."""
    return sorted({file.stem for folder in folders() for file in _files(folder)})


def find(name: str) -> Path | None:
    """The file of a profile: the operator's where both have one."""
    return next(iter(_all(name)), None)


def _files(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if file.suffix == ".toml" and _NAME.fullmatch(file.stem)]
    except OSError:  # there is no such folder, or it is not for us to read: no profiles here
        return []


def _all(name: str) -> list[Path]:
    if not _NAME.fullmatch(name):
        return []
    return [file for folder in folders() if (file := folder / f"{name}.toml").is_file()]


# ------------------------------------------------------------------------------------------- reading


def load(name: str) -> Profile:
    """The profile with what it extends merged in. Raises `ConfigError` (file, key, nearest name)."""
    found = _all(name)
    if not found:
        raise ProfileError(unknown(name))
    hides = str(found[1]) if len(found) > 1 else None
    if hides is not None:
        _say_hidden(str(found[0]), hides)
    return msgspec.structs.replace(load_file(found[0]), hides=hides)


def load_file(file: Path) -> Profile:
    """The profile in this file, wherever it lies; what it extends is looked for by name. Raises `ConfigError`."""
    return _joined(file, ())


def unknown(name: str) -> str:
    """What to say where there is no such profile."""
    return f"unknown profile {name!r}{nearest(name, names())}; see headgate profiles"


@functools.cache
def _say_hidden(file: str, hides: str) -> None:
    _log.warning("profile %s is used instead of %s, which has the same name", file, hides)


def _joined(file: Path, below: tuple[Path, ...]) -> Profile:
    """`below`: the files that extend this one, the first first."""
    text, own = _read(file)
    try:
        stat = own.profile
        parent = _parent(file, text, stat, below)
    except ConfigFileError as err:
        raise ProfileError(str(err)) from err
    name, place = file.stem, str(file)
    if parent is None:
        missing = [key for key in ("maker", "kind", "driver") if getattr(stat, key) is None]
        if missing:
            path = f"profile.{missing[0]}"
            raise ProfileError(str(ConfigFileError("is required and missing", file=place, path=path)))
        points = [dict(point) for point in own.point]
        places = [Place(place, i) for i in range(len(points))]
    else:
        points = [dict(p) for p in parent.points if p["name"] not in stat.remove]
        places = [
            w for p, w in zip(parent.points, parent.places, strict=True) if p["name"] not in stat.remove
        ]
        at = {point["name"]: i for i, point in enumerate(points)}
        for index, point in enumerate(own.point):
            i = at.get(point["name"])
            if i is None:
                points.append(dict(point))
                places.append(Place(place, index))
            else:
                points[i] = _over(points[i], point)
                places[i] = Place(place, index)
    return Profile(
        name=name,
        model=stat.model,
        maker=stat.maker or (parent.maker if parent else ""),
        kind=stat.kind or (parent.kind if parent else ""),
        source=stat.source,
        driver=stat.driver or (parent.driver if parent else ""),
        options=_over(parent.options if parent else {}, own.options),
        points=tuple(points),
        file=place,
        extends=(parent.name, *parent.extends) if parent else (),
        files=(place, *parent.files) if parent else (place,),
        detect=own.detect,  # not the parent's: that tells another model
        places=tuple(places),
    )


def _parent(file: Path, text: str, head: _Head, below: tuple[Path, ...]) -> Profile | None:
    """Raises `ConfigFileError` for what is wrong in this file, `ProfileError` for what is wrong in another."""

    def wrong(key: str, what: str) -> ConfigFileError:
        path = f"profile.{key}"
        return ConfigFileError(what, file=str(file), line=line_of(text, path), path=path)

    if head.extends is None:
        if head.remove:
            raise wrong(
                "remove", "takes points away from the profile that this one extends, and it extends none"
            )
        return None
    chain = (*below, file)
    others = [other for other in _all(head.extends) if other != file]
    if not others:
        if head.extends == file.stem:
            raise wrong("extends", "a profile cannot extend itself")
        raise wrong("extends", unknown(head.extends))
    if others[0] in chain:
        way = " -> ".join([other.stem for other in chain] + [others[0].stem])
        raise wrong("extends", f"goes round in a circle: {way}; take one of these out")
    if len(chain) > MAX_EXTENDS:
        raise wrong("extends", f"more than {MAX_EXTENDS} profiles deep; extend one nearer to the root")
    parent = _joined(others[0], chain)
    known = [point["name"] for point in parent.points]
    for name in head.remove:
        if name not in known:
            raise wrong("remove", f"{parent.name} has no point {name!r}{nearest(name, known)}")
    return parent


def _read(file: Path) -> tuple[str, _File]:
    try:
        stat = file.stat()
        return _parsed(file, stat.st_mtime_ns, stat.st_size)
    except OSError as err:
        raise ProfileError(f"{file}: cannot be read: {err.strerror}") from err
    except ConfigFileError as err:
        raise ProfileError(str(err)) from err


@functools.lru_cache(maxsize=64)
def _parsed(file: Path, _mtime_ns: int, _size: int) -> tuple[str, _File]:
    table, text = read_toml(file)
    return text, parse(table, file=str(file), text=text)


def parse(table: Mapping[str, Any], *, file: str = "", text: str = "") -> _File:
    """One file's table, checked by itself. Raises `ConfigFileError`."""
    found = convert(table, _File, file=file, text=text)
    first: dict[str, int] = {}
    for index, point in enumerate(found.point):
        path = f"point[{index}]"

        def wrong(what: str, path: str = path) -> ConfigFileError:
            return ConfigFileError(what, file=file, line=line_of(text, f"{path}.name"), path=f"{path}.name")

        name = point.get("name")
        if not isinstance(name, str) or not name:
            raise wrong("is required and missing" if name is None else f"is no name: {name!r}")
        other = first.setdefault(name, index)
        if other != index:
            raise wrong(
                f"{name!r} is the name of point[{other}] too; a point's name is its identity: choose another"
            )
    return found


# ------------------------------------------------------------------------------------------- using


def notes(profile: Profile) -> str:
    """What its file says before its tables, in comments: what of the source was seen, and what to mind. Then that of
    what it extends."""
    told: list[str] = []
    for file in profile.files:
        try:
            text = _read(Path(file))[0]
        except ProfileError:  # it was there a moment ago
            continue
        lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        told.append(" ".join(line.lstrip("#").strip() for line in lines))
    return " ".join(filter(None, told))


def merge(
    profile: Profile,
    options: Mapping[str, object],
    points: Sequence[Mapping[str, object]],
    only: Sequence[str] | None = None,
) -> tuple[Table, list[Table]]:
    """The options and points of a device that follows a profile: the profile's points (those in `only`, and those
    that the device's own table speaks of), then the device's own. Raises `ConfigError`."""
    known = [point["name"] for point in profile.points]
    for name in only or ():
        if name not in known:
            raise ProfileError(f"only: profile {profile.name} has no point {name!r}{nearest(name, known)}")
    own: dict[str, Mapping[str, object]] = {}
    added: list[Table] = []
    for point in points:
        named = point.get("name")
        if isinstance(named, str) and named in known and named not in own:
            own[named] = point
        else:  # a new one; or a second of that name, which the driver's tables refuse
            added.append(dict(point))
    chosen = set(known if only is None else only) | own.keys()
    merged = [_over(point, own.get(point["name"], {})) for point in profile.points if point["name"] in chosen]
    return _over(profile.options, options), merged + added


def blame(
    profile: Profile,
    options: Mapping[str, object],
    points: Sequence[Mapping[str, object]],
    merged: Sequence[Mapping[str, object]],
    err: TableError,
) -> TableError:
    """What is wrong with a merged device, told where it stands: in the device's own table, or in the profile's file.
    `options` and `points` are the device's own, `merged` the points that `merge` made of them."""
    where = where_of(profile, merged, err)
    option = re.match(r"options\.([^.\[]+)", err.path)
    if option is not None:
        return err if option[1] in options or where is None else _in(err, where)
    found = re.match(r"point\[(\d+)\]", err.path)
    if found is None or int(found[1]) >= len(merged):
        return err
    name, key = merged[int(found[1])].get("name"), _key(merged, err)
    mine = [i for i, point in enumerate(points) if point.get("name") == name]
    if mine and (where is None or key.split(".")[0] in points[mine[-1]]):
        return TableError(str(err), f"point[{mine[-1]}]{'.' + key if key else ''}")
    return err if where is None else _in(err, where)


def _in(err: TableError, where: str) -> TableError:
    return TableError(f"{err}; in {where}", "profile")


def _key(merged: Sequence[Mapping[str, object]], err: TableError) -> str:
    """The key of the point that is wrong: by the error's path, or, of a driver's own check, by its text
    ("point 'power': register: …")."""
    found = re.match(r"point\[(\d+)\](?:\.(.*))?", err.path)
    if found is None:
        return ""
    name = merged[int(found[1])].get("name")
    spoken = re.search(rf"point {re.escape(repr(name))}: (\w+): ", str(err))
    return found[2] or (spoken[1] if spoken else "")


def where_of(profile: Profile, merged: Sequence[Mapping[str, object]], err: TableError) -> str | None:
    """File and line of what is wrong, where it stands in a profile's file."""
    if err.path == "driver":
        return _where_driver(profile)
    option = re.match(r"options\.([^.\[]+)", err.path)
    if option is not None:
        return _where_option(profile, err.path) if option[1] in profile.options else None
    found = re.match(r"point\[(\d+)\]", err.path)
    if found is None or int(found[1]) >= len(merged):
        return None
    known = [point["name"] for point in profile.points]
    name = merged[int(found[1])].get("name")
    return _where_point(profile, known.index(name), _key(merged, err)) if name in known else None


def _where_driver(profile: Profile) -> str:
    for file in profile.files:
        try:
            text, own = _read(Path(file))
        except ProfileError:  # it was there a moment ago
            continue
        if own.profile.driver is not None:
            return f"{file}:{line_of(text, 'profile.driver') or 1}"
    return profile.file


def _where_option(profile: Profile, path: str) -> str:
    """The nearest file of the chain that sets it."""
    option = path.removeprefix("options.").split(".")[0]
    for file in profile.files:
        try:
            text, own = _read(Path(file))
        except ProfileError:  # it was there a moment ago
            continue
        if option in own.options:
            return f"{file}:{line_of(text, path) or line_of(text, 'options') or 1}"
    return profile.file


def _where_point(profile: Profile, index: int, key: str) -> str:
    place = profile.places[index]
    try:
        text = _read(Path(place.file))[0]
    except ProfileError:
        return place.file
    line = line_of(text, f"point[{place.index}]{'.' + key if key else ''}")
    return f"{place.file}:{line}" if line else place.file


def check(profile: Profile) -> None:
    """Would a device with this profile be accepted? Raises `ConfigError`, with the file and line of what is wrong."""
    if not profile.points:
        raise ProfileError(f"{profile.file}: point: it has no points; add at least one [[point]]")
    options = {**_stand_in(profile), **profile.options}
    points = list(profile.points)
    try:
        registry.build(profile.name, profile.driver, options, points)
    except TableError as err:
        said = str(err).removeprefix(f"device {profile.name!r}").lstrip(": ")
        if err.path.startswith("options") and said.endswith("is required and missing"):
            _check_points(profile)  # what only the device's owner knows is missing: its address, its key
            return
        where = where_of(profile, points, TableError(said, err.path)) or profile.file
        raise ProfileError(f"{where}: {said}") from err
    except ConfigError as err:
        raise ProfileError(f"{profile.file}: {err}") from err


def _stand_in(profile: Profile) -> Table:
    """What only the owner of a device knows, where a profile cannot be judged without."""
    if profile.driver != "modbus" or "host" in profile.options or "serial" in profile.options:
        return {}
    return {"serial": "/dev/null"} if profile.options.get("framing") in ("rtu", "ascii") else _NOBODY


def _check_points(profile: Profile) -> None:
    """The keys of the points, where the device as a whole cannot be built."""
    kind = registry.load(profile.driver)
    for i, point in enumerate(profile.points):
        try:
            convert(point, kind.point_type)
        except ConfigFileError as err:
            where = _where_point(profile, i, err.path)
            raise ProfileError(f"{where}: point {point['name']!r}: {err.path}: {err.text}") from err


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    """Key by key, tables within tables too."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[key] = _over(under, value) if both else value  # type: ignore[arg-type]
    return merged


# ------------------------------------------------------------------------------------------- recognising


class Likely(msgspec.Struct, frozen=True):
    """A profile that may fit a device found, and how surely (0..1)."""

    profile: str
    likelihood: float


def by_identification(objects: Mapping[int, str], known: Iterable[Profile] | None = None) -> list[Likely]:
    """Profiles that fit what a device says of itself (Modbus function 43/14: object id -> text), likeliest first."""
    product = [objects[i] for i in (1, 4, 5) if i in objects]
    found: list[Likely] = []
    for profile in every() if known is None else known:
        wanted = profile.detect
        if wanted.vendor is None and wanted.product is None:
            continue
        if wanted.vendor is not None and not _alike(wanted.vendor, objects.get(0, "")):
            continue
        if wanted.product is not None and not any(_alike(wanted.product, text) for text in product):
            continue
        found.append(Likely(profile.name, 0.95 if wanted.vendor and wanted.product else 0.6))
    return sorted(found, key=lambda likely: (-likely.likelihood, likely.profile))


def by_sunspec(maker: str, model: str, known: Iterable[Profile] | None = None) -> list[Likely]:
    """Profiles that fit a SunSpec device's common model."""
    found: list[Likely] = []
    for profile in every() if known is None else known:
        wanted = profile.detect
        if wanted.sunspec_maker is None or not _alike(wanted.sunspec_maker, maker):
            continue
        if wanted.sunspec_model is not None and not _alike(wanted.sunspec_model, model):
            continue
        found.append(Likely(profile.name, 0.9 if wanted.sunspec_model else 0.7))
    return sorted(found, key=lambda likely: (-likely.likelihood, likely.profile))


def marked(known: Iterable[Profile] | None = None) -> list[Profile]:
    """Modbus profiles that can be told by their registers: read `Mark.point()` of each `detect.mark`; all must fit."""
    some = every() if known is None else known
    return [profile for profile in some if profile.driver == "modbus" and profile.detect.mark]


def every() -> list[Profile]:
    """All profiles that can be read; one that cannot is logged and left out."""
    found: list[Profile] = []
    for name in names():
        try:
            found.append(load(name))
        except ConfigError as err:
            _log.warning("profile left out: %s", err)
    return found


def _alike(pattern: str, text: str) -> bool:
    return fnmatchcase(text.strip().casefold(), pattern.casefold())
