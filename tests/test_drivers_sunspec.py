"""SunSpec: the walk, the layout, and what the real driver reads from a device that a SunSpec walk laid out.

The device is words written by hand from the published information models 1, 103, 113 and 160 and the rules of the
SunSpec Device Information Model Specification (marker, model headers, end marker, scale factors as powers of ten, a
value for "not implemented" in each type).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

import pytest

from drivers import registry, sunspec
from drivers.contract import Reason, engineering
from drivers.modbus import ModbusDriver
from tests.fakes.modbus_peer import Unit, tcp_peer

NI_U16, NI_I16 = 0xFFFF, 0x8000


def text(value: str, registers: int) -> list[int]:
    data = value.encode().ljust(2 * registers, b"\0")
    return list(struct.unpack(f">{registers}H", data))


def common(maker: str = "Acme Solar", model: str = "X-5000", pad: bool = True) -> list[int]:
    words = [*text(maker, 16), *text(model, 16), *text("opt", 8), *text("1.2.3", 8), *text("SN-0815", 16), 1]
    words += [0x8000] * pad
    return [1, len(words), *words]


def i16(value: int) -> int:
    return value & 0xFFFF


#: Model 103 (three-phase inverter, integer with scale factors), in the order of its definition.
INVERTER = [
    103, 50,
    1234, 411, 412, NI_U16, i16(-2),  # A, AphA, AphB, AphC (not implemented), A_SF
    4000, 4001, 4002, 2302, 2303, 2304, i16(-1),  # PPVphAB, BC, CA, PhVphA, B, C, V_SF
    i16(-150), 1,  # W, W_SF
    4998, i16(-2),  # Hz, Hz_SF
    850, 1, i16(-20), 1,  # VA, VA_SF, VAr, VAr_SF
    i16(-995), i16(-3),  # PF, PF_SF
    0x0012, 0xD687, 0,  # WH (1 234 567), WH_SF
    NI_U16, NI_I16,  # DCA and its scale factor: not implemented
    6500, i16(-1), 155, 1,  # DCV, DCV_SF, DCW, DCW_SF
    i16(-55), NI_I16, NI_I16, NI_I16, i16(-1),  # TmpCab, TmpSnk, TmpTrns, TmpOt, Tmp_SF
    4, NI_U16,  # St (MPPT), StVnd
    0, 0x0002, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0, 0, 0, 0,  # Evt1, Evt2, EvtVnd1..4
]  # fmt: skip

#: Model 160 (several trackers): eight fixed registers, then twenty for each of two modules.
TRACKERS = [
    160, 48,
    i16(-2), i16(-1), 1, 0, 0, 0, 2, NI_U16,  # DCA_SF, DCV_SF, DCW_SF, DCWH_SF, Evt, N, TmsPer
    1, *text("roof", 8), 456, 3201, 146, 0, 1000, 0, 77, 25, 4, 0, 0,
    2, *text("wall", 8), NI_U16, 2905, 81, 0, 0, 0, 77, NI_I16, 4, 0, 0,
]  # fmt: skip

UNKNOWN = [64999, 3, 7, 8, 9]
END = [0xFFFF, 0]
MARKER = [0x5375, 0x6E53]


class Registers:
    """What a device has, and what it was asked for."""

    def __init__(self, at: int, words: Sequence[int]) -> None:
        self.words = dict(enumerate(words, at))
        self.asked: list[tuple[int, int]] = []

    async def ask(self, register: int, count: int) -> list[int] | None:
        return self.answer(register, count)

    def answer(self, register: int, count: int) -> list[int] | None:
        self.asked.append((register, count))
        wanted = range(register, register + count)
        return [self.words[at] for at in wanted] if all(at in self.words for at in wanted) else None

    def walk(self, bases: Sequence[int] = sunspec.BASES) -> sunspec.Device | None:
        steps = sunspec.walk(bases)
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send(self.answer(wanted.register, wanted.count))
        except StopIteration as end:
            device: sunspec.Device | None = end.value
        return device


WHOLE = [*MARKER, *common(), *INVERTER, *TRACKERS, *UNKNOWN, *END]


def walked(words: Sequence[int], at: int = 40000) -> sunspec.Device:
    device = Registers(at, words).walk()
    assert device is not None
    return device


# ------------------------------------------------------------------------------------------- the walk


@pytest.mark.parametrize("base", sunspec.BASES)
def test_a_device_is_found_at_each_of_the_three_bases_with_its_models(base: int) -> None:
    registers = Registers(base, WHOLE)
    device = registers.walk()
    assert device is not None
    assert (device.base, device.ended) == (base, "")
    assert [(model.id, model.register - base, model.length) for model in device.models] == [
        (1, 2, 66), (103, 70, 50), (160, 122, 48), (64999, 172, 3),
    ]  # fmt: skip
    assert (device.maker, device.model, device.text("SN"), device.text("Vr")) == (
        "Acme Solar", "X-5000", "SN-0815", "1.2.3",
    )  # fmt: skip


def test_nothing_is_asked_that_the_device_does_not_have() -> None:
    registers = Registers(40000, WHOLE)
    registers.walk()
    assert all(at >= 40000 and at + count <= 40000 + len(WHOLE) for at, count in registers.asked)
    assert all(count <= 125 for _, count in registers.asked)
    assert not [1 for at, count in registers.asked if at <= 40174 < at + count and count > 2], (
        "not read: unknown"
    )


async def test_the_walk_over_a_line_is_the_same_walk() -> None:
    registers = Registers(50000, WHOLE)
    device = await sunspec.discover(registers.ask)
    assert device is not None
    assert device.base == 50000
    assert len(device.models) == 4


def test_no_marker_is_no_device() -> None:
    assert Registers(40000, [1, 2, 3]).walk() is None
    assert Registers(7, []).walk() is None


def test_a_common_model_without_its_pad_is_read_too() -> None:
    device = walked([*MARKER, *common(pad=False), *INVERTER, *END])
    assert [model.id for model in device.models] == [1, 103]
    assert device.maker == "Acme Solar"


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        ([], "refused"),
        ([103], "refused"),
        ([0, 0], "is none"),
        ([500, 0], "is none"),
        ([103, 60000], "goes beyond"),
        ([0xFFFF], ""),
    ],
)
def test_a_device_that_breaks_off_gives_what_came_before_and_says_why(tail: list[int], why: str) -> None:
    device = walked([*MARKER, *common(), *INVERTER, *tail])
    assert [model.id for model in device.models] == [1, 103]
    assert why in device.ended
    assert bool(why) == bool(device.ended)


def test_a_device_of_one_word_models_for_ever_ends() -> None:
    words = [*MARKER, *[64999, 1, 0] * 21000]
    device = walked(words, at=0)
    assert "more than" in device.ended


def test_a_model_that_is_refused_is_passed_over_and_said() -> None:
    registers = Registers(40000, WHOLE)
    del registers.words[40000 + 130]  # inside model 160
    device = registers.walk()
    assert device is not None
    assert [model.id for model in device.models] == [1, 103, 160, 64999]
    laid = sunspec.layout(device)
    assert not [point for point in laid.points if point["name"].startswith("m160")]
    assert any("model 160" in line and "refused" in line for line in laid.left_out)


def test_a_device_that_takes_short_requests_only_is_laid_out_all_the_same() -> None:
    registers = Registers(40000, WHOLE)
    whole = registers.answer

    def short(register: int, count: int) -> list[int] | None:
        return whole(register, count) if count <= 40 else None

    registers.answer = short  # type: ignore[method-assign]
    device = registers.walk()
    assert device is not None
    assert sunspec.layout(device) == sunspec.layout(walked(WHOLE))


@pytest.mark.parametrize("seed", range(200))
def test_whatever_a_device_answers_the_walk_and_the_layout_end(seed: int) -> None:
    chance = random.Random(seed)
    words = list(WHOLE)
    for _ in range(chance.randrange(1, 12)):
        words[chance.randrange(2, len(words))] = chance.choice(
            [0, 1, 2, 0xFFFF, 0x8000, chance.randrange(65536)]
        )
    device = Registers(40000, words).walk()
    assert device is not None
    laid = sunspec.layout(device)
    for point in laid.points:
        assert 40002 <= point["register"] < 40000 + len(words), f"seed {seed}"
    sunspec.found(device, "somewhere", {})


@pytest.mark.parametrize("model", [103, 160, 705, 714, 803])
def test_a_model_that_claims_all_registers_there_are_is_walked_and_laid_out_in_a_moment(model: int) -> None:
    head = [*MARKER, *common()]
    length = 0x10000 - len(head) - 4
    device = walked([*head, model, length, *[1] * length, *END], at=0)
    assert device.models[-1].length == length
    assert sunspec.layout(device, {model}).points


@pytest.mark.parametrize(
    ("model", "count", "value"),
    [
        (601, 3, range(116, 124)),  # the text Id of the fifth tracker: 26 fixed registers, 22 for each
        (709, 3, range(119, 121)),  # Tms of the third curve, which is there because NCrvSet says 3
    ],
)
@pytest.mark.parametrize("most", [125, 60, 119])
def test_no_request_of_a_walk_splits_a_value(model: int, count: int, value: range, most: int) -> None:
    registers = Registers(0, [*MARKER, *common(), model, 300, *[count] * 300, *END])
    whole = registers.answer

    def short(register: int, count: int) -> list[int] | None:
        return whole(register, count) if count <= most else None

    registers.answer = short  # type: ignore[method-assign]
    device = registers.walk()
    assert device is not None
    assert len(device.models[-1].words) == 302
    begin = device.models[-1].register
    ends = {at + many - begin for at, many in registers.asked if many <= most}
    assert not ends & set(range(value.start + 1, value.stop))


def test_a_model_that_ends_early_keeps_the_points_whose_scale_factor_it_still_has() -> None:
    short = [103, 5, *INVERTER[2:7]]  # A, AphA, AphB, AphC, A_SF, and no more
    laid = sunspec.layout(walked([*MARKER, *common(), *short, *END]))
    assert "m103_A" in [point["name"] for point in laid.points]


def test_what_would_steer_a_terminal_is_no_name() -> None:
    device = walked([*MARKER, *common("\x1b[2JAcme\x07"), *END])
    assert device.maker == "\N{REPLACEMENT CHARACTER}[2JAcme\N{REPLACEMENT CHARACTER}"
    found = sunspec.found(device, "somewhere", {})
    assert (found.description + "".join(found.readings.values())).isprintable()


# ------------------------------------------------------------------------------------------- the layout


def by_name(laid: sunspec.Layout) -> dict[str, dict[str, object]]:
    return {point["name"]: point for point in laid.points}


def test_a_number_with_a_scale_factor_names_the_register_of_its_exponent() -> None:
    points = by_name(sunspec.layout(walked(WHOLE)))
    assert points["m103_PhVphA"] == {
        "name": "m103_PhVphA", "register": 40080, "unit": "V", "type": "f64", "encoding": "u16",
        "scale_register": 40083, "not_available": [0xFFFF],
    }  # fmt: skip
    assert points["m103_W"]["encoding"] == "i16"
    assert points["m103_W"]["not_available"] == [-0x8000]
    assert points["m103_WH"]["encoding"] == "u32"
    assert points["m103_WH"]["not_available"] == [0]
    assert points["m103_St"] == {
        "name": "m103_St", "register": 40108, "type": "u16", "not_available": [0xFFFF],
    }  # fmt: skip
    assert points["m1_SN"] == {"name": "m1_SN", "register": 40052, "type": "str", "length": 32}


def test_a_value_whose_scale_factor_is_not_implemented_is_left_out_and_said() -> None:
    laid = sunspec.layout(walked(WHOLE))
    assert "m103_DCA" not in by_name(laid)
    assert any("m103_DCA" in line and "does not implement" in line for line in laid.left_out)


def test_repeated_groups_are_numbered_and_share_the_scale_factors_before_them() -> None:
    points = by_name(sunspec.layout(walked(WHOLE)))
    assert points["m160_module1_DCA"]["register"] == 40141
    assert points["m160_module2_DCA"]["register"] == 40161
    assert points["m160_module2_DCA"]["scale_register"] == 40124
    assert "m160_module3_DCA" not in points


def test_what_is_unknown_or_a_setting_is_reported_by_id_and_length() -> None:
    settings = [126, 226, *[0] * 226]
    device = walked([*MARKER, *common(), *settings, *UNKNOWN, *END])
    left = sunspec.layout(device).left_out
    assert any("model 64999 at 40298: not a published model (3 registers)" in line for line in left)
    assert any("model 126 at 40070: settings" in line for line in left)
    assert any(point["name"].startswith("m126_") for point in sunspec.layout(device, {126}).points)


def test_two_models_of_one_id_have_names_of_their_own() -> None:
    device = walked([*MARKER, *common(), *INVERTER, *INVERTER, *END])
    names = [point["name"] for point in sunspec.layout(device).points]
    assert len(names) == len(set(names))
    assert {"m103_W", "m103b_W"} <= set(names)


def test_a_repeat_that_a_point_counts_follows_that_point() -> None:
    # Model 714: a fixed part of 20 registers with NPrt in it, then 25 for each port.
    fixed = [0, 0, 2, *[0] * 15]
    port = [1, 2, *text("PV", 8), 10, 20, 30, *[0] * 12]
    words = [714, len(fixed) + 2 * len(port), *fixed, *port, *port]
    names = [point["name"] for point in sunspec.layout(walked([*MARKER, *common(), *words, *END])).points]
    assert any(name.startswith("m714_Prt2_") for name in names)
    assert not any(name.startswith("m714_Prt3_") for name in names)


@pytest.mark.parametrize("model", sorted(sunspec.MEASURING))
def test_every_model_that_is_laid_out_by_itself_is_published_and_makes_points_a_driver_takes(
    model: int,
) -> None:
    known = sunspec.definition(model)
    assert known is not None
    length = sunspec._size(known.group) - 2 + 60
    words = [model, length, *[1] * length]
    device = walked([*MARKER, *words, *END])
    laid = sunspec.layout(device)
    assert laid.points
    registry.build("device", "modbus", {"host": "192.0.2.1"}, list(laid.points))


# ------------------------------------------------------------------------------------------- what is read


def values() -> Iterator[tuple[str, float | str | Reason]]:
    """By the specification: value times ten to the scale factor; "not implemented" is no value."""
    told: dict[str, float | str | Reason] = {
        "m1_Mn": "Acme Solar", "m1_SN": "SN-0815",
        "m103_A": 12.34, "m103_AphA": 4.11, "m103_AphC": Reason.SENTINEL,
        "m103_PPVphAB": 400.0, "m103_PhVphA": 230.2, "m103_W": -1500.0, "m103_Hz": 49.98, "m103_VA": 8500.0,
        "m103_VAr": -200.0, "m103_PF": -0.995, "m103_WH": 1234567.0, "m103_DCV": 650.0, "m103_DCW": 1550.0,
        "m103_TmpCab": -5.5, "m103_TmpSnk": Reason.SENTINEL, "m103_St": 4.0, "m103_Evt1": 2.0,
        "m160_module1_IDStr": "roof", "m160_module1_DCA": 4.56, "m160_module1_DCV": 320.1,
        "m160_module1_DCW": 1460.0, "m160_module1_DCWH": 1000.0, "m160_module1_Tmp": 25.0,
        "m160_module2_DCA": Reason.SENTINEL, "m160_module2_DCV": 290.5,
    }  # fmt: skip
    yield from told.items()


async def test_the_driver_reads_a_device_as_it_was_laid_out() -> None:
    laid = sunspec.layout(walked(WHOLE))
    unit = Unit(holding=[0] * 40000 + WHOLE + [0] * 100)
    async with tcp_peer({1: unit}) as peer:
        driver = registry.build("pv", "modbus", {"host": "127.0.0.1", "port": peer.port}, list(laid.points))
        assert isinstance(driver, ModbusDriver)
        await driver.connect()
        try:
            scan = await driver.read(driver.points)
        finally:
            await driver.close()
        assert len(peer.asked) <= 3
    seen: dict[str, object] = {}
    for i, point in enumerate(scan.points):
        value, reason = scan.values[i], scan.reasons.get(i, Reason.GOOD)
        if value is None or reason is not Reason.GOOD:
            seen[point.name] = reason
        elif value in point.not_available:
            seen[point.name] = Reason.SENTINEL  # the agent's validation says so of a plain number
        else:
            seen[point.name] = (
                value if isinstance(value, str) else engineering(value, point.scale, point.offset)
            )
    for name, expected in values():
        wanted = pytest.approx(expected) if isinstance(expected, float) else expected
        assert seen[name] == wanted, name


def test_a_scan_shows_what_the_walk_has_read() -> None:
    found = sunspec.found(walked(WHOLE), "192.0.2.7:502 unit 126", {"host": "192.0.2.7", "unit": 126})
    assert found.description == "Acme Solar X-5000: SunSpec models 103, 160, 64999?"
    assert found.driver == "modbus"
    assert found.options == {"host": "192.0.2.7", "unit": 126}
    assert found.readings["m103_W"] == "-1500 W"
    assert found.readings["m103_PhVphA"] == "230.2 V"
    assert found.readings["m160_module1_DCV"] == "320.1 V"
    assert found.readings["m1_SN"] == "SN-0815"
    assert "m103_AphC" not in found.readings
    assert "m103_TmpSnk" not in found.readings


def test_a_float_inverter_of_fronius_proposes_its_profile() -> None:
    float_inverter = [113, 60, *[0] * 60]
    device = walked([*MARKER, *common("Fronius", "Symo 8.2-3-M"), *float_inverter, *END])
    assert sunspec.found(device, "somewhere", {}).profile == "fronius-symo"
