"""Each format's published examples, to the digit; what they call invalid; and one table for all of them.

Where a maker publishes none (Govee, most of MiBeacon), the expected values are those of two open-source parsers, with
the recordings of real devices that they test with; each is cited. Nothing here was computed by the code under test.
"""

from __future__ import annotations

import math

import pytest

from drivers.advert import Advert, AdvertError, Format, Heard, Key
from drivers.advert_formats import BY_NAME, FORMATS, PROPERTIES, may_be, read, steps
from drivers.codec import limits_of
from drivers.contract import Reason, ValueType, engineering

A = "A4:C1:38:00:00:01"
FE95, X181A, FEAA, FCD2 = (
    f"0000{short}-0000-1000-8000-00805f9b34fb" for short in ("fe95", "181a", "feaa", "fcd2")
)


def service(uuid: str, data: str | bytes, *, address: str = A, name: str = "") -> Heard:
    raw = data if isinstance(data, bytes) else bytes.fromhex(data)
    return Heard(address, 0, service_data={uuid: raw}, name=name)


def company(number: int, data: str | bytes, *, name: str = "", address: str = A) -> Heard:
    raw = data if isinstance(data, bytes) else bytes.fromhex(data)
    return Heard(address, 0, company_data={number: raw}, name=name)


def told(found: tuple[Format, Advert] | None) -> dict[str, float | bool | str | None]:
    """What a person sees, by the one table."""
    assert found is not None
    each, advert = found
    seen: dict[str, float | bool | str | None] = {}
    for name, raw in advert.values.items():
        if isinstance(raw, int) and not isinstance(raw, bool):
            property_ = PROPERTIES.get(name) or PROPERTIES[name.rpartition("_")[0]]
            seen[name] = round(engineering(raw * steps(each, name), property_.scale, 0.0), 6)
        else:
            seen[name] = raw
    return seen


def near(**values: float | bool | str) -> object:
    return pytest.approx(values, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- Ruuvi

# https://docs.ruuvi.com/communication/bluetooth-advertisements/data-format-5-rawv2, "Test vectors"
RUUVI_5 = [
    (
        "0512FC5394C37C0004FFFC040CAC364200CDCBB8334C884F",
        {
            "temperature": 24.3,
            "pressure": 1000.44,
            "humidity": 53.49,
            "acceleration_x": 0.004,
            "acceleration_y": -0.004,
            "acceleration_z": 1.036,
            "tx_power": 4,
            "voltage": 2.977,
            "movement_counter": 66,
            "sequence": 205,
        },
    ),
    (
        "057FFFFFFEFFFE7FFF7FFF7FFFFFDEFEFFFECBB8334C884F",
        {
            "temperature": 163.835,
            "pressure": 1155.34,
            "humidity": 163.835,
            "acceleration_x": 32.767,
            "acceleration_y": 32.767,
            "acceleration_z": 32.767,
            "tx_power": 20,
            "voltage": 3.646,
            "movement_counter": 254,
            "sequence": 65534,
        },
    ),
    (
        "058001000000008001800180010000000000CBB8334C884F",
        {
            "temperature": -163.835,
            "pressure": 500.0,
            "humidity": 0,
            "acceleration_x": -32.767,
            "acceleration_y": -32.767,
            "acceleration_z": -32.767,
            "tx_power": -40,
            "voltage": 1.6,
            "movement_counter": 0,
            "sequence": 0,
        },
    ),
]
# …/data-format-3-rawv1, "Test vectors"
RUUVI_3 = [
    (
        "03291A1ECE1EFC18F94202CA0B53",
        {
            "temperature": 26.3,
            "pressure": 1027.66,
            "humidity": 20.5,
            "acceleration_x": -1.0,
            "acceleration_y": -1.726,
            "acceleration_z": 0.714,
            "voltage": 2.899,
        },
    ),
    (
        "03FF7F63FFFF7FFF7FFF7FFFFFFF",
        {
            "temperature": 127.99,
            "pressure": 1155.35,
            "humidity": 127.5,
            "acceleration_x": 32.767,
            "acceleration_y": 32.767,
            "acceleration_z": 32.767,
            "voltage": 65.535,
        },
    ),
    (
        "0300FF6300008001800180010000",
        {
            "temperature": -127.99,
            "pressure": 500.0,
            "humidity": 0,
            "acceleration_x": -32.767,
            "acceleration_y": -32.767,
            "acceleration_z": -32.767,
            "voltage": 0,
        },
    ),
]


@pytest.mark.parametrize(("data", "values"), RUUVI_5 + RUUVI_3)
def test_ruuvis_published_vectors(data: str, values: dict[str, float]) -> None:
    assert told(read(company(0x0499, data))) == pytest.approx(values, abs=1e-9)


def test_ruuvis_vector_of_invalid_values_gives_a_sentinel_for_each() -> None:
    found = read(company(0x0499, "058000FFFFFFFF800080008000FFFFFFFFFFFFFFFFFFFFFF"))
    assert found is not None
    assert set(found[1].reasons) == set(found[1].values)
    assert set(found[1].reasons.values()) == {Reason.SENTINEL}
    assert found[1].sequence is None


@pytest.mark.parametrize(
    ("data", "temperature"), [("0145", 1.69), ("8145", -1.69), ("0000", 0.0)]
)  # data-format-3-rawv1, "Temperature"
def test_ruuvi_3_counts_degrees_with_sign_and_magnitude(data: str, temperature: float) -> None:
    assert told(read(company(0x0499, f"0329{data}CE1EFC18F94202CA0B53")))["temperature"] == temperature


def test_ruuvi_doubts_humidity_beyond_all() -> None:
    doubt = read(company(0x0499, RUUVI_5[1][0]))
    fault = read(company(0x0499, RUUVI_3[1][0]))
    assert doubt is not None
    assert fault is not None
    assert doubt[1].reasons == {"humidity": Reason.DEVICE_DOUBT}
    assert fault[1].reasons == {"humidity": Reason.DEVICE_FAULT}


def test_ruuvi_3_with_a_hundred_hundredths_is_no_temperature() -> None:
    assert told(read(company(0x0499, "03291A64CE1EFC18F94202CA0B53")))["temperature"] is None


# -------------------------------------------------------------------------------------------------------------- pvvx

# https://github.com/custom-components/ble_monitor, test/test_atc_parser.py: (service data, address, values)
PVVX = [
    ("a4c1380283f400a22f5f0bf819", "A4:C1:38:02:83:F4",
     near(temperature=16.2, humidity=47, voltage=3.064, battery=95, packet_id=25)),
    ("a4c138bc7c4e0102284f0b6720", "A4:C1:38:BC:7C:4E",
     near(temperature=25.8, humidity=40, voltage=2.919, battery=79, packet_id=32)),
    ("f4830238c1a4a9066911b60b58f70d", "A4:C1:38:02:83:F4",
     near(temperature=17.05, humidity=44.57, voltage=2.998, battery=88, packet_id=247, reed_switch=True,
          trigger_output=False, temperature_trigger=True, humidity_trigger=False)),
    ("b2188d38c1a42b089011f70a43200f", "A4:C1:38:8D:18:B2",
     near(temperature=20.91, humidity=44.96, voltage=2.807, battery=67, packet_id=32, reed_switch=True,
          trigger_output=True, temperature_trigger=True, humidity_trigger=False)),
    ("8b376338c1a4ce0913107f0b521204", "A4:C1:38:63:37:8B",
     near(temperature=25.1, humidity=41.15, voltage=2.943, battery=82, packet_id=18, reed_switch=False,
          trigger_output=False, temperature_trigger=False, humidity_trigger=False)),
]  # fmt: skip
PVVX_KEY = "b9ea895fac7eea6d30532432a516f3a3"
PVVX_SENDER = "A4:C1:38:8D:18:B2"
PVVX_SEALED = "11d603fbfa7b6dfb1e26fd"
# https://github.com/pvvx/ATC_MiThermometer, python-interface/atc_mi_interface/atc_mi_format_test.py
PVVX_ATC_SEALED = ("bde9b75db856f303", "A4:C1:38:AA:BB:CC", "aa" * 16)


@pytest.mark.parametrize(("data", "address", "values"), PVVX)
def test_thermometers_of_atc1441_and_pvvx(data: str, address: str, values: object) -> None:
    assert told(read(service(X181A, data, address=address))) == values


def test_pvvx_encrypted() -> None:
    heard = service(X181A, PVVX_SEALED, address=PVVX_SENDER)
    found = told(read(heard, Key(bytes.fromhex(PVVX_KEY), PVVX_SENDER)))
    assert {name: found[name] for name in ("temperature", "humidity", "battery", "packet_id")} == near(
        temperature=23.45, humidity=41.73, battery=61, packet_id=17
    )


def test_atc1441_encrypted_is_proved_by_its_tag() -> None:
    data, address, key = PVVX_ATC_SEALED
    found = told(read(service(X181A, data, address=address), Key(bytes.fromhex(key), address)))
    # Half degrees from -40 and half percents, as that repository's construct has them.
    assert math.modf(float(found["temperature"] or 0) * 2)[0] == 0
    assert 0 <= float(found["humidity"] or -1) <= 100
    assert found["packet_id"] == 0xBD


@pytest.mark.parametrize("key", ["00" * 16, None])
def test_pvvx_with_a_wrong_key_or_none_does_not_decrypt(key: str | None) -> None:
    with pytest.raises(AdvertError) as refused:
        read(
            service(X181A, PVVX_SEALED, address=PVVX_SENDER),
            None if key is None else Key(bytes.fromhex(key), PVVX_SENDER),
        )
    assert refused.value.reason is Reason.DECRYPT


def test_a_message_that_carries_anothers_address_is_not_believed() -> None:
    with pytest.raises(AdvertError, match="address A4:C1:38:02:83:F4"):
        read(service(X181A, PVVX[0][0], address=A))


# ---------------------------------------------------------------------------------------------------------- MiBeacon

# https://github.com/Bluetooth-Devices/xiaomi-ble, tests/test_parser.py: (service data, address, key, values).
MIBEACON = [
    (b"P \xaa\x01\xa3\xbf.;4-X\r\x10\x04\xb4\x00\x95\x02\n\x10\x01;", "58:2D:34:3B:2E:BF", "",
     near(temperature=18.0, humidity=66.1, battery=59, packet_id=0xA3)),  # LYWSDCGQ
    (b"XXH\x0bh_\x124-XZ\x0b\x18A\xe2\xaa\x00\x0e\x00\xa4\x96O\xb5", "5A:58:2D:34:12:5F",
     "814aac74c4f17b6c1581e1ab87816b99", near(humidity=59.6, packet_id=0x68)),  # CGG1
    (b"XXo\x06\x07\x89 \x124-X_\x17m\xd5O\x02\x00\x00/\xa4S\xfa", "58:2D:34:12:20:89",
     "a3bfe9853dd85a620debe3620caaa351", near(temperature=22.6, packet_id=7)),  # CGDK2
    (b"HXYO\xefTo\x0etPr\x93!\x01\x008\xd7C3", "58:2D:34:87:94:0C",
     "872ea1bb02ba9713e885cb054c537368", near(temperature=23.8, packet_id=0xEF)),  # CGDK3, no address inside
    (b"P0[\x05\x03L\x94\xb48\xc1\xa4\r\x10\x04\x10\x01\xea\x01", "A4:C1:38:B4:94:4C", "",
     near(temperature=27.2, humidity=49.0, packet_id=3)),  # LYWSD03MMC
    (b"XX\xe4\x16,\x84SV8\xc1\xa4+n\xf2\xe9\x12\x00\x00l\x88M\x9e", "A4:C1:38:56:53:84",
     "a115210eed7a88e50ad52662e732a9fb", near(humidity=58, packet_id=0x2C)),  # LYWSD02MMC
    (b'HXB%) -\x8czv\xb7V\xa8*\x00x\xb8"N', "A4:C1:38:0E:FD:78",
     "19b1c678ab0a8bc3dc77765f059188d4", near(temperature=26.1, packet_id=0x29)),  # LYWSD02MMC, a float
    (b"XXB%\x88x\xfd\x0e8\xc1\xa4\x05\xf6S\x8a\xa7*\x00b\xb1\xa9f", "A4:C1:38:0E:FD:78",
     "19b1c678ab0a8bc3dc77765f059188d4", near(humidity=38, packet_id=0x88)),
    (b"HY\x03\x12\xa4\x1bwn|\x96\xad\xd7\x00\x00\x00\xf2\xbfT[", "2C:11:65:25:70:04",
     "b2cf9a553d53571b5657defd582d676e", near(humidity=45.0, packet_id=0xA4)),  # XMWSDJ04MMC
    (b"HY\xb5U:\x86\x99\xbd\xa0SD\x8f\x12\x00\x00[\x04mj", "A4:C1:38:80:15:07",
     "4d8f1373fb4d3bab557d0ebd1c78f8c4", near(temperature=25.2, packet_id=0x3A)),  # MJWSD06MMC
    (b"XY\xb5U4\x07\x15\x808\xc1\xa4\xbc\xc72\x98\x0e\x00\x00f\x96\x0f\x10", "A4:C1:38:80:15:07",
     "4d8f1373fb4d3bab557d0ebd1c78f8c4", near(humidity=39, packet_id=0x34)),
    (bytes.fromhex("5040df0201df02008d7cc41010027d00"), "C4:7C:8D:00:02:DF", "",
     near(formaldehyde=1.25, packet_id=1)),  # JQJCY01YM
    (b"XY\x97\tf\xbc\x9c\xe3D\xefT\x01\x08\x12\x05\x00\x00\x00q^\xbe\x90", "54:EF:44:E3:9C:BC",
     "5b51a7c91cde6707c9ef18dfda143a58", near(smoke=True, packet_id=0x66)),  # JTYJGD03MI
    (b"q \x98\x00\x12\xf3Ok\x8d|\xc4\r\x04\x10\x02\xc4\x00", "C4:7C:8D:6B:4F:F3", "",
     near(temperature=19.6, packet_id=0x12)),  # HHCCJCY01, with a capability byte
    (b"q \x98\x00fz>j\x8d|\xc4\r\x07\x10\x03\x00\x00\x00", "C4:7C:8D:6A:3E:7A", "",
     near(illuminance=0, packet_id=0x66)),
    (b"q \x98\x00hz>j\x8d|\xc4\r\t\x10\x02W\x02", "C4:7C:8D:6A:3E:7A", "", near(conductivity=599, packet_id=0x68)),
    (b"q \x98\x00Gz>j\x8d|\xc4\r\x08\x10\x01@", "C4:7C:8D:6A:3E:7A", "", near(moisture=64, packet_id=0x47)),
    (bytes.fromhex("71205d01015d01008d7cc40d081001400910025702"), "C4:7C:8D:00:01:5D", "",
     near(moisture=64, conductivity=599, packet_id=1)),  # HHCCPOT002
    (bytes.fromhex("50400a04010a04008d7cc41310015a"), "C4:7C:8D:00:04:0A", "",
     near(consumable=90, packet_id=1)),  # WX08ZM
    (b"XX\x8b\t\xa3\xae!\x81\xec\xaa\xe4\x0e,U<\x04\x00\x00\xd2\x8aP\x0c", "E4:AA:EC:81:21:AE",
     "017e52d2684779298709b117c0a75a7b", near(opening=True, left_open=True, packet_id=0xA3)),  # MCCGQ02HL
    (b"P@\xd6\x03\x01\xd6\x03\n8\xc1\xa4\x19\x10\x01\x00", "A4:C1:38:0A:03:D6", "",
     near(opening=True, left_open=False, packet_id=1)),  # CGH1
    (b"P@\xf6\x07\x01\x01\xf6\x078\xc1\xa4\x0f\x00\x03d\x00\x00", "A4:C1:38:07:F6:01", "",
     near(motion=True, light=True, packet_id=1)),  # MJYD02YL
    (b"P@\x83\n\x01\x83\x00\n8\xc1\xa4\x0f\x00\x03d\x00\x00", "A4:C1:38:0A:00:83", "",
     near(motion=True, illuminance=100, packet_id=1)),  # CGPR1
    (b"@0\xdd\x03$\x03\x00\x01\x01", "DE:70:E8:B2:39:0C", "", near(motion=True, packet_id=0x24)),  # MUE4094RT
    (b"PY\xdbx\r\xf4\xf8\x028\xc1\xa4\r\x10\x04\xeb\x00\xe7\x01", "A4:C1:38:02:F8:F4", "",
     near(temperature=23.5, humidity=48.7, packet_id=0x0D)),  # ESM787
]  # fmt: skip


@pytest.mark.parametrize(("data", "address", "key", "values"), MIBEACON)
def test_mibeacon_recordings(data: bytes, address: str, key: str, values: object) -> None:
    found = read(service(FE95, data, address=address), Key(bytes.fromhex(key), address) if key else None)
    assert found is not None
    assert found[1].sequence == data[4]
    assert told(found) == values


@pytest.mark.parametrize("key", ["00" * 16, None])
@pytest.mark.parametrize(("data", "address", "good", "values"), [row for row in MIBEACON if row[2]])
def test_mibeacon_with_a_wrong_key_or_none_does_not_decrypt(
    data: bytes, address: str, good: str, values: object, key: str | None
) -> None:
    with pytest.raises(AdvertError) as refused:
        read(service(FE95, data, address=address), None if key is None else Key(bytes.fromhex(key), address))
    assert refused.value.reason is Reason.DECRYPT


def test_mibeacon_3_encrypted_is_never_read_since_its_key_cannot_be_proved() -> None:
    # xiaomi-ble, test_encryption_needs_v2
    data, address = b"X0\xb6\x03\xd2\x8b\x98\xc5A$\xf8\xc3I\x14vu~\x00\x00\x00\x99", "F8:24:41:C5:98:8B"
    with pytest.raises(AdvertError, match="cannot tell a wrong key") as refused:
        read(service(FE95, data, address=address), Key(bytes(16), address))
    assert refused.value.reason is Reason.DECRYPT


@pytest.mark.parametrize("data", [b"0X[\x05\x02H<\xd48\xc1\xa4\x08", b"\x10Y\xdbx\r\xf4\xf8\x028\xc1\xa4"])
def test_mibeacon_frames_without_objects_say_nothing(data: bytes) -> None:
    assert read(service(FE95, data, address="A4:C1:38:02:F8:F4")) is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"P0", "in its head"),
        (b"P0[\x05\x03L\x94", "in its address"),
        (b"P0[\x05\x03\x01\x00\x008\xc1\xa5\x04\x10\x02\xc4\x00", "another device's address"),
        (b"P0[\x05\x03\x01\x00\x008\xc1\xa4\x04\x10\x02\xc4", "object is cut off"),
        (b"P\x10[\x05\x03\x01\x00\x008\xc1\xa4\x04\x10\x02\xc4\x00", "version 1"),
    ],
)
def test_mibeacon_that_is_cut_off_or_anothers_is_framing(data: bytes, why: str) -> None:
    with pytest.raises(AdvertError, match=why) as refused:
        read(service(FE95, data))
    assert refused.value.reason is Reason.FRAMING


def test_a_mibeacon_object_of_the_wrong_length_is_there_but_nothing_and_an_unknown_one_is_stepped_over() -> (
    None
):
    head = b"P0[\x05\x03\x01\x00\x008\xc1\xa4"
    found = read(service(FE95, head + b"\x04\x10\x01\xc4" + b"\x77\x77\x02ab" + b"\x0a\x10\x01\x3b"))
    assert found is not None
    assert found[1].values == {"temperature": None, "battery": 59, "packet_id": 3}
    assert found[1].unknown == 0x7777


# ------------------------------------------------------------------------------------------------------------- Govee

# https://github.com/Bluetooth-Devices/govee-ble, tests/test_parser.py; those marked * from
# https://github.com/custom-components/ble_monitor, test/test_govee_parser.py: (company, data, name, values).
GOVEE = [
    (0xEC88, b"\x00\xba\x0a\xf9\x0f\x63\x02\x01\x01", "", near(temperature=27.46, humidity=40.89, battery=99)),  # H5051
    (0xEC88, b"\x00\x1c\x01\xa7\x14;\x00\x00\x02", "Govee_H5052_E81B",
     near(temperature=2.84, humidity=52.87, battery=59)),
    (0xEC88, b"\x00!\n\xb6\x12\x18\xc8\x00\x01", "Govee_H5071_FD12",
     near(temperature=25.93, humidity=47.9, battery=24)),
    (0xEC88, b"\x00\xe6\t\xbc\x12d\x02", "Govee_H5074_5FF4", near(temperature=25.34, humidity=47.96, battery=100)),
    (0xEC88, bytes.fromhex("0088078c116402"), "", near(temperature=19.28, humidity=44.92, battery=100)),  # H5074 *
    (0xEC88, b"\x00\x03A\xc2d\x00L\x00\x02\x15INTELLI_ROCKS_HWPu\xf2\xff\x0c", "GVH5075_2762",
     near(temperature=21.3, humidity=44.2, battery=100)),
    (0xEC88, b"\x00\x03M\xb2d\x00", "GVH5072_ABCD", near(temperature=21.6, humidity=49.8, battery=100)),
    (0xEC88, b"\x00\x03\x0f\xc95\x00", "GVH5075_2762", near(temperature=20.0, humidity=64.9, battery=53)),
    (0xEC88, bytes.fromhex("0081c2896400"), "GVH5075_CB9B", near(temperature=-11.5, humidity=33.7, battery=100)),  # *
    (0x0001, b"\x01\x01\x03FTd", "GVH5100_7738", near(temperature=21.4, humidity=61.2, battery=100)),
    (0x0001, bytes.fromhex("010103cb0164"), "GVH5102_CB9B", near(temperature=24.8, humidity=57.7, battery=100)),  # *
    (0x0001, b"\x01\x01\x03Q>dL\x00\x02\x15INTELLI_ROCKS_HWPu\xf2\xff\x0c", "GVH5103_5A4E",
     near(temperature=21.7, humidity=40.6, battery=100)),
    (0x0001, b"\x01\x01\x03\xfc&b", "GVH5104_311C", near(temperature=26.1, humidity=15.8, battery=98)),
    (0x0001, b"\x01\x01\x02\x03\xd9^", "GVH5104_311C", near(temperature=13.2, humidity=5.7, battery=94)),
    (0x0001, b"\x01\x01\x032^d", "GVH5105_7336", near(temperature=20.9, humidity=50.2, battery=100)),
    (0x0001, b"\x01\x01\x0e\xd12\x98", "GVH5106_4E05", near(temperature=24.8, humidity=59.1, pm2_5=0)),
    (0x0001, b"\x01\x01\x81\x86\x7c\xd8", "GVH5106_4E05", near(temperature=-2.5, humidity=59.1, pm2_5=0)),
    (0x0001, bytes.fromhex("01010deeaa6f"), "GVH5106_4C99", near(temperature=23.3, humidity=74.5, pm2_5=7)),  # *
    (0x0001, b"\x01\x01\x03\xc70d\x00\x00", "GV51085242", near(temperature=24.7, humidity=60.0, battery=100)),
    (0x0001, b"\x01\x01\x03\x8e\xfed", "GVH5110_2EC8", near(temperature=23.3, humidity=21.4, battery=100)),
    (0x0001, b"\x01\x01\x03=\xee\x02>\x00", "GV5140303A", near(temperature=21.2, humidity=46.2, co2=574)),
    (0x0001, b"\x01\x01\x036&dL\x00\x02\x15INTELLI_ROCKS_HWQw\xf2\xff\xc2", "GVH5177_2EC8",
     near(temperature=21.0, humidity=47.0, battery=100)),
    (0x0001, b"\x01\x01\x00\x00\x2a\xf7\x64\x00\x03", "B51782BC8", near(temperature=1.0, humidity=99.9, battery=100)),
    (0x0001, b"\x01\x01\x01\x00\x2a\xf7\x64\x00\x03", "B51782BC8",
     near(temperature_2=1.0, humidity_2=99.9, battery_2=100)),  # its outdoor part
    (0x8801, b"\xec\x00\x01\x01\n\n\xa4\x06d", "Govee_H5179_3CD5", near(temperature=25.7, humidity=17.0, battery=100)),
    (0x8801, bytes.fromhex("ec000101a00aa2175b"), "", near(temperature=27.2, humidity=60.5, battery=91)),  # H5179 *
    (0x0001, b"\x01\x01\x03\xb3\x14d", "GV5179_6319", near(temperature=24.2, humidity=45.2, battery=100)),
]  # fmt: skip


@pytest.mark.parametrize(("number", "data", "name", "values"), GOVEE)
def test_govee_recordings(number: int, data: bytes, name: str, values: object) -> None:
    found = read(company(number, data, name=name))
    assert told(found) == values
    assert found is not None
    assert not found[1].reasons


@pytest.mark.parametrize(
    ("number", "data", "name", "reason", "battery"),
    [
        (0xEC88, b"\x00\xbc\x00\x04>'", "GVH5075_2762", Reason.RANGE, 62),
        (0xEC88, b"\x00J\x00(;\x00", "GVH5075_2762", Reason.RANGE, 59),
        (0x0001, b"\x01\x01\x03\xc70\xe4\x00\x00", "GV51085242", Reason.DEVICE_FAULT, 100),
        (0x0001, b"\x01\x01\x01\x00\x03\xe7\xe4\x00\x01", "B51782BC8", Reason.DEVICE_FAULT, 100),
        (0x0001, b"\x01\x01\x03\x1a\xbc\x02X\x01", "GV5140303A", Reason.DEVICE_FAULT, None),
    ],
)
def test_govees_flag_of_a_failed_sensor_and_what_none_of_them_can_measure_are_bad(
    number: int, data: bytes, name: str, reason: Reason, battery: int | None
) -> None:
    found = read(company(number, data, name=name))
    assert found is not None
    bad = {name for name in found[1].values if name[:8] in ("temperat", "humidity", "co2")}
    assert found[1].reasons == dict.fromkeys(bad, reason)
    assert battery in (found[1].values.get("battery", found[1].values.get("battery_2")), None)


def test_govee_whose_model_only_a_name_tells_is_not_guessed_at() -> None:
    assert read(company(0x0001, b"\x01\x01\x0e\xd12\x98")) is None
    assert read(company(0x0001, b"\x01\x01\x0b\x00Xd", name="RZSS")) is None  # govee-ble's GVH5106_INVALID


# ----------------------------------------------------------------------------------------------------------- beacons


def test_eddystones_telemetry() -> None:
    # https://github.com/citruz/beacontools, README, "Parser"
    assert told(read(service(FEAA, "20000b18130000001467 00002ac4"))) == near(
        voltage=2.84, beacon_temperature=19, advert_count=5223, uptime=1094.8
    )
    # signed 8.8: -0.50 °C is 0xFF80 (tlm-plain.md, "signed 8.8 fixed-point")
    assert told(read(service(FEAA, "20000BB8FF800000000AFFFFFFFF"))) == near(
        voltage=3.0, beacon_temperature=-0.5, advert_count=10, uptime=429496729.5
    )


def test_what_eddystone_calls_not_supported_is_a_sentinel() -> None:
    found = read(service(FEAA, "20000000 8000 00001467 00002ac4"))
    assert found is not None
    assert found[1].reasons == {"voltage": Reason.SENTINEL, "beacon_temperature": Reason.SENTINEL}


@pytest.mark.parametrize("data", ["00e7" + "00" * 18, "10eb00676f6f676c6507", "30e70102030405060708"])
def test_eddystones_identifying_frames_are_passed_over(data: str) -> None:
    assert read(service(FEAA, data)) is None


def test_ibeacon() -> None:
    # https://github.com/custom-components/ble_monitor, test/test_ibeacon_parser.py
    assert told(read(company(0x004C, "0215E2C56DB5DFFB48D2B060D0F5A71096E000640000C5"))) == {
        "uuid": "e2c56db5-dffb-48d2-b060-d0f5a71096e0",
        "major": 100,
        "minor": 0,
        "tx_power": -59,
    }


@pytest.mark.parametrize("data", ["0f06a033bd08c5001002440c", "1005441cbd08c5", ""])
def test_apples_other_messages_are_nobodys(data: str) -> None:
    assert read(company(0x004C, data)) is None


# ---------------------------------------------------------------------------------------------------------- all alike


def test_every_property_of_every_format_fits_the_one_table_without_rounding() -> None:
    for each in FORMATS:
        for name, own in each.properties.items():
            shared = PROPERTIES[name]
            assert shared.unit == own.unit
            if own.type in (ValueType.BOOL, ValueType.STR):
                assert shared.type is own.type
                continue
            factor = steps(each, name)
            assert steps(each, f"{name}_2") == factor
            assert shared.scale * factor == pytest.approx(own.scale)
            least, most = own.span or limits_of(own.type)
            low, high = limits_of(shared.type)
            assert low <= least * factor
            assert most * factor <= high


def test_formats_of_one_advertisement_are_tried_in_their_order_and_strangers_not_at_all() -> None:
    both = Heard(A, 0, service_data={FCD2: b"\x40\x02\xca\x09"}, company_data={0x004C: b"", 0x0499: b""})
    assert [each.name for each in may_be(both)] == ["bthome", "ruuvi", "ibeacon"]
    assert may_be(Heard(A, 0, company_data={0xFFFF: b"x"})) == ()
    assert read(Heard(A, 0, company_data={0xFFFF: b"x"})) is None


def test_what_one_format_cannot_read_another_may() -> None:
    heard = Heard(A, 0, service_data={FCD2: b"\x20"}, company_data={0x0499: bytes.fromhex(RUUVI_5[0][0])})
    found = read(heard)
    assert found is not None
    assert found[0] is BY_NAME["ruuvi"]
