"""No bytes at all make a Bluetooth decoder raise anything but its own error, or give a value its point cannot hold.

Short here; `HEADGATE_FUZZ=1000000` is the nightly run. Half of the inputs are noise, half are recordings with a few
bytes changed, cut off or doubled, so that deeper branches are reached. The seed is printed and can be given again.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from drivers.advert import Advert, AdvertError, Format, Heard, Key
from drivers.advert_formats import BY_NAME, FORMATS, PROPERTIES, read, steps
from drivers.ble_gatt import GattPoint
from drivers.ble_gatt import decode as decode_gatt
from drivers.codec import limits_of
from drivers.contract import Reason, Value, ValueType
from tests.test_drivers_ble_formats import GOVEE, MIBEACON, PVVX, PVVX_SEALED, RUUVI_3, RUUVI_5

RUNS = int(os.environ.get("HEADGATE_FUZZ", "2000"))
SEED = int(os.environ.get("HEADGATE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
A = "A4:C1:38:00:00:01"
NAMES = ("", "GVH5102_CB9B", "GVH5106_4E05", "GV51085242", "GV5140303A", "GV5112AB", "B51782BC8")

SEEDS: dict[str, list[bytes]] = {
    "bthome": [
        bytes.fromhex("44 0007 02CA09 03BF13 0161 530348692A".replace(" ", "")),
        bytes.fromhex("403B0103 3C0103"),
    ],
    "ruuvi": [bytes.fromhex(data) for data, _ in RUUVI_5 + RUUVI_3],
    "pvvx": [bytes.fromhex(data) for data, _, _ in PVVX] + [bytes.fromhex(PVVX_SEALED)],
    "mibeacon": [data for data, *_ in MIBEACON],
    "govee": [data for _, data, *_ in GOVEE],
    "eddystone": [bytes.fromhex("20000b18130000001467 00002ac4")],
    "ibeacon": [bytes.fromhex("0215E2C56DB5DFFB48D2B060D0F5A71096E000640000C5")],
}


def changed(rng: random.Random, seeds: list[bytes]) -> bytes:
    if rng.random() < 0.5:
        return rng.randbytes(rng.choice((rng.randrange(32), rng.randrange(256))))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 5)):
        match rng.randrange(4):
            case 0 if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 1 if data:
                del data[rng.randrange(len(data)) :]
            case 2:
                data += rng.choice(seeds)[: rng.randrange(32)]
            case _:
                data[:0] = rng.randbytes(rng.randrange(3))
    return bytes(data)


def heard_as(each: Format, rng: random.Random, data: bytes) -> Heard:
    address = A
    if (
        each.name in ("pvvx", "mibeacon") and rng.random() < 0.8
    ):  # so that the address inside is often the sender's
        inside = data[:6] if each.name == "pvvx" else data[5:11]
        if len(inside) == 6:
            turned = inside if each.name == "pvvx" and len(data) == 13 else inside[::-1]
            address = turned.hex(":").upper()
    if each.services:
        return Heard(address, 0, -60, service_data={rng.choice(sorted(each.services)): data})
    return Heard(
        address, 0, -60, company_data={rng.choice(sorted(each.companies)): data}, name=rng.choice(NAMES)
    )


def judge(each: Format, advert: Advert) -> None:
    for name, raw in advert.values.items():
        stem = name if name in PROPERTIES else name.rpartition("_")[0]
        assert stem in each.properties, name
        shared = PROPERTIES[stem]
        if raw is None:
            assert name not in advert.reasons
        elif shared.type is ValueType.BOOL:
            assert type(raw) is bool, name
        elif shared.type is ValueType.STR:
            assert type(raw) is str, name
        else:
            assert type(raw) is int, name
            low, high = limits_of(shared.type)
            assert low <= raw * steps(each, name) <= high, name
            own_low, own_high = each.properties[stem].span or limits_of(each.properties[stem].type)
            assert own_low <= raw <= own_high, name
    assert set(advert.reasons) <= set(advert.values)
    assert all(reason.has_value for reason in advert.reasons.values())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [each.name for each in FORMATS])
def test_any_bytes_give_values_of_their_types_or_an_advert_error(name: str) -> None:
    each, rng = BY_NAME[name], random.Random(SEED)
    print(f"seed {SEED}")
    key, read_some, refused = Key(bytes(16), A), 0, 0
    for run in range(RUNS):
        data = changed(rng, SEEDS[name])
        heard = heard_as(each, rng, data)
        try:
            advert = each.read(heard, key if each.encrypts and rng.random() < 0.3 else None)
            read(heard)
        except AdvertError as error:
            refused += 1
            if error.reason.has_value:
                raise AssertionError(f"run {run} of seed {SEED}: {data.hex()}: {error.reason}") from error
            continue
        except Exception as error:
            raise AssertionError(f"run {run} of seed {SEED}: {data.hex()}: {error!r}") from error
        if advert is not None:
            read_some += 1
            judge(each, advert)
    assert read_some > RUNS / 100, "the fuzz never reaches what it is to test"
    assert refused or not each.encrypts


@pytest.mark.timeout(3600)
def test_any_bytes_of_a_characteristic_give_a_value_of_its_type_or_a_reason() -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    points = [
        msgspec.convert(
            {"name": "p", "characteristic": "2a6e", "type": kind, "at": at, "order": order}, GattPoint
        )
        for kind in ValueType
        for at in (0, 1, 7)
        for order in ("little", "big")
    ]
    for _ in range(RUNS):
        point, data = rng.choice(points), rng.randbytes(rng.randrange(24))
        value, reason = decode_gatt(point, data)
        assert (value is None) == (reason is not Reason.GOOD)
        assert value is None or fits(value, point.type), (point, data)


def fits(value: Value, kind: ValueType) -> bool:
    expected: dict[ValueType, Callable[[], bool]] = {
        ValueType.BOOL: lambda: type(value) is bool,
        ValueType.STR: lambda: type(value) is str,
        ValueType.F32: lambda: type(value) is float,
        ValueType.F64: lambda: type(value) is float,
    }
    if kind in expected:
        return expected[kind]()
    low, high = limits_of(kind)
    return type(value) is int and low <= value <= high


def test_decoding_holds_on_to_nothing() -> None:
    rng = random.Random(SEED)

    def some(count: int) -> None:
        for _ in range(count):
            for each in FORMATS:
                try:
                    each.read(heard_as(each, rng, changed(rng, SEEDS[each.name])), None)
                except AdvertError:
                    continue

    some(200)
    tracemalloc.start()
    try:
        some(200)
        before, _ = tracemalloc.get_traced_memory()
        some(2000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024
