"""The ready protocols: expected values from the standards' and vendors' examples, and what flags make of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from drivers.checks import crc16_arc, xor_of
from drivers.contract import Reason, ValueType
from drivers.fields import Doubted, Result, same_unit
from drivers.framing import LineCounts
from drivers.instrument import Heard, SerialLineOptions, SerialLinePoint
from drivers.nmea import answers, degrees, split
from drivers.scales import Weighing, and_standard, cas, ohaus, sbi
from drivers.serial_line import dialect_of

P = SerialLinePoint
FAULT, DOUBT = Reason.DEVICE_FAULT, Reason.DEVICE_DOUBT
NONE, OVER = Reason.MISSING, Reason.EXCEPTION


def heard(
    protocol: str, stream: bytes, points: Sequence[SerialLinePoint], *, checked: bool = True
) -> list[Heard]:
    """What a stream says, cut by the protocol's own framer."""
    options = msgspec.convert({"port": "x", "protocol": protocol, "checked": checked}, SerialLineOptions)
    dialect = dialect_of(options, points)
    framer = dialect.framer(LineCounts(), in_step=True)
    said = [
        dialect.lost(body) if isinstance(body, Reason) else dialect.read(body)
        for body, _ in framer.feed(stream, 1) + (framer.silence() if framer.partial else [])
    ]
    return [one for one in said if one is not None]


def results(
    protocol: str, stream: bytes, *points: SerialLinePoint, checked: bool = True
) -> list[Result] | Reason:
    (one,) = heard(protocol, stream, points, checked=checked)
    return one.results


# ---------------------------------------------------------------------------------------------------------- NMEA 0183

GGA = b"$GPGGA,123519,4807.038,N,01131.000,E,1,08,0.9,545.4,M,46.9,M,,*47\r\n"
RMC = b"$GPRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1,W*6A\r\n"
GLL = b"$GPGLL,5057.970,N,00146.110,E,142451,A*27\r\n"
MWV = b"$WIMWV,214.8,R,0.1,K,A*28\r\n"
AIS = b"!AIVDM,1,1,,B,177KQJ5000G?tO`K>RA1wUbN0TKH,0*5C\r\n"

LATITUDE = P(name="lat", sentence="RMC", column=3, form="degrees")


def sealed(body: str) -> bytes:
    return f"${body}*{xor_of(body.encode()):02X}\r\n".encode()


@pytest.mark.parametrize("sentence", [GGA, RMC, GLL, MWV, AIS])
def test_published_sentences_have_the_check_they_were_published_with(sentence: bytes) -> None:
    assert not isinstance(split(sentence.strip(), checked=True), Reason)


def test_fields_are_counted_as_the_standards_tables_count_them() -> None:
    points = (
        P(name="utc", sentence="GGA", column=1, type=ValueType.STR),
        P(name="lat", sentence="GGA", column=2, form="degrees"),
        P(name="lon", sentence="GPGGA", column=4, form="degrees"),
        P(name="satellites", sentence="GGA", column=7, type=ValueType.U8),
        P(name="altitude", sentence="GGA", column=9),
        P(name="speed", sentence="RMC", column=7),
        P(name="wind", sentence="MWV", column=1),
    )
    said = heard("nmea0183", GGA + RMC + GLL + MWV + AIS, points)
    found = {
        point.name: result
        for one in said
        if not isinstance(one.results, Reason)
        for point, result in zip(one.points, one.results, strict=True)
    }
    # 48 degrees 7.038 minutes north, 11 degrees 31 minutes east
    assert found == {
        "utc": "123519",
        "lat": 48 + 7.038 / 60,
        "lon": 11 + 31 / 60,
        "satellites": 8,
        "altitude": 545.4,
        "speed": 22.4,
        "wind": 214.8,
    }


def test_ais_text_can_be_taken_as_it_is() -> None:
    payload = P(name="payload", sentence="AIVDM", column=5, type=ValueType.STR)
    assert results("nmea0183", AIS, payload) == ["177KQJ5000G?tO`K>RA1wUbN0TKH"]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        (RMC, None),
        (sealed("GPRMC,123519,V,4807.038,N,01131.000,E,,,230394,,"), FAULT),  # receiver warning
        (sealed("GPRMC,123519,A,4807.038,N,01131.000,E,,,230394,,,E"), DOUBT),  # dead reckoning
        (sealed("GPRMC,123519,A,4807.038,N,01131.000,E,,,230394,,,N"), FAULT),
        (sealed("GNRMC,123519,A,4807.038,N,01131.000,E,,,230394,,,A,V"), None),
    ],
)
def test_what_a_sentence_says_of_itself_is_said_of_its_values(sentence: bytes, reason: Reason | None) -> None:
    value = 48 + 7.038 / 60
    assert results("nmea0183", sentence, LATITUDE) == [value if reason is None else Doubted(value, reason)]


@pytest.mark.parametrize(
    ("body", "column", "value"),
    [
        ("AGRSA,-4.5,A,,V", 1, -4.5),  # one rudder: the status of the other is no null field, so it is void
        ("AGRSA,-4.5,V,3.0,A", 1, Doubted(-4.5, FAULT)),
        ("AGRSA,-4.5,V,3.0,A", 3, 3.0),
        ("IIRPM,S,1,1200.0,10.5,V", 3, Doubted(1200.0, FAULT)),
        ("HETHS,77.5,E", 1, Doubted(77.5, DOUBT)),
        ("HETHS,77.5,V", 1, Doubted(77.5, FAULT)),
        ("VMVBW,10.1,0.2,A,9.8,0.1,V", 1, 10.1),
        ("VMVBW,10.1,0.2,A,9.8,0.1,V", 4, Doubted(9.8, FAULT)),
        ("IIRMB,V,0.66,L,1,2,4917.24,N,12309.57,W,1.3,52.5,0.5,V", 2, Doubted(0.66, FAULT)),
        ("GNGNS,1,4807.0,N,01131.0,E,NN,0,9.9,545.4,46.9,,", 9, Doubted(545.4, FAULT)),
        ("GNGNS,1,4807.0,N,01131.0,E,AN,8,0.9,545.4,46.9,,", 9, 545.4),
        ("GNGNS,1,4807.0,N,01131.0,E,EE,8,0.9,545.4,46.9,,", 9, Doubted(545.4, DOUBT)),
    ],
)
def test_a_status_is_about_the_fields_that_it_stands_for(body: str, column: int, value: object) -> None:
    point = P(name="x", sentence=body[2:5], column=column)
    assert results("nmea0183", sealed(body), point) == [value]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (RMC.replace(b"4807", b"4808"), Reason.CRC),
        (RMC.replace(b"*6A", b""), Reason.CRC),
        (sealed("GPRMC,123519,A,,,,,,,230394,,"), [Reason.MISSING]),
        (sealed("GPRMC,123519,A"), [Reason.MISSING]),
        (sealed("GPRMC,123519,A,4867.038,N,1,E"), [Reason.DECODE]),
        (sealed("GPRMC,123519,A,4807.038,X,1,E"), [Reason.DECODE]),
        (sealed("GPRMC,123519,A,9807.038,N,1,E"), [Reason.DECODE]),
    ],
)
def test_a_damaged_or_empty_position_is_never_a_place(sentence: bytes, expected: object) -> None:
    assert results("nmea0183", sentence, LATITUDE) == expected


def test_a_sentence_without_check_counts_only_where_that_is_allowed() -> None:
    bare = RMC.replace(b"*6A", b"")
    assert results("nmea0183", bare, LATITUDE, checked=False) == [48 + 7.038 / 60]
    assert results("nmea0183", RMC.replace(b"*6A", b"*6B"), LATITUDE, checked=False) is Reason.CRC


def test_a_sentence_behind_noise_or_a_tag_block_is_read() -> None:
    assert results("nmea0183", b"\x00\xff$GPRM" + RMC, LATITUDE) == [48 + 7.038 / 60]
    assert results("nmea0183", b"\\s:2573345,c:1671533231*08\\" + RMC, LATITUDE) == [48 + 7.038 / 60]


def test_south_and_west_are_negative_and_talkers_are_told_from_proprietary_words() -> None:
    assert degrees("3351.500", "S") == -(33 + 51.5 / 60)
    assert degrees("15112.5", "W") == -(151 + 12.5 / 60)
    assert degrees("18100.0", "E") is Reason.DECODE
    assert degrees("", "N") is Reason.MISSING
    assert answers("GPRMC", "RMC")
    assert not answers("PGRMC", "RMC")
    assert answers("PGRME", "PGRME")


# --------------------------------------------------------------------------------------------------------------- DSMR

#: The example of the DSMR P1 companion standard 5.0.2, 6.12. The check printed there, EF2F, is known not to fit it;
#: E47C does. What the check is computed by is tested with a meter's own, below.
DSMR = (
    b"/ISk5\\2MT382-1000\r\n\r\n1-3:0.2.8(50)\r\n0-0:1.0.0(101209113020W)\r\n0-0:96.1.1(4B384547303034303436333935353037)\r\n"
    b"1-0:1.8.1(123456.789*kWh)\r\n1-0:1.8.2(123456.789*kWh)\r\n1-0:2.8.1(123456.789*kWh)\r\n1-0:2.8.2(123456.789*kWh)\r\n"
    b"0-0:96.14.0(0002)\r\n1-0:1.7.0(01.193*kW)\r\n1-0:2.7.0(00.000*kW)\r\n0-0:96.7.21(00004)\r\n0-0:96.7.9(00002)\r\n"
    b"1-0:99.97.0(2)(0-0:96.7.19)(101208152415W)(0000000240*s)(101208151004W)(0000000301*s)\r\n1-0:32.32.0(00002)\r\n"
    b"1-0:52.32.0(00001)\r\n1-0:72.32.0(00000)\r\n1-0:32.36.0(00000)\r\n1-0:52.36.0(00003)\r\n1-0:72.36.0(00000)\r\n"
    b"0-0:96.13.0(303132333435363738393A3B3C3D3E3F303132333435363738393A3B3C3D3E3F303132333435363738393A3B3C3D3E3F"
    b"303132333435363738393A3B3C3D3E3F303132333435363738393A3B3C3D3E3F)\r\n1-0:32.7.0(220.1*V)\r\n1-0:52.7.0(220.2*V)\r\n"
    b"1-0:72.7.0(220.3*V)\r\n1-0:31.7.0(001*A)\r\n1-0:51.7.0(002*A)\r\n1-0:71.7.0(003*A)\r\n1-0:21.7.0(01.111*kW)\r\n"
    b"1-0:41.7.0(02.222*kW)\r\n1-0:61.7.0(03.333*kW)\r\n1-0:22.7.0(04.444*kW)\r\n1-0:42.7.0(05.555*kW)\r\n"
    b"1-0:62.7.0(06.666*kW)\r\n0-1:24.1.0(003)\r\n0-1:96.1.0(3232323241424344313233343536373839)\r\n"
    b"0-1:24.2.1(101209112500W)(12785.123*m3)\r\n!E47C\r\n"
)
DSMR_POINTS = (
    P(name="import_1", obis="1-0:1.8.1", unit="kWh"),
    P(name="power", obis="1.7.0", unit="W", scale=1000, device_unit="kW"),
    P(name="tariff", obis="0-0:96.14.0", type=ValueType.U8),
    P(name="gas", obis="0-1:24.2.1", unit="m3"),
    P(name="gas_at", obis="0-1:24.2.1", column=1, type=ValueType.STR),
    P(name="none", obis="0-2:24.2.1"),
)
DSMR_RESULTS = [123456.789, 1.193, 2, 12785.123, "101209112500W", Reason.MISSING]


def test_the_example_telegram_of_dsmr_is_read_as_printed() -> None:
    assert results("dsmr", DSMR, *DSMR_POINTS) == DSMR_RESULTS


def test_a_meters_own_telegram_has_the_check_it_came_with() -> None:
    """Sent by a Landis+Gyr E350 and published with its check (nielsbasjes/dsmr)."""
    telegram = (
        b"/XMX5LGBBFG1009325446\r\n\r\n1-3:0.2.8(42)\r\n0-0:1.0.0(190905214003S)\r\n"
        b"0-0:96.1.1(4530303331303033323339343536373136)\r\n1-0:1.8.1(003235.689*kWh)\r\n1-0:1.8.2(006777.240*kWh)\r\n"
        b"1-0:2.8.1(000000.313*kWh)\r\n1-0:2.8.2(000000.000*kWh)\r\n0-0:96.14.0(0002)\r\n1-0:1.7.0(00.374*kW)\r\n"
        b"1-0:2.7.0(00.000*kW)\r\n0-0:96.7.21(00003)\r\n0-0:96.7.9(00001)\r\n"
        b"1-0:99.97.0(1)(0-0:96.7.19)(170117065912W)(0000009606*s)\r\n1-0:32.32.0(00000)\r\n1-0:32.36.0(00000)\r\n"
        b"0-0:96.13.1()\r\n0-0:96.13.0()\r\n1-0:31.7.0(002*A)\r\n1-0:21.7.0(00.374*kW)\r\n1-0:22.7.0(00.000*kW)\r\n"
        b"0-1:24.1.0(003)\r\n0-1:96.1.0(4730303139333430333135333730363136)\r\n0-1:24.2.1(190905210000S)(01091.352*m3)\r\n"
        b"!BB2A\r\n"
    )
    assert results("dsmr", telegram, *DSMR_POINTS) == [
        3235.689,
        0.374,
        2,
        1091.352,
        "190905210000S",
        Reason.MISSING,
    ]


def test_a_telegram_without_check_counts_only_where_that_is_allowed() -> None:
    old = DSMR.replace(b"!E47C", b"!")
    assert results("dsmr", old, *DSMR_POINTS) is Reason.CRC
    assert results("dsmr", old, *DSMR_POINTS, checked=False) == DSMR_RESULTS
    assert results("dsmr", DSMR.replace(b"123456", b"923456"), *DSMR_POINTS, checked=False) is Reason.CRC


@pytest.mark.parametrize(
    "noise", [b"", b"garbage\r\n", DSMR[300:], DSMR[:500], b"/", b"noise / more\n", b"\xff" * 50]
)
def test_a_telegram_behind_noise_is_read_however_it_is_cut(noise: bytes) -> None:
    options = msgspec.convert({"port": "x", "protocol": "dsmr"}, SerialLineOptions)
    dialect = dialect_of(options, DSMR_POINTS)
    for size in (1, 7, 64, 5000):
        framer = dialect.framer(LineCounts(), in_step=False)
        stream = noise + DSMR
        cuts = [cut for at in range(0, len(stream), size) for cut in framer.feed(stream[at : at + size], 1)]
        whole = [dialect.read(body) for body, _ in cuts if isinstance(body, bytes)]
        assert [one.results for one in whole if one is not None] == [DSMR_RESULTS]


def test_a_value_in_another_unit_is_no_value() -> None:
    telegram = b"/ABC5x\r\n\r\n1-0:1.8.1(123456789*Wh)\r\n!"
    telegram += f"{crc16_arc(telegram):04X}\r\n".encode()
    assert results("dsmr", telegram, DSMR_POINTS[0]) == [Reason.DECODE]


# ------------------------------------------------------------------------------------------------------------- scales

WEIGHT = P(name="weight", unit="kg")
SCALE_POINTS = (
    WEIGHT,
    P(name="tare", unit="kg"),
    P(name="stable", type=ValueType.BOOL),
    P(name="overload", type=ValueType.BOOL),
    P(name="net", type=ValueType.BOOL),
    P(name="unit", type=ValueType.STR),
)


def toledo_frame(a: int, b: int, c: int, weight: str, tare: str, *, checked: bool = True) -> bytes:
    """STX, status words, digits, CR, and the two's complement of the sum of all seven-bit characters before it."""
    frame = bytes([2, a, b, c]) + (weight + tare).encode() + b"\r"
    return frame + bytes([-sum(frame) & 0x7F]) if checked else frame


#: Word A: bits 0-2 the decimal point (2: none, 3: one digit behind it, ...), 3-4 the step, 5 always 1. Word B: 1 net,
#: 2 negative, 4 out of range, 8 motion, 16 kg, 32 always, 64 zero not captured. Word C: 0-2 unit, 32 always.
A, B, C = 0x2B, 0x30, 0x20


@pytest.mark.parametrize(
    ("frame", "weight", "tare"),
    [
        (toledo_frame(A, B, C, "001234", "000500"), 123.4, 50.0),
        (toledo_frame(A, B | 0x02, C, "  1234", "000000"), -123.4, 0.0),
        (toledo_frame(0x2A, B, C, "001234", "000000"), 1234.0, 0.0),
        (toledo_frame(0x28, B, C, "001234", "000000"), 123400.0, 0.0),
        (toledo_frame(0x2D, B, C, "001234", "000000"), 1.234, 0.0),
        (toledo_frame(A, B | 0x08, C, "001234", "000500"), Doubted(123.4, DOUBT), 50.0),
        (toledo_frame(A, B | 0x04, C, "999999", "000000"), Doubted(99999.9, FAULT), 0.0),
        (toledo_frame(A, B | 0x04, C, "      ", "000000"), Reason.EXCEPTION, 0.0),
        (toledo_frame(A, B | 0x40, C, "001234", "000000"), Doubted(123.4, DOUBT), 0.0),
        (toledo_frame(A, B & ~0x10, C, "001234", "000000"), Reason.DECODE, Reason.DECODE),  # pounds
        (toledo_frame(A, B, C | 0x01, "001234", "000000"), Reason.DECODE, Reason.DECODE),  # grams
        (toledo_frame(A, B, C | 0x10, "001234", "000000"), Reason.DECODE, 0.0),  # expanded by ten
        (toledo_frame(A, B, C | 0x07, "001234", "000000"), Reason.DECODE, Reason.DECODE),  # a unit of its own
        (
            toledo_frame(A, B, C | 0x04, "001234", "000000"),
            Reason.DECODE,
            Reason.DECODE,
        ),  # makers differ on it
    ],
)
def test_mettler_toledo_continuous(frame: bytes, weight: Result, tare: Result) -> None:
    assert results("toledo", frame, *SCALE_POINTS[:2]) == [weight, tare]


def test_toledo_without_check_and_with_parity_in_the_eighth_bit() -> None:
    frame = toledo_frame(A, B, C, "001234", "000000", checked=False)
    assert results("toledo", frame, WEIGHT, checked=False) == [123.4]
    even = bytes(
        byte | (0x80 if byte.bit_count() % 2 else 0) for byte in toledo_frame(A, B, C, "001234", "000000")
    )
    assert results("toledo", even, WEIGHT) == [123.4]


def test_a_damaged_toledo_frame_is_said_and_the_next_is_read() -> None:
    good, other = toledo_frame(A, B, C, "001234", "000000"), toledo_frame(A, B, C, "001300", "000000")
    broken = good.replace(b"1234", b"1235")
    said = [one.results for one in heard("toledo", good + broken + good[:9] + other, [WEIGHT])]
    assert said == [[123.4], Reason.CRC, [130.0]]


@pytest.mark.parametrize(
    ("line", "weighing"),
    [
        # A&D EK-L series manual, 9-2
        (b"ST,+001234.5  g", Weighing(weight=1234.5, unit="g", stable=True)),
        (b"QT,+00012345 PC", Weighing(weight=12345, unit="PC", stable=True)),
        (b"ST,+000123.4  %", Weighing(weight=123.4, unit="%", stable=True)),
        (b"OL,+999999.9  g", Weighing(weight=999999.9, unit="g", overload=True)),
        # A&D GX/GF series manual, 10.6; AD-4329A manual, 9.1
        (b"OL,+9999999E+19", Weighing(overload=True, trouble=Reason.EXCEPTION)),
        (b"OL,-9999999E+19", Weighing(overload=True, trouble=Reason.EXCEPTION)),
        (b"ST,G ,+01234.5kg", Weighing(weight=1234.5, unit="kg", stable=True, net=False)),
        (b"ST,N ,-01234.5 t", Weighing(weight=-1234.5, unit="t", stable=True, net=True)),
        (b"ST,T ,+00500.0kg", None),
        (b"OL,G ,+     .  kg", Weighing(unit="kg", overload=True, net=False, trouble=Reason.EXCEPTION)),
        (b"OL,-99999999 PC", Weighing(weight=-99999999, unit="PC", overload=True)),
        # A&D GH series manual, 10.6
        (b"US,-000183.96  g", Weighing(weight=-183.96, unit="g", stable=False)),
        # A&D GC series manual, 16.2
        (b"ST,OK,+0001.234 kg", Weighing(weight=1.234, unit="kg", stable=True)),
        # A&D AD-4329 manual, 11.1.1: out of range, the digits are blanks except the point
        (b"OL,GS,+    .   kg", Weighing(unit="kg", overload=True, net=False, trouble=Reason.EXCEPTION)),
        (b"ST,NT,-00012.5kg", Weighing(weight=-12.5, unit="kg", stable=True, net=True)),
        (b"ST,TR,+00012.5kg", None),
        (b"ST,+00x234.5  g", Reason.FRAMING),
        (b"", Reason.FRAMING),
    ],
)
def test_a_and_d_standard_format(line: bytes, weighing: object) -> None:
    assert and_standard(line) == weighing


@pytest.mark.parametrize(
    ("line", "weighing"),
    [
        # CAS CI-600D manual, 10-1: 13.5 kg is 000013.5; the lamps are a byte above 0x80
        (b"ST,GS,1\xc4,000013.5 kg", Weighing(weight=13.5, unit="kg", stable=True, net=False)),
        (b"US,NT,1\x82,  -013.5 kg", Weighing(weight=-13.5, unit="kg", stable=False, net=True)),
        (
            b"OL,GS,1\x84,        \x20kg",
            Weighing(unit="kg", overload=True, net=False, trouble=Reason.EXCEPTION),
        ),
        (b"ST,GS,1\xc4,000013.5 k", Reason.FRAMING),
        (b"ERR 02", Reason.FRAMING),
    ],
)
def test_cas_22_bytes(line: bytes, weighing: object) -> None:
    assert cas(line) == weighing


@pytest.mark.parametrize(
    ("line", "weighing"),
    [
        # Sartorius GC manual: "+ 123.56 g" and "+ 123.5[6] g"; Signum manual: "+1255.7 g"
        (b"+   123.56 g  ", Weighing(weight=123.56, unit="g", stable=True)),
        (b"+  123.5[6]g  ", Weighing(weight=123.56, unit="g", stable=True, flag=DOUBT)),
        (b"+   1255.7 g  ", Weighing(weight=1255.7, unit="g", stable=True)),
        (b"-   1255.7    ", Weighing(weight=-1255.7, stable=False)),
        (b"N     +   123.56 g  ", Weighing(weight=123.56, unit="g", stable=True, net=True)),
        (b"T1    +   123.56 g  ", None),
        (b"      H       ", Weighing(overload=True, trouble=Reason.EXCEPTION)),
        (b"      LL      ", Weighing(overload=True, trouble=Reason.EXCEPTION)),
        (b"      C       ", Weighing(trouble=Reason.BUSY)),
        (b"   Err 54     ", Weighing(trouble=Reason.EXCEPTION)),
        (b"Stat     ERR 123    ", Weighing(trouble=Reason.EXCEPTION)),
        (b"              ", Weighing(trouble=Reason.MISSING)),
        (b"+   123.56 g", Reason.FRAMING),
    ],
)
def test_sartorius_sbi(line: bytes, weighing: object) -> None:
    assert sbi(line) == weighing


@pytest.mark.parametrize(
    ("line", "weighing"),
    [
        # Ohaus RS232 interface manual, EN-3
        (b"    192.21 g", Weighing(weight=192.21, unit="g", stable=True)),
        (b"      0.01 g ?", Weighing(weight=0.01, unit="g", stable=False)),
        (b"    176.30 g ? 00:00:15", Weighing(weight=176.3, unit="g", stable=False)),
        (b"    207.80 g TOTAL", None),
        (b"       0.211 kg ?", Weighing(weight=0.211, unit="kg", stable=False)),
        (b"          3 PCS  ?", Weighing(weight=3, unit="PCS", stable=False)),
        # Defender 3000 manual, 5.2
        (b"-    12.5 kg   ?NET", Weighing(weight=-12.5, unit="kg", stable=False, net=True)),
        (b"     12.5 kg    T", None),
        (b"Err 8.3", Weighing(trouble=Reason.EXCEPTION, overload=True)),
        (b"------", Weighing(trouble=Reason.EXCEPTION, overload=True)),
        (b"SN: 1234567", Reason.FRAMING),
    ],
)
def test_ohaus(line: bytes, weighing: object) -> None:
    assert ohaus(line) == weighing


@pytest.mark.parametrize(
    ("protocol", "stream", "expected"),
    [
        ("and", b"ST,+00012.34 kg\r\n", [12.34, NONE, True, False, NONE, "kg"]),
        ("and", b"US,+00012.34 kg\r\n", [Doubted(12.34, DOUBT), NONE, False, False, NONE, "kg"]),
        ("and", b"OL,+9999.999 kg\r\n", [Doubted(9999.999, FAULT), NONE, NONE, True, NONE, "kg"]),
        ("and", b"ST,+00012.34 lb\r\n", [Reason.DECODE, NONE, True, False, NONE, "lb"]),
        ("cas", b"ST,GS,1\xc4,000013.5 kg\r\n", [13.5, NONE, True, False, False, "kg"]),
        ("sbi", b"+    12.34    \r\n", [Doubted(12.34, DOUBT), NONE, False, False, NONE, NONE]),
        ("sbi", b"      H       \r\n", [OVER, NONE, OVER, True, OVER, OVER]),
        ("ohaus", b"     12.34 kg ?\r\n", [Doubted(12.34, DOUBT), NONE, False, False, NONE, "kg"]),
        ("ohaus", b"what is this\r\n", Reason.FRAMING),
    ],
)
def test_motion_overload_and_a_changed_unit_are_never_a_good_weight(
    protocol: str, stream: bytes, expected: object
) -> None:
    assert results(protocol, stream, *SCALE_POINTS) == expected


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("KG", "kg", True), ("M3", "m3", True), ("m³", "m3", True), ("kwh", "kWh", True), ("°C", "Cel", True),
        ("MWh", "mWh", False), ("mg", "Mg", False), ("MW", "mW", False), ("kg", "g", False),
    ],
)  # fmt: skip
def test_a_unit_is_the_same_in_capitals_but_mega_is_not_milli(said: str, wanted: str, same: bool) -> None:
    assert same_unit(said, wanted) is same
