"""What registers could mean: every decoding agrees with the driver's own, and a value off a display is found."""

from __future__ import annotations

import math
import random
import struct

import pytest

from drivers import codec
from drivers.contract import ValueType
from drivers.modbus_guess import (
    KINDS,
    Expected,
    Guess,
    Kind,
    Match,
    Observation,
    Text,
    decode,
    guesses,
    is_sure,
    layout,
    match,
    match_all,
    moving,
    orders_of,
    parse_expected,
    point_table,
    texts,
)
from drivers.modbus_plan import Table

SEED = 20240611


def words_of(value: float, kind: Kind, order: str) -> list[int]:
    """By the driver's encoder: what the device would hold."""
    raw = codec.encode(value, codec.Field(at=0, type=ValueType(kind.value), order=order))
    return list(struct.unpack(f">{len(raw) // 2}H", raw))


def holding(words: dict[int, int]) -> list[dict[Table, dict[int, int]]]:
    return [{Table.HOLDING: words}]


def found(text: str, words: dict[int, int]) -> list[Match]:
    return match([Observation(parse_expected(text), holding(words))])


# --- decoding ---


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.value.startswith("bcd")])
def test_every_decoding_is_what_the_driver_would_read(kind: Kind) -> None:
    rng = random.Random(SEED)
    run = [rng.randrange(65536) for _ in range(40)]
    data = struct.pack(f">{len(run)}H", *run)
    for order in orders_of(kind):
        for start, value in enumerate(decode(run, kind, order)):
            field = codec.Field(at=2 * start, type=ValueType(kind.value), order=order)
            values, _ = codec.RegisterDecoder([field]).decode(data)
            assert value == values[0], (kind, order, start)


def test_bcd_is_its_decimal_digits_and_nothing_where_a_digit_is_none() -> None:
    assert decode([0x2305, 0x1A00], Kind.BCD16, "ABCD") == [2305, None]
    assert decode([0x0012, 0x3456], Kind.BCD32, "ABCD") == [123456]
    assert decode([0x3456, 0x0012], Kind.BCD32, "CDAB") == [123456]


def test_a_float_that_is_no_number_is_no_decoding() -> None:
    assert decode([0x7FC0, 0], Kind.F32, "ABCD") == [None]
    assert decode([0x7F80, 0], Kind.F32, "ABCD") == [None]


def test_a_run_shorter_than_its_type_decodes_to_nothing() -> None:
    assert decode([1], Kind.F32, "ABCD") == []


# --- what is believable ---


def test_floats_among_small_numbers_are_laid_out_where_they_stand() -> None:
    words = dict(
        enumerate([7, 1, *words_of(230.5, Kind.F32, "CDAB"), *words_of(49.98, Kind.F32, "CDAB"), 3], 100)
    )
    floats = {
        one.register: one.value
        for one in layout(words)
        if isinstance(one, Guess) and one.kind is Kind.F32 and one.order == "CDAB"
    }
    assert sorted(floats) == [102, 104]
    assert floats[104] == pytest.approx(49.98)


def test_text_is_found_in_either_byte_order_and_laid_out_as_text() -> None:
    plain = dict(enumerate(struct.unpack(">4H", b"SDM630 \0")))
    swapped = dict(enumerate(struct.unpack("<4H", b"SDM630 \0"), 50))
    assert [(t.register, t.text, t.swapped) for t in texts(plain)] == [(0, "SDM630", False)]
    assert [(t.register, t.text, t.swapped) for t in texts(swapped)] == [(50, "SDM630", True)]
    assert any(isinstance(one, Text) for one in layout(plain))


def test_a_layout_never_uses_a_register_twice() -> None:
    rng = random.Random(SEED)
    for _ in range(30):
        words = {
            address: rng.choice((0, 1, rng.randrange(500), rng.randrange(65536)))
            for address in range(200)
            if rng.random() < 0.8
        }
        used: set[int] = set()
        for one in layout(words):
            size = one.registers if isinstance(one, Text) else one.kind.registers
            here = set(range(one.register, one.register + size))
            assert not here & used
            assert here <= words.keys()
            used |= here


def test_likelihoods_are_between_0_and_1() -> None:
    rng = random.Random(SEED)
    words = {address: rng.randrange(65536) for address in range(64)}
    assert all(0.0 <= one.likely <= 1.0 for one in guesses(words))


def test_mains_voltage_in_tenths_says_what_it_looks_like() -> None:
    notes = {one.note for one in guesses({0: 2304}) if one.kind is Kind.U16 and one.order == "ABCD"}
    assert notes == {"mains voltage, V (× 0.1)"}


def test_what_moves_is_told_by_table_and_address() -> None:
    before = {Table.HOLDING: {1: 5, 2: 6}, Table.INPUT: {1: 5}}
    after = {Table.HOLDING: {1: 5, 2: 7}, Table.INPUT: {1: 4}}
    assert moving([before, after, before]) == {(Table.HOLDING, 2), (Table.INPUT, 1)}
    assert moving([]) == set()


# --- off the display ---


@pytest.mark.parametrize(
    ("text", "name", "value", "decimals", "unit"),
    [
        ("230.5", "", 230.5, 1, ""),
        ("voltage=230.5 V", "voltage", 230.5, 1, "V"),
        ("t = -4,25 Cel", "t", -4.25, 2, "Cel"),
        ("12345", "", 12345.0, 0, ""),
        ("+0.50kWh", "", 0.5, 2, "kWh"),
    ],
)
def test_a_displayed_value_is_read_with_its_digits(
    text: str, name: str, value: float, decimals: int, unit: str
) -> None:
    one = parse_expected(text)
    assert (one.name, one.value, one.decimals, one.unit) == (name, value, decimals, unit)


@pytest.mark.parametrize("text", ["", "V", "voltage=", "1.2.3", "=5", "1e5x="])
def test_what_is_no_displayed_value_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"230\.5"):
        parse_expected(text)


@pytest.mark.parametrize("kind", [Kind.U16, Kind.I16, Kind.U32, Kind.I32, Kind.I64, Kind.F32, Kind.F64])
@pytest.mark.parametrize("order", ["ABCD", "CDAB", "BADC", "DCBA"])
def test_the_place_of_a_value_comes_first_among_random_registers(kind: Kind, order: str) -> None:
    """Of many maps, most: registers that hold the same value by chance exist."""
    rng = random.Random(f"{SEED} {kind} {order}")
    first = 0
    for _ in range(25):
        words = {at: rng.choice((0, 1, rng.randrange(999), rng.randrange(65536))) for at in range(60)}
        value = round(rng.uniform(100, 3000), 1)
        scale = 1.0 if kind.is_float else 0.1
        at = rng.randrange(50)
        held = words_of(value if kind.is_float else round(value / scale), kind, order)
        words.update(zip(range(at, at + len(held)), held, strict=True))
        best = found(f"{value:.1f}", words)[0]
        shows = (
            best.exact
            and at <= best.register + best.kind.registers - 1
            and best.register <= at + len(held) - 1
        )
        first += shows and math.isclose(best.value, value, abs_tol=0.051)
    assert first >= 23, f"seed {SEED}: {first} of 25"


def test_a_value_with_more_digits_in_the_register_than_on_the_display_is_exact() -> None:
    words = dict(enumerate(words_of(230484, Kind.U32, "ABCD"), 10))
    best = found("230.5", words)[0]
    assert (best.register, best.kind, best.scale, best.exact) == (10, Kind.U32, 0.001, True)


def test_a_display_that_cuts_off_instead_of_rounding_is_found_near() -> None:
    best = found("230.4", dict(enumerate(words_of(230.49, Kind.F32, "ABCD"), 10)))[0]
    assert best.register == 10
    assert not best.exact
    assert best.off == pytest.approx(0.09, abs=0.001)


def test_a_value_that_moves_through_the_displayed_one_is_exact() -> None:
    """The display was read while it moved: what the register held before and after tells."""
    seen = [{Table.HOLDING: {5: raw, 6: 2400}} for raw in (2290, 2301, 2308, 2312)]
    best = match([Observation(parse_expected("230.5"), seen)])[0]
    assert (best.register, best.moves, best.exact) == (5, True, True)


def test_reading_the_display_again_leaves_the_place_that_follows_it() -> None:
    """Two registers hold the same now; only one of them holds what the display shows a minute later."""
    now = [{Table.HOLDING: {5: 2305, 90: 2305}}]
    later = [{Table.HOLDING: {5: 2290, 90: 2305}}]
    both = match([Observation(parse_expected("230.5"), now)])
    assert {one.register for one in both if one.exact} == {5, 90}
    assert not is_sure(both)
    one = match([Observation(parse_expected("230.5"), now), Observation(parse_expected("229.0"), later)])
    assert one[0].register == 5
    assert is_sure(one)


def test_a_value_of_few_digits_is_never_sure() -> None:
    assert not is_sure(found("5", {at: 5 if at == 7 else 0 for at in range(20)}))
    assert not is_sure(found("0", dict.fromkeys(range(20), 0)))


def test_nothing_that_shows_it_is_no_match() -> None:
    assert found("230.5", dict.fromkeys(range(50), 7)) == []
    assert match([Observation(parse_expected("230.5"), [])]) == []


def test_several_values_of_one_display_settle_its_width_and_order() -> None:
    """Each alone could be 16 bits wide; together, with a counter beyond 16 bits, they are not."""
    words: dict[int, int] = {}
    for at, raw in ((0, 2305), (2, 412), (4, 1234567), (6, 4998)):
        words.update(zip((at, at + 1), words_of(raw, Kind.U32, "CDAB"), strict=True))
    wanted = {"u": "230.5", "i": "4.12", "e": "123456.7", "f": "49.98"}
    seen = match_all(
        {name: [Observation(parse_expected(text), holding(words))] for name, text in wanted.items()}
    )
    places = {name: (one[0].register, one[0].kind.registers, one[0].order) for name, one in seen.items()}
    assert places == {"u": (0, 2, "CDAB"), "i": (2, 2, "CDAB"), "e": (4, 2, "CDAB"), "f": (6, 2, "CDAB")}


def test_a_negative_value_is_found_signed() -> None:
    best = found("-12.5", {3: 65536 - 125, 4: 9})[0]
    assert (best.register, best.kind, best.scale) == (3, Kind.I16, 0.1)


def test_a_match_becomes_a_point_that_says_only_what_is_not_the_default() -> None:
    one = Match(Table.INPUT, 7, Kind.F32, "CDAB", 1.0, 230.5, 230.5, 0.0, 4.0, moves=False)
    assert point_table("u", "V", one) == {
        "name": "u", "register": 7, "type": "f32", "table": "input", "order": "CDAB", "unit": "V",
    }  # fmt: skip
    plain = Match(Table.HOLDING, 7, Kind.BCD16, "ABCD", 0.1, 2305, 230.5, 0.0, 4.0, moves=False)
    assert point_table("u", "", plain) == {
        "name": "u", "register": 7, "type": "u16", "encoding": "bcd", "scale": 0.1,
    }  # fmt: skip


def test_expected_digits_are_counted_from_the_step() -> None:
    assert Expected("x", 1.0, 0.001).decimals == 3


@pytest.mark.parametrize(
    ("shown", "words", "kind", "scale"),
    [
        ("20.5 Cel", [2937], Kind.U16, 0.1),  # 293.7 K is 20.55 Cel
        ("-12.25 °C", [26090], Kind.U16, 0.01),
        ("21.37 C", list(struct.unpack(">2H", struct.pack(">f", 294.52))), Kind.F32, 1.0),
    ],
)
def test_a_temperature_in_celsius_may_be_held_in_kelvin(
    shown: str, words: list[int], kind: Kind, scale: float
) -> None:
    expected = parse_expected(shown)
    held = dict(enumerate([0, 0, 7, *words, 12, 0]))
    best = match([Observation(expected, [{Table.HOLDING: held}])])[0]
    assert (best.register, best.kind, best.scale, best.offset) == (3, kind, scale, -273.15)
    assert abs(best.value - expected.value) <= expected.step / 2 * 1.001
    assert point_table("t", "Cel", best)["offset"] == -273.15


def test_nothing_but_a_temperature_is_looked_for_in_kelvin() -> None:
    held = {Table.HOLDING: {0: 2937}}
    assert all(one.offset == 0 for one in match([Observation(parse_expected("20.5 V"), [held])]))
    assert all(one.offset == 0 for one in match([Observation(parse_expected("20.5"), [held])]))
    plain = match([Observation(parse_expected("20.5 Cel"), [{Table.HOLDING: {0: 205, 1: 2937}}])])
    assert (plain[0].register, plain[0].offset) == (0, 0.0), "Celsius is likelier"
