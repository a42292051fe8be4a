"""In what order a line is searched, how long that takes, and what a device says of itself. No line here."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from drivers.modbus_scan import (
    ASCII,
    COMMON,
    LAST_UNIT,
    RARE,
    Ask,
    Heard,
    Setting,
    Sweep,
    identification_pdu,
    numbers_of,
    parse_identification,
    settings_of,
    timeout_s,
    units_of,
)

TURNAROUND_S = 0.2


def sweep(*, whole: bool = False, units: range = range(1, LAST_UNIT + 1)) -> Sweep:
    return Sweep(COMMON, units, turnaround_s=TURNAROUND_S, whole=whole)


def run(search: Sweep, answers: set[tuple[Setting, int]]) -> list[Ask]:
    asked: list[Ask] = []
    while (ask := search.next()) is not None:
        asked.append(ask)
        search.told(ask, Heard.ANSWER if (ask.setting, ask.unit) in answers else Heard.SILENCE)
    return asked


def test_a_sweep_that_nobody_answers_asks_each_address_at_each_setting_once() -> None:
    asked = run(sweep(), set())
    assert len(asked) == len(COMMON) * LAST_UNIT
    assert len({(ask.setting, ask.unit) for ask in asked}) == len(asked)


def test_low_addresses_of_all_settings_come_before_any_high_one() -> None:
    asked = run(sweep(), set())
    low = len(COMMON) * 32
    assert all(ask.unit <= 32 for ask in asked[:low])
    assert all(ask.unit > 32 for ask in asked[low:])
    assert [ask.setting for ask in asked[:low:32]] == list(COMMON)


def test_after_a_find_only_its_setting_is_swept() -> None:
    where = (COMMON[2], 7)
    asked = run(sweep(), {where})
    at = next(i for i, ask in enumerate(asked) if (ask.setting, ask.unit) == where)
    assert {ask.setting for ask in asked[at:]} == {COMMON[2]}
    assert {ask.unit for ask in asked if ask.setting == COMMON[2]} == set(range(1, LAST_UNIT + 1))


def test_a_whole_sweep_goes_on_everywhere_after_a_find() -> None:
    assert len(run(sweep(whole=True), {(COMMON[0], 3)})) == len(COMMON) * LAST_UNIT


def test_what_is_left_shrinks_to_nothing_and_never_grows_without_noise() -> None:
    search = sweep()
    left = [search.left_s()]
    while (ask := search.next()) is not None:
        search.told(ask, Heard.SILENCE)
        left.append(search.left_s())
    assert left[-1] == 0
    assert all(a > b for a, b in pairwise(left))
    assert left[0] >= sum(timeout_s(setting, TURNAROUND_S) * LAST_UNIT for setting in COMMON)


def test_noise_is_asked_again_once_and_then_prefers_its_baud() -> None:
    search = sweep()
    first = search.next()
    assert first is not None
    search.told(first, Heard.NOISE)
    again = search.next()
    assert again is not None
    assert (again.setting, again.unit, again.again) == (first.setting, first.unit, True)
    search.told(again, Heard.NOISE)
    order: list[Setting] = []
    while (ask := search.next()) is not None and ask.unit <= 32:
        if ask.setting not in order:
            order.append(ask.setting)
        search.told(ask, Heard.SILENCE)
    assert order[1].baud == first.setting.baud != COMMON[1].baud


def test_a_line_that_is_all_noise_is_asked_twice_everywhere_and_ends() -> None:
    search = sweep()
    count = 0
    while (ask := search.next()) is not None:
        search.told(ask, Heard.NOISE)
        count += 1
    assert count == 2 * len(COMMON) * LAST_UNIT


def test_a_setting_that_the_port_does_not_take_is_dropped() -> None:
    search = sweep()
    search.drop(COMMON[0])
    assert COMMON[0] not in {ask.setting for ask in run(search, set())}


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_there_is_found_wherever_he_is(seed: int) -> None:
    rng = random.Random(seed)
    where = (rng.choice(COMMON), rng.randrange(1, LAST_UNIT + 1))
    assert where in {(ask.setting, ask.unit) for ask in run(sweep(), {where})}, f"seed {seed}: {where}"


def test_timeouts_follow_the_baud() -> None:
    slow, fast = timeout_s(Setting(1200, "N"), 0.1), timeout_s(Setting(115200, "N"), 0.1)
    # 15 characters of 10 bits.
    assert slow == pytest.approx(0.1 + 150 / 1200)
    assert fast == pytest.approx(0.1 + 150 / 115200)


def test_the_six_commonest_are_six_and_none_of_them_is_rare() -> None:
    assert len(COMMON) == len(set(COMMON)) == 6
    assert not set(COMMON) & set(RARE)


def test_settings_are_narrowed_by_what_the_technician_knows() -> None:
    assert settings_of([], [], None, full=False) == list(COMMON)
    assert settings_of([9600], [], None, full=False)[0] == Setting(9600, "N")
    assert {each.baud for each in settings_of([9600], [], None, full=False)} == {9600}
    assert settings_of([19200], ["E"], 1, full=False) == [Setting(19200, "E")]
    assert settings_of([14400], [], None, full=False) == [Setting(14400, "N"), Setting(14400, "E")]
    assert settings_of([14400], ["O"], 2, full=False) == [Setting(14400, "O", 2)]


def test_ranges_are_read_as_people_write_them() -> None:
    assert units_of("1-3, 7,5") == [1, 2, 3, 7, 5]
    assert units_of("0-2,255", last=255) == [0, 1, 2, 255]
    assert numbers_of("0x10-0x11", 0, 65535, "register") == [16, 17]


@pytest.mark.parametrize("text", ["0", "248", "9-3", "a", "", "1-", "1,,2"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        units_of(text)


# --- identification (application protocol 1.1b3, 6.21) ---


def test_the_standards_own_example_of_an_identification_is_read() -> None:
    """6.21: "Company identification", "Product code XX", "V2.11", in one transaction."""
    assert identification_pdu(1) == bytes.fromhex("2b0e0100")
    texts = [b"Company identification", b"Product code XX", b"V2.11"]
    objects = b"".join(bytes([i, len(text)]) + text for i, text in enumerate(texts))
    told = parse_identification(bytes([0x01, 0x00, 0x00, 0x03]) + objects)
    assert told.objects == {i: text.decode() for i, text in enumerate(texts)}
    assert told.go_on is None


def test_an_identification_in_two_transactions_says_where_to_go_on() -> None:
    told = parse_identification(bytes([0x01, 0xFF, 0x02, 0x01]) + b"\x00\x03abc")
    assert told.go_on == 2


def test_no_identification_makes_the_parser_raise() -> None:
    rng = random.Random(4)
    for _ in range(5000):
        raw = rng.randbytes(rng.randrange(0, 40))
        told = parse_identification(raw)
        assert all(text.isprintable() for text in told.objects.values())


def test_an_empty_reply_that_says_more_follows_is_not_followed() -> None:
    assert parse_identification(bytes([1, 0xFF, 0, 0])).go_on is None


def test_ascii_is_searched_where_it_is_asked_for_or_everything_is_at_seven_bits_first() -> None:
    assert all(setting.framing == "rtu" for setting in settings_of([], [], None, full=False))
    assert str(settings_of([], [], None, full=False, framing="ascii")[0]) == "9600 7E1 ascii"
    assert settings_of([], [], None, full=True)[-len(ASCII) :] == list(ASCII)
    assert all(setting.framing == "rtu" for setting in settings_of([], [], None, full=True, framing="rtu"))
    assert str(settings_of([14400], ["E"], None, full=False, framing="ascii")[0]) == "14400 7E1 ascii"


def test_a_request_in_ascii_takes_more_than_twice_the_characters() -> None:
    binary, text = Setting(9600, "N"), Setting(9600, "E", 1, 7, "ascii")
    assert binary.character_s == text.character_s
    assert timeout_s(text, 0) == pytest.approx(timeout_s(binary, 0) * 32 / 15)
