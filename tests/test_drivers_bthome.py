"""BTHome v2: every example of the published page, and that no bytes at all make the decoder do anything else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drivers.advert import Advert, AdvertError, Key
from drivers.bthome import PROPERTIES, decode
from drivers.contract import Reason, Value, ValueType, engineering

# https://bthome.io/format/, the column "Example" and the column "Result", row by row.
NUMBERS = [
    ("518756", "acceleration", 22.151),
    ("630057D0FF", "acceleration", -3.123456),
    ("0161", "battery", 97),
    ("6001", "channel", 1),
    ("12E204", "co2", 1250),
    ("56E803", "conductivity", 1000),
    ("0960", "count", 96),
    ("3D0960", "count", 24585),
    ("3E2A2C0960", "count", 1611213866),
    ("59EA", "count", -22),
    ("5AEAEA", "count", -5398),
    ("5BEA0234EA", "count", -365690134),
    ("434E34", "current", 13.39),
    ("5D02EA", "current", -5.63),
    ("08CA06", "dewpoint", 17.38),
    ("5E9F8C", "direction", 359.99),
    ("400C00", "distance_mm", 12),
    ("414E00", "distance_m", 7.8),
    ("424E3400", "duration", 13.390),
    ("4d12138a14", "energy", 344593.170),
    ("0A138A14", "energy", 1346.067),
    ("4B138A14", "gas", 1346.067),
    ("4C41018A01", "gas", 25821.505),
    ("528756", "gyroscope", 22.151),
    ("03BF13", "humidity", 50.55),
    ("2E23", "humidity", 35),
    ("05138A14", "illuminance", 13460.67),
    ("6402", "light_level", 2),
    ("065E1F", "mass_kg", 80.3),
    ("073E1D", "mass_lb", 74.86),
    ("14020C", "moisture", 30.74),
    ("2F23", "moisture", 35),
    ("0D120C", "pm2_5", 3090),
    ("0E021C", "pm10", 7170),
    ("0B021B00", "power", 69.14),
    ("5C02FBFFFF", "power", -12.78),
    ("5FA00F", "precipitation", 400.0),
    ("04138A01", "pressure", 1008.83),
    ("3F020C", "rotation", 307.4),
    ("61AC0D", "rotational_speed", 3500),
    ("6503", "settings_revision", 3),
    ("444E34", "speed", 133.90),
    ("624099DFFF", "speed", -2.123456),
    ("57EA", "temperature", -22),
    ("58EA", "temperature", -7.7),
    ("451101", "temperature", 27.3),
    ("02CA09", "temperature", 25.06),
    ("505d396164", "timestamp", 1684093277),
    ("133301", "tvoc", 307),
    ("0C020C", "voltage", 3.074),
    ("4A020C", "voltage", 307.4),
    ("4E87562A01", "volume", 19551.879),
    ("478756", "volume", 2215.1),
    ("48DC87", "volume", 34.780),  # published as 34780 mL
    ("5587562A01", "volume_storage", 19551.879),
    ("49DC87", "volume_flow_rate", 34.780),
    ("4632", "uv_index", 5.0),
    ("4F87562A01", "water", 19551.879),
    ("3A80", "button", 0x80),
    ("F00100", "device_type_id", 1),
    ("0009", "packet_id", 9),
]

FLAGS = [
    ("1501", "battery_low"),
    ("1601", "battery_charging"),
    ("1700", "carbon_monoxide"),
    ("1801", "cold"),
    ("1900", "connectivity"),
    ("1A00", "door"),
    ("1B01", "garage_door"),
    ("1C01", "gas_detected"),
    ("0F01", "generic_boolean"),
    ("1D00", "heat"),
    ("1E01", "light"),
    ("1F01", "lock"),
    ("2001", "moisture_detected"),
    ("2100", "motion"),
    ("2201", "moving"),
    ("2301", "occupancy"),
    ("1100", "opening"),
    ("2400", "plug"),
    ("1001", "power_on"),
    ("2500", "presence"),
    ("2601", "problem"),
    ("2701", "running"),
    ("2800", "safety"),
    ("2901", "smoke"),
    ("2A00", "sound"),
    ("2B00", "tamper"),
    ("2C01", "vibration"),
    ("2D01", "window"),
]

OTHERS: list[tuple[str, dict[str, Value | None]]] = [
    ("530C48656C6C6F20576F726C6421", {"text": "Hello World!"}),
    ("540C48656C6C6F20576F726C6421", {"raw": "48656c6c6f20576f726c6421"}),
    ("3B0002", {"command": 2, "command_args": ""}),
    ("3B010305", {"command": 3, "command_args": "05"}),
    ("3C0103", {"dimmer": 1, "dimmer_steps": 3}),
    ("3C020A", {"dimmer": 2, "dimmer_steps": 10}),
    ("F100010204", {"firmware_version": "4.2.1.0"}),
    ("F2000106", {"firmware_version": "6.1.0"}),
    ("3A003A01", {"button": 0, "button_2": 1}),
    ("3C01033C0204", {"dimmer": 1, "dimmer_steps": 3, "dimmer_2": 2, "dimmer_steps_2": 4}),
]


EXAMPLES = [*(row[0] for row in NUMBERS), *(row[0] for row in FLAGS), *(row[0] for row in OTHERS)]


def objects(text: str) -> dict[str, Value | None]:
    return decode(b"\x40" + bytes.fromhex(text)).values


@pytest.mark.parametrize(("text", "name", "result"), NUMBERS)
def test_every_published_number_is_read_to_the_digit(text: str, name: str, result: float) -> None:
    values = objects(text)
    assert values.keys() == {name}
    raw = values[name]
    assert type(raw) is int
    assert engineering(raw, PROPERTIES[name].scale, 0.0) == result


@pytest.mark.parametrize(("text", "name"), FLAGS)
def test_every_published_binary_sensor_is_read(text: str, name: str) -> None:
    assert objects(text) == {name: text.endswith("1")}
    assert PROPERTIES[name].type is ValueType.BOOL


@pytest.mark.parametrize(("text", "values"), OTHERS)
def test_every_published_text_event_and_version_is_read(text: str, values: dict[str, Value | None]) -> None:
    assert objects(text) == values


def test_the_page_and_the_table_have_the_same_object_ids() -> None:
    from drivers.bthome import _OBJECTS

    shown = {bytes.fromhex(text)[0] for text in EXAMPLES}
    assert {number for number, known in enumerate(_OBJECTS) if known is not None} == shown


def test_the_first_example_of_the_page() -> None:
    advert = decode(bytes.fromhex("40 02C409 03BF13"))
    assert advert == Advert({"temperature": 2500, "humidity": 5055})


def test_several_of_a_kind_are_numbered_in_their_order() -> None:
    assert objects("02CA09 02CB09 0161 57EA 5801".replace(" ", "")) == {
        "temperature": 2506,
        "temperature_2": 2507,
        "battery": 97,
        "temperature_3": -2200,
        "temperature_4": 35,
    }


def test_the_head_tells_packet_trigger_and_where_reading_stopped() -> None:
    advert = decode(bytes.fromhex("44 0007 02CA09 EE01 0161"))
    assert (advert.packet_id, advert.triggered, advert.unknown) == (7, True, 0xEE)
    assert advert.values == {"packet_id": 7, "temperature": 2506}


def test_an_address_that_older_senders_put_in_front_is_skipped() -> None:
    assert decode(bytes.fromhex("42 A580 8FE6 4854 02CA09")).values == {"temperature": 2506}


@pytest.mark.parametrize(("text", "name"), [("1A02", "door"), ("5302FFFE", "text"), ("2AFF", "sound")])
def test_a_value_that_cannot_be_read_is_there_but_nothing(text: str, name: str) -> None:
    assert objects(text) == {name: None}


@pytest.mark.parametrize(
    ("text", "why", "reason"),
    [
        ("", "empty", Reason.FRAMING),
        ("20 02CA09", "version 1", Reason.FRAMING),
        ("40 02CA", "0x02 is cut off", Reason.FRAMING),
        ("40 02CA09 53", "0x53 is cut off", Reason.FRAMING),
        ("40 5305 4142", "0x53 is cut off", Reason.FRAMING),
        ("40 3B00", "0x3B is cut off", Reason.FRAMING),
        ("42 0011", "in its address", Reason.FRAMING),
        ("41 02CA09", "no key", Reason.DECRYPT),
    ],
)
def test_what_is_no_message_is_an_error_with_its_reason(text: str, why: str, reason: Reason) -> None:
    with pytest.raises(AdvertError, match=why) as refused:
        decode(bytes.fromhex(text))
    assert refused.value.reason is reason


def test_the_published_encrypted_message_is_read() -> None:
    # https://bthome.io/encryption/
    key = Key(bytes.fromhex("231d39c1d7cc1ab1aee224cd096db932"), "54:48:E6:8F:80:A5")
    advert = decode(bytes.fromhex("41 a47266c95f73 00112233 78237214"), key)
    assert advert.values == {"temperature": 2506, "humidity": 5055}
    assert advert.counter == 0x33221100


@pytest.mark.parametrize(
    "text",
    [
        "41 a47266c95f73 00112233 78237215",
        "41 a47266c95f73 01112233 78237214",
        "45 a47266c95f73 00112233 78237214",
    ],
)
def test_a_message_changed_in_one_bit_does_not_decrypt(text: str) -> None:
    key = Key(bytes.fromhex("231d39c1d7cc1ab1aee224cd096db932"), "54:48:E6:8F:80:A5")
    with pytest.raises(AdvertError) as refused:
        decode(bytes.fromhex(text), key)
    assert refused.value.reason is Reason.DECRYPT


PYTHON_TYPES: dict[ValueType, type[Value]] = {ValueType.BOOL: bool, ValueType.STR: str}


def check_types(advert: Advert) -> None:
    for name, value in advert.values.items():
        stem, _, nth = name.rpartition("_")
        found = PROPERTIES.get(name) or PROPERTIES[stem]
        assert name in PROPERTIES or int(nth) >= 2
        if value is None:
            continue
        assert type(value) is PYTHON_TYPES.get(found.type, int), name
        if type(value) is int:
            bits, signed = int(found.type[1:]), found.type.startswith("i")
            assert -(1 << bits - 1 if signed else 0) <= value < 1 << (bits - signed), name


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=255))
@example(b"\x40")
@example(b"\x40\x54\x00")
def test_any_bytes_give_values_of_their_types_or_a_bthome_error(data: bytes) -> None:
    with contextlib.suppress(AdvertError):
        check_types(decode(data))


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(EXAMPLES), max_size=8), st.data())
def test_any_well_formed_message_with_any_values_is_read_whole(kinds: list[str], data: st.DataObject) -> None:
    message = b"\x40"
    for text in kinds:
        kind = bytes.fromhex(text)
        if kind[0] in (0x53, 0x54):
            body = data.draw(st.binary(max_size=20))
            message += kind[:1] + bytes((len(body),)) + body
        elif kind[0] == 0x3B:
            body = data.draw(st.binary(max_size=31))
            message += kind[:1] + bytes((len(body), 1)) + body
        else:
            size = len(kind) // 2 if text in ("3A003A01", "3C01033C0204") else len(kind)
            message += kind[:1] + data.draw(st.binary(min_size=size - 1, max_size=size - 1))
    advert = decode(message)
    assert advert.unknown is None
    check_types(advert)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_with_a_key_give_a_bthome_error(data: bytes) -> None:
    key = Key(bytes(16), "00:00:00:00:00:00")
    with pytest.raises(AdvertError):
        decode(data, key)
