"""Bluetooth LE sensors that advertise their values: each advertisement becomes one scan of the points it carried.

Rules:

- The adapter and its scan are shared by all devices of the process (`ble_radio`); the formats are pure (`advert_*`).
- A message is read once. What a format numbers (packet id, counter, measurement sequence) is not read again when it is
  repeated, and a repeat is no sign of life: a sensor that goes on sending one old measurement goes stale.
- Silence of `stale_after_s` gives one scan of `STALE`, then nothing until the sensor speaks. A point that its sensor
  has never sent in that time is `MISSING`, once.
- A sensor with a key is believed only what is encrypted by it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal

import msgspec

from config.load import nearest
from drivers import advert_formats
from drivers.advert import KEY_BYTES, Advert, AdvertError, Format, Heard, Key, Property
from drivers.advert_formats import BY_NAME, FORMATS, PROPERTIES
from drivers.ble_radio import Need, Scanner, hub
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Found,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)
from drivers.scan_queue import ScanQueue

REPEAT_S = 4.0  # one packet id within this time is one message; the same as bthome-ble
REPLAY_RESTART = 100  # a counter below this may be a sensor with a new battery; the same as bthome-ble
DISCOVER_S = 8.0  # most sensors advertise every second to five

RSSI: Final = Property("rssi", ValueType.I16, unit="dBm")
_ADDRESS = re.compile(r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}")
_REPEATED = re.compile(r"(.+?)_([1-9]\d?)")

FormatName = Literal["auto", "bthome", "ruuvi", "pvvx", "mibeacon", "govee", "eddystone", "ibeacon"]
ScanMode = Literal["auto", "active", "passive"]


class BleOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a Bluetooth sensor; every key is explained in ble.toml."""

    address: str
    format: FormatName = "auto"
    adapter: str = ""
    scan: ScanMode = "auto"
    stale_after_s: float = 300.0
    key_file: str = ""


class BlePoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A point is one property. Its type, step and unit are in `advert_formats`: `type` stays away, and `scale` and
    `offset` are applied on top (1.8 and 32 make degrees Fahrenheit of a temperature)."""

    object: str  #: "temperature", "temperature_2" for the second of a message, …, or "rssi"


@dataclasses.dataclass(slots=True)
class AdvertCounts:
    """What was heard of a sensor since its driver was built; never reset."""

    adverts: int = 0  #: that gave a scan
    repeats: int = 0  #: of a message that gave one
    replays: int = 0  #: encrypted, with a counter from the past
    undecodable: int = 0  #: of a known format, and cut off or not decrypted
    pointless: int = 0  #: carried nothing that is configured
    foreign: int = 0  #: of no known format, or of another than this device's


# ------------------------------------------------------------------------------------------------------------ driver


class BleDriver(PushDriver[BleOptions, BlePoint]):
    """One Bluetooth sensor. `points` carry the type, scale and unit that their properties have."""

    options_type: ClassVar[type[msgspec.Struct]] = BleOptions
    point_type: ClassVar[type[Point]] = BlePoint

    def __init__(self, name: str, options: BleOptions, points: Sequence[BlePoint]) -> None:
        self._format: Format | None = BY_NAME.get(options.format)
        super().__init__(name, options, [_effective(point, self._format) for point in points])
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        self._address = checked_address(options.address)
        check_adapter(options.adapter)
        if not 0 <= options.stale_after_s <= 31_536_000:
            raise ConfigError(f"options.stale_after_s is {options.stale_after_s}; allowed is 0 to 31536000")
        if options.key_file and self._format is not None and not self._format.encrypts:
            raise ConfigError(
                f"options.key_file: {self._format.title} is never encrypted; leave key_file out, or correct format"
            )
        _check_key_file(options.key_file)
        self.overruns = 0  #: scans dropped because nobody took them in time
        self.counts = AdvertCounts()
        self._queue = ScanQueue()
        self._scanner: Scanner | None = None
        self._key: Key | None = None
        self._by_object: dict[str, list[BlePoint]] = {}
        for point in self.points:
            self._by_object.setdefault(point.object, []).append(point)
        self._wants_rssi = "rssi" in self._by_object
        self._shapes: dict[tuple[str, ...], _Shape] = {}
        self._spoken: Format | None = None  #: the format it was last understood in
        self._never_sent: set[str] = set()
        self._silence_timer: asyncio.TimerHandle | None = None
        self._silent = False
        self._triggered = False  #: the sensor sends only when something happens
        self._now_s: Callable[[], float] = time.monotonic  # the loop's clock once connected
        self._connected_at_s = 0.0
        self._heard_at_s = 0.0
        self._last_packet: tuple[int, float] | None = None  #: id, and when it was heard
        self._last_counter = -1
        self._last_sequence: int | None = None

    @property
    def need(self) -> Need:
        """How it has to be scanned for. An adapter that scans passively reports only what has changed, so a format
        that does not number its messages would seem silent while its values stand still."""
        if self.options.scan != "auto":
            return Need.PASSIVE if self.options.scan == "passive" else Need.ACTIVE
        return Need.PASSIVE if self._format is not None and self._format.numbered else Need.ACTIVE

    # --------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        await self.close()
        path = self.options.key_file
        self._key = Key(_key_in(path), self._address) if path else None
        loop = asyncio.get_running_loop()
        async with hub().scanner(self.options.adapter) as scanner:
            self._queue.begin()
            self._now_s = loop.time
            self._connected_at_s = self._heard_at_s = loop.time()
            self._silent = self._triggered = False
            self._last_packet = None
            self._never_sent = set(self._by_object)
            await scanner.add(self._address, self, self.need)
            self._scanner = scanner
        if self.options.stale_after_s:
            self._silence_timer = loop.call_later(self.options.stale_after_s, self._watch_silence)

    async def close(self) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        self._queue.end(DeviceUnreachable("not connected"))
        scanner, self._scanner = self._scanner, None
        if scanner is not None:
            scanner.remove(self._address, self)
            await hub().leave(scanner)

    def lost(self, error: DeviceUnreachable) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        self._queue.end(error)

    # ------------------------------------------------------------------------------------------------ adverts

    def heard(self, heard: Heard) -> None:
        found = self._understood(heard)
        if found is None:
            return
        format_, advert = found
        self._triggered = advert.triggered
        now_s = self._now_s()
        if self._is_repeat(advert, now_s):
            return
        values = advert.values
        shape = self._shapes.get((format_.name, *values)) or self._shape(format_, tuple(values))
        if not shape.points:
            self.counts.pointless += 1
            return
        self.counts.adverts += 1
        self._heard_at_s = now_s
        self._silent = False
        if self._never_sent:
            self._never_sent.difference_update(shape.objects)
        if self._wants_rssi:
            values["rssi"] = heard.rssi
        if shape.steps is None:
            found_values = [values[name] for name in shape.objects]
        else:
            found_values = [
                raw if step == 1 or raw is None else raw * step
                for raw, step in zip([values[name] for name in shape.objects], shape.steps, strict=True)
            ]
        self._put(
            Scan(heard.taken_at_ns, shape.points, found_values, self._reasons(advert, shape, found_values))
        )

    def _understood(self, heard: Heard) -> tuple[Format, Advert] | None:
        """What it says, and in which format. What cannot be read of the format it speaks is a bad scan."""
        formats = advert_formats.may_be(heard) if self._format is None else (self._format,)
        failed: tuple[Format, AdvertError] | None = None
        for each in formats:
            try:
                advert = each.read(heard, self._key)
            except AdvertError as exc:
                failed = failed or (each, exc)
                continue
            if advert is not None:
                self._spoken = each
                return each, advert
        if failed is None or self._spoken not in (None, failed[0]):
            self.counts.foreign += 1
        else:
            self.counts.undecodable += 1
            self._heard_at_s, self._silent = self._now_s(), False
            self._put(_bad(heard.taken_at_ns, self.points, failed[1].reason))
        return None

    def _shape(self, format_: Format, carried: tuple[str, ...]) -> _Shape:
        """Which points a message of these properties carries. Sensors send a few shapes, over and over."""
        points = tuple(point for point in self.points if point.object in carried)
        if points and self._wants_rssi:  # the strength of a signal that says nothing is no reading
            points = tuple(
                point for point in self.points if point.object in carried or point.object == "rssi"
            )
        steps = tuple(advert_formats.steps(format_, point.object) for point in points)
        shape = _Shape(
            points if len(points) < len(self.points) else self.points,
            tuple(point.object for point in points),
            steps if any(step != 1 for step in steps) else None,
        )
        if len(self._shapes) >= 64:  # a hostile or broken sensor may make up many
            self._shapes.clear()
        self._shapes[format_.name, *carried] = shape
        return shape

    @staticmethod
    def _reasons(advert: Advert, shape: _Shape, values: Sequence[Value | None]) -> dict[int, Reason]:
        reasons: dict[int, Reason] = {}
        if advert.reasons:
            for index, name in enumerate(shape.objects):
                if name in advert.reasons:
                    reasons[index] = advert.reasons[name]
        if None in values:
            for index, value in enumerate(values):
                if value is None:
                    reasons[index] = Reason.MISSING if shape.objects[index] == "rssi" else Reason.DECODE
        return reasons

    def _is_repeat(self, advert: Advert, now_s: float) -> bool:
        sequence = advert.sequence
        if sequence is not None:
            before, self._last_sequence = self._last_sequence, sequence
            if sequence == before:
                self.counts.repeats += 1
                return True
        counter = advert.counter
        if counter is not None:
            last, self._last_counter = self._last_counter, counter
            if counter == last:
                self.counts.repeats += 1
                return True
            if counter < last and counter >= REPLAY_RESTART:
                self._last_counter = last
                self.counts.replays += 1
                return True
        packet = advert.packet_id
        if packet is None:
            return False
        last_packet = self._last_packet
        # Ids count up and roll over at 256: a step of 0, or of 64 and more, is a repeat or an older message, late.
        if (
            last_packet is not None
            and now_s - last_packet[1] <= REPEAT_S
            and not 0 < (packet - last_packet[0]) % 256 < 64
        ):
            self.counts.repeats += 1
            return True
        self._last_packet = packet, now_s
        return False

    def _watch_silence(self) -> None:
        """Say once that the sensor is silent, or that it never sends some point; look again when it may be so."""
        loop = asyncio.get_running_loop()
        now_s, stale_after_s = loop.time(), self.options.stale_after_s
        if now_s - self._heard_at_s >= stale_after_s:
            if not self._silent and not self._triggered:
                self._silent = True
                self._put(_bad(boot_ns(), self.points, Reason.STALE))
        elif self._never_sent and now_s - self._connected_at_s >= stale_after_s:
            absent = tuple(point for point in self.points if point.object in self._never_sent)
            self._never_sent = set()
            self._put(_bad(boot_ns(), absent, Reason.MISSING))
        due_s = self._heard_at_s + stale_after_s
        self._silence_timer = loop.call_at(
            due_s if due_s > now_s else now_s + stale_after_s, self._watch_silence
        )

    def _put(self, scan: Scan) -> None:
        self.overruns += self._queue.put(scan)

    def scans(self) -> AsyncIterator[Scan]:
        return self._queue.drain()

    # ----------------------------------------------------------------------------------------------- discover

    @classmethod
    async def discover(cls) -> AsyncIterator[Found]:
        """What advertises in reach within `DISCOVER_S`, sensors first. Raises `DeviceUnreachable`."""
        from drivers.ble_survey import survey

        latest: dict[str, Found] = {}
        async for found in survey(DISCOVER_S):
            latest[found.address] = found
        for found in sorted(latest.values(), key=lambda one: (-one.likelihood, one.address)):
            yield found


class _Shape(msgspec.Struct, frozen=True):
    """Of messages that carry the same properties: the points, where their values stand, and their steps."""

    points: tuple[BlePoint, ...]
    objects: tuple[str, ...]
    steps: tuple[int, ...] | None  #: None: all are 1


def checked_address(address: str) -> str:
    """As BlueZ writes it. Raises `ConfigError`."""
    found = address.upper().replace("-", ":")
    if not _ADDRESS.fullmatch(found):
        raise ConfigError(
            f'options.address is {address!r}; write six pairs of digits, as in "A4:C1:38:0B:5F:2E"'
        )
    return found


def check_adapter(adapter: str) -> None:
    if adapter and not re.fullmatch(r"[a-z]+\d+", adapter):
        raise ConfigError(f'options.adapter is {adapter!r}; write a name such as "hci0"')


def _check_key_file(path: str) -> None:
    """A key that is there and cannot be one is refused at once; a file that cannot be read here and now (another user
    checks the configuration, say) is refused by `connect`."""
    if path:
        try:
            text = Path(path).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return
        _key_of(text, path)


def _key_in(path: str) -> bytes:
    where = f"options.key_file {path}"
    try:
        public = Path(path).stat().st_mode & stat.S_IROTH
        text = Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{where}: cannot be read ({exc})") from exc
    if public:
        raise ConfigError(f"{where}: everybody can read it; chmod 600")
    return _key_of(text, path)


def _key_of(text: str, path: str) -> bytes:
    digits = text.strip()
    if re.fullmatch(r"[0-9A-Fa-f]*", digits) and len(digits) == 2 * KEY_BYTES:
        return bytes.fromhex(digits)
    what = (
        f"{len(digits)} characters" if len(digits) != 2 * KEY_BYTES else "characters that are no such digits"
    )
    raise ConfigError(
        f"options.key_file {path}: must hold the key as {2 * KEY_BYTES} hexadecimal digits and nothing else; "
        f"it holds {what}"
    )


def _effective(point: BlePoint, format_: Format | None) -> BlePoint:
    """The point with the type, scale and unit of its property; `scale` and `offset` of the configuration on top."""
    known = PROPERTIES if format_ is None else format_.properties
    where = f"point {point.name!r}"
    name = re.sub(r"[ .-]", "_", point.object.lower())
    repeated = _REPEATED.fullmatch(name)
    stem = repeated[1] if repeated and name not in PROPERTIES else name
    found = RSSI if name == "rssi" else PROPERTIES[stem] if stem in known else None
    if found is None:
        speakers = [each.name for each in FORMATS if stem in each.properties]
        if format_ is not None and speakers:
            raise ConfigError(
                f"{where}: {format_.title} has no object {point.object!r}; {', '.join(speakers)} has it: "
                "correct object, or the option format"
            )
        raise ConfigError(f"{where}: unknown object {point.object!r}{nearest(stem, [*known, 'rssi'])}")
    if point.type not in (ValueType.F64, found.type):
        raise ConfigError(f"{where}: type is {point.type}, but {stem} is {found.type}; leave type out")
    if found.type in (ValueType.STR, ValueType.BOOL) and (point.scale != 1.0 or point.offset):
        raise ConfigError(f"{where}: {stem} is no number, so scale and offset mean nothing; leave them out")
    # The first of a kind has no number in a message.
    name = stem if repeated and name == f"{stem}_1" else name
    return msgspec.structs.replace(
        point,
        object=name,
        type=found.type,
        scale=_times(found.scale, point.scale),
        unit=point.unit or found.unit,
    )


def _times(step: float, scale: float) -> float:
    """Their product as one would write it: 0.01 * 1.8 is 0.018 and not 0.018000000000000002."""
    return float(f"{step * scale:.15g}")


def _bad(taken_at_ns: int, points: tuple[BlePoint, ...], reason: Reason) -> Scan:
    values: list[Value | None] = [None] * len(points)
    return Scan(taken_at_ns, points, values, dict.fromkeys(range(len(points)), reason))
