"""The checks that serial messages end in. Pure: bytes in, a number out.

Every CRC is one line of parameters, as the catalogue of parametrised CRC algorithms gives them
(reveng.sourceforge.io/crc-catalogue), and the tests compare each with the check value printed there. A message is short
and a line is slow, so a table per CRC does: no compiled library for 60 ns a byte.
"""

from __future__ import annotations

import binascii
import functools
import operator
import zlib
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

Check = Literal[
    "none", "xor", "sum8", "sum8_complement", "lrc", "sum16",
    "crc8", "crc8_maxim", "crc8_nrsc5", "crc8_saej1850",
    "crc16_arc", "crc16_modbus", "crc16_ccitt", "crc16_xmodem", "crc16_kermit", "crc16_x25", "crc16_dnp",
    "crc16_usb", "crc16_maxim", "crc16_mcrf4xx", "crc16_genibus", "crc16_aug_ccitt", "crc16_umts",
    "crc16_profibus", "crc16_en13757",
    "crc32", "crc32c", "crc32_mpeg2", "crc32_bzip2",
]  # fmt: skip
ByteOrder = Literal["little", "big"]
Compute: TypeAlias = Callable[[bytes], int]


def crc(width: int, poly: int, init: int, *, reflected: bool, xorout: int) -> Compute:
    """A CRC by its parameters in the catalogue's words (there, all of ours have refin = refout)."""
    mask = (1 << width) - 1
    if reflected:
        backwards = int(f"{poly:0{width}b}"[::-1], 2)
        start = int(f"{init:0{width}b}"[::-1], 2)
        table = tuple(_low_first(byte, backwards) for byte in range(256))

        def low_first(data: bytes) -> int:
            value = start
            for byte in data:
                value = (value >> 8) ^ table[(value ^ byte) & 0xFF]
            return value ^ xorout

        return low_first
    top = 1 << (width - 1)
    table = tuple(_high_first(byte, poly, width, top, mask) for byte in range(256))

    def high_first(data: bytes) -> int:
        value = init
        for byte in data:
            value = ((value << 8) & mask) ^ table[(value >> (width - 8)) ^ byte]
        return value ^ xorout

    return high_first


def _low_first(value: int, poly: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ poly if value & 1 else value >> 1
    return value


def _high_first(byte: int, poly: int, width: int, top: int, mask: int) -> int:
    value = byte << (width - 8)
    for _ in range(8):
        value = ((value << 1) ^ poly) & mask if value & top else (value << 1) & mask
    return value


crc16_modbus: Final[Compute] = crc(16, 0x8005, 0xFFFF, reflected=True, xorout=0)
crc16_arc: Final[Compute] = crc(16, 0x8005, 0, reflected=True, xorout=0)

#: How many bytes a check takes, and how it is computed.
CHECKS: Final[dict[Check, tuple[int, Compute]]] = {
    "none": (0, lambda data: 0),
    "xor": (1, lambda data: functools.reduce(operator.xor, data, 0)),
    "sum8": (1, lambda data: sum(data) & 0xFF),
    "sum8_complement": (1, lambda data: ~sum(data) & 0xFF),
    "lrc": (1, lambda data: -sum(data) & 0xFF),  # Modbus over serial line 1.02, 6.2.1
    "sum16": (2, lambda data: sum(data) & 0xFFFF),
    "crc8": (1, crc(8, 0x07, 0, reflected=False, xorout=0)),  # CRC-8/SMBUS
    "crc8_maxim": (1, crc(8, 0x31, 0, reflected=True, xorout=0)),  # CRC-8/MAXIM-DOW, 1-Wire
    "crc8_nrsc5": (1, crc(8, 0x31, 0xFF, reflected=False, xorout=0)),  # Sensirion's
    "crc8_saej1850": (1, crc(8, 0x1D, 0xFF, reflected=False, xorout=0xFF)),
    "crc16_arc": (2, crc16_arc),  # "CRC-16", "IBM"; DSMR P1, SDI-12
    "crc16_modbus": (2, crc16_modbus),  # Modbus over serial line 1.02, 6.2.2
    "crc16_ccitt": (2, lambda data: binascii.crc_hqx(data, 0xFFFF)),  # CRC-16/IBM-3740, "CCITT-FALSE"
    "crc16_xmodem": (2, lambda data: binascii.crc_hqx(data, 0)),
    "crc16_kermit": (2, crc(16, 0x1021, 0, reflected=True, xorout=0)),  # the true CCITT
    "crc16_x25": (2, crc(16, 0x1021, 0xFFFF, reflected=True, xorout=0xFFFF)),  # CRC-16/IBM-SDLC; HDLC, PPP
    "crc16_dnp": (2, crc(16, 0x3D65, 0, reflected=True, xorout=0xFFFF)),
    "crc16_usb": (2, crc(16, 0x8005, 0xFFFF, reflected=True, xorout=0xFFFF)),
    "crc16_maxim": (2, crc(16, 0x8005, 0, reflected=True, xorout=0xFFFF)),
    "crc16_mcrf4xx": (2, crc(16, 0x1021, 0xFFFF, reflected=True, xorout=0)),  # MAVLink
    "crc16_genibus": (2, crc(16, 0x1021, 0xFFFF, reflected=False, xorout=0xFFFF)),  # Grundfos
    "crc16_aug_ccitt": (2, crc(16, 0x1021, 0x1D0F, reflected=False, xorout=0)),  # CRC-16/SPI-FUJITSU
    "crc16_umts": (2, crc(16, 0x8005, 0, reflected=False, xorout=0)),  # "BUYPASS"
    "crc16_profibus": (2, crc(16, 0x1DCF, 0xFFFF, reflected=False, xorout=0xFFFF)),
    "crc16_en13757": (2, crc(16, 0x3D65, 0, reflected=False, xorout=0xFFFF)),  # wireless M-Bus
    "crc32": (4, zlib.crc32),
    "crc32c": (4, crc(32, 0x1EDC6F41, 0xFFFFFFFF, reflected=True, xorout=0xFFFFFFFF)),  # Castagnoli
    "crc32_mpeg2": (4, crc(32, 0x04C11DB7, 0xFFFFFFFF, reflected=False, xorout=0)),
    "crc32_bzip2": (4, crc(32, 0x04C11DB7, 0xFFFFFFFF, reflected=False, xorout=0xFFFFFFFF)),
}


def xor_of(data: bytes) -> int:
    """All bytes in one, by exclusive or: the check of NMEA 0183 and of IEC 62056-21 (there of seven bits)."""
    return functools.reduce(operator.xor, data, 0)


def hex_agrees(sent: bytes | str, value: int) -> bool:
    """Two hexadecimal digits, no more and no less, say `value`."""
    try:
        return len(sent) == 2 and sent.isalnum() and int(sent, 16) == value
    except ValueError:
        return False
