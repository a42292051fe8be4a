"""Which registers a device has: found by asking, around holes, with nothing asked twice."""

from __future__ import annotations

import random

import pytest

from drivers.modbus_hunt import Ask, Hunt, Outcome, Reader
from drivers.modbus_plan import Table

H = Table.HOLDING


def answer(registers: dict[int, int], ask: Ask, *, longest: int = 125) -> list[int] | Outcome:
    found = [registers.get(address) for address in range(ask.first, ask.end)]
    if None in found or ask.count > longest:
        return Outcome.REFUSED
    return [word or 0 for word in found]


def read(reader: Reader, registers: dict[int, int], *, longest: int = 125) -> int:
    asked = 0
    while (ask := reader.next()) is not None:
        asked += 1
        reader.told(ask, answer(registers, ask, longest=longest))
    return asked


# --- a range ---


def test_a_range_without_holes_is_read_in_the_fewest_requests() -> None:
    reader = Reader([Ask(H, 0, 250)])
    assert read(reader, dict.fromkeys(range(250), 7)) == 2
    assert len(reader.words[H]) == 250


@pytest.mark.parametrize("seed", range(20))
def test_every_register_around_any_holes_is_read(seed: int) -> None:
    rng = random.Random(seed)
    registers = {address: rng.randrange(65536) for address in range(200) if rng.random() < 0.7}
    reader = Reader([Ask(H, 0, 200)])
    read(reader, registers, longest=rng.choice((125, 40, 8)))
    assert reader.words.get(H, {}) == registers, f"seed {seed}"
    assert reader.holes.get(H, set()) == set(range(200)) - registers.keys()


def test_a_device_that_refuses_half_a_32_bit_value_is_read_in_pairs() -> None:
    registers = dict.fromkeys([*range(6), *range(10, 16)], 1)

    def strict(ask: Ask) -> list[int] | Outcome:
        return Outcome.REFUSED if ask.first % 2 or ask.count % 2 else answer(registers, ask)

    reader = Reader([Ask(H, 0, 20)])
    while (ask := reader.next()) is not None:
        reader.told(ask, strict(ask))
    assert reader.words[H].keys() == registers.keys()


def test_a_table_that_the_device_does_not_know_is_asked_once() -> None:
    reader = Reader([Ask(H, 0, 500), Ask(Table.INPUT, 0, 10)])
    asked: list[Ask] = []
    while (ask := reader.next()) is not None:
        asked.append(ask)
        reader.told(ask, Outcome.NO_FUNCTION if ask.table is H else [0] * ask.count)
    assert [ask.table for ask in asked] == [H, Table.INPUT]


def test_registers_of_a_device_that_is_silent_about_holes_are_read_around_them() -> None:
    registers = {at: at for at in range(100) if at not in (3, 50, 51, 90)}
    reader = Reader([Ask(H, 0, 100)])
    while (ask := reader.next()) is not None:
        came = answer(registers, ask)
        reader.told(ask, Outcome.SILENCE if came is Outcome.REFUSED else came)
    assert reader.words[H] == registers
    assert reader.silent[H] == {3, 50, 51, 90}
    assert not reader.holes


def test_a_device_that_has_gone_silent_is_not_asked_for_every_register() -> None:
    reader = Reader([Ask(H, 0, 1000)])
    asked = 0
    while (ask := reader.next()) is not None:
        asked += 1
        reader.told(ask, Outcome.SILENCE)
    assert asked < 100


# --- the whole device ---


def random_map(rng: random.Random) -> dict[int, int]:
    at = rng.randrange(0, 65000)
    registers: dict[int, int] = {}
    for _ in range(rng.randrange(8, 25)):
        at += rng.randrange(1, 8) if rng.random() < 0.25 else 0
        for _ in range(rng.choice((1, 2, 2, 4))):
            registers[at] = rng.randrange(65536)
            at += 1
    return registers


@pytest.mark.parametrize("seed", range(25))
def test_a_map_at_any_base_is_found_whole(seed: int) -> None:
    rng = random.Random(seed)
    table = rng.choice((H, Table.INPUT))
    registers = random_map(rng)
    hunt = Hunt([H, Table.INPUT])
    asked: set[Ask] = set()
    while (ask := hunt.next()) is not None:
        assert ask not in asked, f"seed {seed}: {ask} twice"
        asked.add(ask)
        hunt.told(ask, answer(registers, ask, longest=60) if ask.table is table else Outcome.REFUSED)
        if len(hunt.words[table]) == len(registers) and not hunt.following:
            break
    assert hunt.words[table] == registers, f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_a_map_is_found_whole_although_the_device_is_silent_where_it_has_none(seed: int) -> None:
    rng = random.Random(seed)
    registers = random_map(rng)
    hunt = Hunt([H])
    while (ask := hunt.next()) is not None:
        came = answer(registers, ask, longest=60)
        hunt.told(ask, Outcome.SILENCE if came is Outcome.REFUSED else came)
        if len(hunt.words[H]) == len(registers) and not hunt.following:
            break
    assert hunt.words[H] == registers, f"seed {seed}"


def test_low_addresses_are_found_soon() -> None:
    registers = dict.fromkeys(range(1724, 1740), 5)
    hunt = Hunt([H, Table.INPUT])
    while (ask := hunt.next()) is not None and len(hunt.words[H]) < 16:
        hunt.told(ask, answer(registers, ask) if ask.table is H else Outcome.REFUSED)
    assert hunt.asked < 1200


def test_zeros_everywhere_are_not_followed_to_the_end_of_the_world() -> None:
    """A device that answers 0 for what it does not have: its map is still found, among few requests."""
    hunt = Hunt([H])
    registers = {address: address % 97 for address in range(30000, 30080)}
    while (ask := hunt.next()) is not None and not registers.keys() <= hunt.words[H].keys():
        hunt.told(ask, [registers.get(address, 0) for address in range(ask.first, ask.end)])
    assert hunt.asked < 300


def test_a_device_full_of_registers_is_read_in_long_requests() -> None:
    hunt = Hunt([H])
    rng = random.Random(3)
    while (ask := hunt.next()) is not None:
        hunt.told(ask, [rng.randrange(1, 999) for _ in range(ask.count)])
    assert len(hunt.words[H]) == 65536
    assert hunt.asked < 700


def test_a_device_that_refuses_single_registers_is_found_in_pairs() -> None:
    registers = dict.fromkeys(range(4096, 4120), 3)

    def pairs_only(ask: Ask) -> list[int] | Outcome:
        return Outcome.REFUSED if ask.first % 2 or ask.count % 2 else answer(registers, ask)

    hunt = Hunt([H], finest_step=256)
    while (ask := hunt.next()) is not None:
        hunt.told(ask, pairs_only(ask))
    assert hunt.words[H].keys() == registers.keys()


def test_a_device_with_nothing_ends_the_hunt() -> None:
    hunt = Hunt([H], finest_step=64)
    while (ask := hunt.next()) is not None:
        hunt.told(ask, Outcome.REFUSED)
    assert not hunt.words[H]
    assert hunt.asked < 70_000


def test_unknown_functions_end_it_at_once() -> None:
    hunt = Hunt([H, Table.INPUT])
    count = 0
    while (ask := hunt.next()) is not None:
        count += 1
        hunt.told(ask, Outcome.NO_FUNCTION)
    assert count == 2
