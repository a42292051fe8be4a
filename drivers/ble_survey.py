"""Who advertises in reach, what it says, and the device table that would read it. For a technician, not for a poller.

It is one more listener of the shared scan, and to BlueZ one more client: it works beside a running agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec

from drivers import advert_formats
from drivers.advert import AdvertError, Format, Heard, Key, Property
from drivers.advert_formats import PROPERTIES
from drivers.ble_radio import hub
from drivers.contract import DeviceUnreachable, Found, Reason, Value, engineering

_SHOWN: Final = {
    "Cel": "°C",
    "[g]": "g",
    "ug/m3": "µg/m³",
    "m3": "m³",
    "uS/cm": "µS/cm",
    "[lb_av]": "lb",
    "deg": "°",
}
"""UCUM's way of writing units, for a person."""

_UNPROPOSED: Final = frozenset({"packet_id", "sequence", "device_type_id"})
"""Properties that say nothing of the world; who wants them can add them."""


async def survey(
    seconds: float, adapter: str = "", keys: Mapping[str, bytes] | None = None
) -> AsyncIterator[Found]:
    """Everybody who is heard, as soon as something new is known of him: of several with one address the last counts.
    `keys` are of encrypted sensors, 16 bytes by address ("A4:C1:38:0B:5F:2E"). Raises `DeviceUnreachable`."""
    listener = _Surveyor(keys or {})
    async with hub().scanner(adapter) as scanner:
        await scanner.add_for_all(listener)
    try:
        deadline_s = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await listener.news.wait()
            except TimeoutError:
                break
            for found in listener.take():
                yield found
        for found in listener.take():
            yield found
    finally:
        scanner.remove_for_all(listener)
        await hub().leave(scanner)


class _Sighting(msgspec.Struct):
    """What is known of one sender."""

    address: str
    name: str = ""
    rssi: int | None = None
    format: Format | None = None
    trouble: str = ""
    encrypted: bool = False
    readings: dict[str, str] = {}


class _Surveyor:
    """Listens to everybody."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self.news = asyncio.Event()
        self._keys = {address.upper(): Key(key, address.upper()) for address, key in keys.items()}
        self._seen: dict[str, _Sighting] = {}
        self._fresh: dict[str, None] = {}
        self._failure: DeviceUnreachable | None = None

    def lost(self, error: DeviceUnreachable) -> None:
        self._failure = error
        self.news.set()

    def heard(self, heard: Heard) -> None:
        one = self._seen.get(heard.address)
        is_new = one is None
        if one is None:
            one = self._seen[heard.address] = _Sighting(heard.address)
        before = (one.name, one.format, one.trouble, len(one.readings))
        one.name = heard.name or one.name
        one.rssi = heard.rssi if heard.rssi is not None else one.rssi
        self._understand(one, heard)
        if is_new or before != (one.name, one.format, one.trouble, len(one.readings)):
            self._fresh[heard.address] = None
            self.news.set()

    def _understand(self, one: _Sighting, heard: Heard) -> None:
        key = self._keys.get(heard.address)
        try:
            found = advert_formats.read(heard, key)
        except AdvertError as exc:
            if not one.readings:
                one.encrypted = exc.reason is Reason.DECRYPT
                one.trouble = (
                    "encrypted: needs its key (key_file)" if one.encrypted and key is None else str(exc)
                )
                one.format = one.format or next(iter(advert_formats.may_be(heard)), None)
            return
        if found is None:
            return
        format_, advert = found
        if one.format is not None and one.readings and format_ is not one.format:
            return  # an iBeacon beside a thermometer, say: the first that was understood stays
        one.format, one.trouble = format_, ""
        one.encrypted = key is not None
        # Replaced and not changed, since what was yielded before holds the old one.
        one.readings = one.readings | {
            name: _shown(format_, name, value, advert.reasons.get(name))
            for name, value in advert.values.items()
        }

    def take(self) -> list[Found]:
        """What is new since the last call. Raises `DeviceUnreachable`."""
        if self._failure is not None:
            raise self._failure
        self.news.clear()
        fresh, self._fresh = self._fresh, {}
        return [_found(self._seen[address]) for address in fresh]


def _shown(format_: Format, name: str, value: Value | None, reason: Reason | None) -> str:
    if value is None:
        return "(cannot be read)"
    if isinstance(value, str | bool):
        return value if isinstance(value, str) else "yes" if value else "no"
    known = _property(name)
    number = engineering(value * advert_formats.steps(format_, name), known.scale, 0.0)
    text = f"{number:.6g} {_SHOWN.get(known.unit, known.unit)}".strip()
    return text if reason is None else f"{text} ({reason.name.lower()})"


def _property(name: str) -> Property:
    return PROPERTIES.get(name) or PROPERTIES[name.rpartition("_")[0]]


def _found(one: _Sighting) -> Found:
    carried = [name for name in one.readings if name not in _UNPROPOSED]
    signal = "" if one.rssi is None else f"{one.rssi} dBm"
    title = one.format.title if one.format is not None and (one.readings or one.trouble) else ""
    parts = (
        one.name,
        f"{title}, {one.trouble}" if title and one.trouble else title,
        ", ".join(carried),
        signal,
    )
    options: dict[str, Value] = {"address": one.address}
    if title and one.format is not None:
        options["format"] = one.format.name
    points = [{"name": name, "object": name} for name in carried]
    return Found(
        driver="ble",
        address=one.address,
        description="; ".join(part for part in parts if part),
        options=options,
        points=tuple([*points, {"name": "rssi", "object": "rssi"}] if points else []),
        readings=one.readings | ({"rssi": signal} if signal else {}),
        likelihood=_likelihood(one, bool(carried)),
    )


def _likelihood(one: _Sighting, has_values: bool) -> float:
    if has_values:
        # A beacon is somebody's telephone or watch more often than a device to be read.
        return 0.3 if one.format is not None and one.format.name == "ibeacon" else 1.0
    return 0.5 if one.trouble else 0.05
