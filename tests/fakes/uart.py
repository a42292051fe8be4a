"""A serial line, bit by bit: what a receiver makes of characters that were sent at another speed or with other parity.

A pty passes bytes whatever the settings, so what a wrong speed does is computed here, as a UART works: a falling edge
begins a character, each bit is looked at in its middle, and the line's idle state is high.
"""

from __future__ import annotations


def levels(data: bytes, *, data_bits: int = 8, even: bool = False, idle_bits: int = 0) -> list[int]:
    """The line's states, one per bit time of the sender."""
    line: list[int] = [1] * 20
    for byte in data:
        bits = [byte >> bit & 1 for bit in range(data_bits)]
        line += [0, *bits, *([sum(bits) % 2] if even else []), 1, *[1] * idle_bits]
    return line + [1] * 40


def received(line: list[int], ratio: float, *, data_bits: int = 8, parity: bool = False) -> bytes:
    """What a receiver hears whose bit time is `ratio` times the sender's."""
    heard = bytearray()
    at, end = 0.0, len(line)
    while True:
        edge = next((i for i in range(int(at) + 1, end) if line[i] == 0 and line[i - 1] == 1), None)
        if edge is None:
            return bytes(heard)
        middles = [edge + ratio * (1.5 + bit) for bit in range(data_bits + parity + 1)]
        if middles[-1] >= end:
            return bytes(heard)
        value = 0
        for bit in range(data_bits):
            value |= line[int(middles[bit])] << bit
        heard.append(value)
        at = middles[-1]  # in the stop bit, right or wrong


def heard_at(
    data: bytes, sent_baud: int, heard_baud: int, *, data_bits: int = 8, even: bool = False
) -> bytes:
    """Sent at one speed, heard at another as 8 bits without parity."""
    return received(levels(data, data_bits=data_bits, even=even, idle_bits=1), sent_baud / heard_baud)
