"""Every format of advertisements, and one table of what they can say.

A point names a property, not a format: `temperature` is counted in one step whatever its sensor is, so that a sensor
may be exchanged for another make. A property's step is the finest that all its formats' steps are whole multiples of
(0.005 °C, since a RuuviTag sends that), so nothing is rounded; `steps` tells how many a format's own step is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm
from typing import Final

from drivers import advert_beacon, advert_govee, advert_mibeacon, advert_pvvx, advert_ruuvi, bthome
from drivers.advert import Advert, AdvertError, Format, Heard, Key, Property
from drivers.codec import limits_of
from drivers.contract import ValueType

FORMATS: Final[tuple[Format, ...]] = (
    bthome.FORMAT,
    advert_ruuvi.FORMAT,
    advert_pvvx.FORMAT,
    advert_mibeacon.FORMAT,
    advert_govee.FORMAT,
    advert_beacon.EDDYSTONE,
    advert_beacon.IBEACON,
)
BY_NAME: Final[Mapping[str, Format]] = {each.name: each for each in FORMATS}

_INT_TYPES: Final = tuple(
    (kind, *limits_of(kind))
    for kind in (
        *(
            ValueType.U8,
            ValueType.I8,
            ValueType.U16,
            ValueType.I16,
            ValueType.U32,
            ValueType.I32,
            ValueType.I64,
        ),
    )
)


def _shared() -> tuple[dict[str, Property], dict[str, dict[str, int]]]:
    """The one table, and by format and property the factor from its steps to the table's."""
    kinds: defaultdict[str, list[tuple[Format, Property]]] = defaultdict(list)
    for each in FORMATS:
        for known in each.properties.values():
            kinds[known.name].append((each, known))
    table: dict[str, Property] = {}
    factors: dict[str, dict[str, int]] = {each.name: {} for each in FORMATS}
    for name, found in kinds.items():
        first = found[0][1]
        if any(
            (known.unit, known.type in _TEXTUAL) != (first.unit, first.type in _TEXTUAL) for _, known in found
        ):
            raise AssertionError(f"{name}: its formats do not agree on what it is")
        if first.type in _TEXTUAL:
            table[name] = first
            continue
        steps = [Fraction(known.scale).limit_denominator(1_000_000) for _, known in found]
        step = Fraction(gcd(*(one.numerator for one in steps)), lcm(*(one.denominator for one in steps)))
        low = high = 0
        for (each, known), own in zip(found, steps, strict=True):
            factor = own / step
            factors[each.name][name] = factor.numerator
            least, most = known.span or limits_of(known.type)
            low, high = min(low, int(least * factor)), max(high, int(most * factor))
        kind = next(kind for kind, least, most in _INT_TYPES if least <= low and high <= most)
        table[name] = Property(name, kind, float(step), first.unit)
    return table, factors


_TEXTUAL: Final = (ValueType.STR, ValueType.BOOL)

PROPERTIES, _FACTORS = _shared()
"""What a point's `object` may name, without the `_2` of a second one."""


def steps(format_: Format, name: str) -> int:
    """How many of the table's steps one of this format's is. `name` may end in `_2`."""
    factors = _FACTORS[format_.name]
    if name in factors:
        return factors[name]
    stem, _, nth = name.rpartition("_")
    return factors.get(stem, 1) if nth.isdigit() else 1


def _by_data() -> tuple[dict[str, tuple[Format, ...]], dict[int, tuple[Format, ...]]]:
    by_service: dict[str, tuple[Format, ...]] = {}
    by_company: dict[int, tuple[Format, ...]] = {}
    for each in FORMATS:
        for uuid in each.services:
            by_service[uuid] = (*by_service.get(uuid, ()), each)
        for company in each.companies:
            by_company[company] = (*by_company.get(company, ()), each)
    return by_service, by_company


_BY_SERVICE, _BY_COMPANY = _by_data()


def may_be(heard: Heard) -> tuple[Format, ...]:
    """The formats whose data this advertisement carries, in the order of `FORMATS`."""
    found: tuple[Format, ...] = ()
    for uuid in heard.service_data:
        found += _BY_SERVICE.get(uuid, ())
    for company in heard.company_data:
        found += _BY_COMPANY.get(company, ())
    if len(found) > 1:
        found = tuple(each for each in FORMATS if each in found)
    return found


def read(heard: Heard, key: Key | None = None) -> tuple[Format, Advert] | None:
    """The first format that makes sense of it. Raises `AdvertError` if one claims it and cannot read it."""
    failed: AdvertError | None = None
    for each in may_be(heard):
        try:
            found = each.read(heard, key)
        except AdvertError as error:
            failed = failed or error
            continue
        if found is not None:
            return each, found
    if failed is not None:
        raise failed
    return None
